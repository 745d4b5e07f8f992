/** Promises of what puts the player into a page: node --test tests/web/player.test.js */

import assert from "node:assert/strict";
import { register } from "node:module";
import test, { beforeEach, mock } from "node:test";

// ComfyUI's scripts and the player's box are what this file makes of them.
const STANDS_IN = {
  "scripts/app.js": "export const app = globalThis.page.app",
  "scripts/api.js": "export const api = globalThis.page.api",
  "./panel.js": "export const Panel = globalThis.page.Panel",
};
register(`data:text/javascript,${encodeURIComponent(`
  const standsIn = ${JSON.stringify(STANDS_IN)}
  export function resolve(specifier, context, next) {
    const name = Object.keys(standsIn).find(name => specifier.endsWith(name))
    if (!name) return next(specifier, context)
    return {url: 'data:text/javascript,' + encodeURIComponent(standsIn[name]), shortCircuit: true}
  }`)}`);

/** As much of a front end as the player sees: one root graph, configured anew for each workflow that is opened. */
class Page {
  listeners = {};
  panels = [];
  app = { registerExtension: (extension) => (this.extension = extension), extensionManager: { workflow: {} } };
  posted = [];
  api = {
    clientId: "c1",
    addEventListener: (type, listener) => (this.listeners[type] = listener),
    fetchApi: async (route, { body }) => this.posted.push([route, JSON.parse(body)]),
  };
  Panel = class {
    element = { isConnected: true };
    received = [];
    isEmpty = true;
    constructor(host) {
      this.host = host;
      page.panels.push(this);
    }
    receive(message) {
      this.received.push(message);
    }
    finish() {}
    setSize(width, height) {
      this.size = [width, height];
    }
    showFiles(files, fps) {
      this.shown = [files, fps];
    }
    minHeight(width) {
      return width / 2;
    }
    dispose() {
      this.disposed = true;
    }
  };

  /** As ComfyUI does: without a word to nodes in subgraphs, and the active workflow changes last. */
  open(workflow, { mounted = true } = {}) {
    for (const node of this.app.graph?.nodes ?? []) node.onRemoved?.();
    this.app.graph = this.build(workflow, mounted);
    this.extension.afterConfigureGraph();
    this.app.extensionManager.workflow.activeWorkflow = workflow;
    mock.timers.tick(100);
  }

  build({ id, nodes, extra = {} }, mounted) {
    const built = nodes.map((given) => {
      const node = { id: given.id, comfyClass: given.type, widgets: [] };
      node.addDOMWidget = (name, type, element, options) => (node.widgets.push({ name, options }), node.widgets.at(-1));
      if (given.inner) node.subgraph = this.build(given.inner, mounted);
      this.extension.nodeCreated(node);
      if (given.type === "SelfForcingStreamSampler") node.panel = this.panels.at(-1);
      if (node.panel) node.panel.element.isConnected = mounted;
      return node;
    });
    return { id, nodes: built, extra: { ...extra }, getNodeById: (id) => built.find((node) => String(node.id) === id) };
  }

  /** What the server learns of a workflow when the button is pressed. */
  queue() {
    for (const { widgets } of this.app.graph.nodes) for (const widget of widgets) widget.beforeQueued?.();
    const { id, extra } = structuredClone({ id: this.app.graph.id, extra: this.app.graph.extra });
    return { workflow: id, tab: extra.selfforcing_tab };
  }

  send(from, more = {}) {
    const detail = { run: "r", node: "5", prompt_id: "p", number: 0, ...from, ...more };
    this.listeners["selfforcing.live"]({ detail });
  }

  player(id = "5") {
    return this.app.graph.getNodeById(id).panel;
  }
}

const page = (globalThis.page = new Page());
globalThis.document = { createElement: () => ({}) };
await import("../../web/player.js");
page.extension.setup();

const sampler = { id: 5, type: "SelfForcingStreamSampler" };
const workflow = (id, nodes = [sampler]) => ({ id, nodes });

beforeEach(() => {
  page.listeners.execution_success({ detail: { prompt_id: "p" } });
  page.app.extensionManager = { workflow: {} };
  mock.timers.reset();
  mock.timers.enable({ apis: ["setTimeout"] });
});

test("a run is shown in the workflow that queued it and in no other with such a node", () => {
  const [one, other] = [workflow("a"), workflow("b")];
  page.open(one);
  const from = page.queue();
  page.send(from);
  assert.equal(page.player().received.length, 1);
  page.open(other);
  page.send(from);
  assert.equal(page.player().received.length, 0);
  page.open(one);
  assert.equal(page.player().received.length, 1);
});

test("copies with one id are told apart by what the page itself knows", () => {
  const [one, copy] = [workflow("a"), workflow("a")];
  page.open(one);
  const from = page.queue();
  page.open(copy);
  mock.timers.tick(60_000);
  page.send(from);
  assert.equal(page.player().received.length, 0);
  page.open(one);
  assert.equal(page.player().received.length, 1);
});

test("a run of which nothing is known is shown wherever there is its node", () => {
  page.open(workflow("a"));
  for (const from of [{}, { workflow: "a" }, { workflow: "a", tab: "of a page since loaded anew" }]) page.send(from);
  page.send({ workflow: "00000000-0000-0000-0000-000000000000" });
  assert.equal(page.player().received.length, 4);
  page.app.extensionManager = undefined;
  page.send({ workflow: "a" });
  assert.equal(page.player().received.length, 5);
  page.app.graph.id = undefined;
  page.send({ workflow: "b" });
  assert.equal(page.player().received.length, 6);
});

test("what queueing writes into the graph is gone at once, also what a video brought along", async () => {
  page.open({ ...workflow("a"), extra: { selfforcing_tab: "stale", ds: 1 } });
  assert.deepEqual(page.app.graph.extra, { ds: 1 });
  const { tab } = page.queue();
  assert.ok(tab);
  await null;
  assert.deepEqual(page.app.graph.extra, { ds: 1 });
  assert.equal(page.queue().tab, tab);
});

test("a message missed while another workflow was open is delivered once the widget is on the page", () => {
  const one = workflow("a");
  page.open(one);
  const from = page.queue();
  page.open(workflow("b", []));
  page.send(from);
  page.open(one, { mounted: false });
  mock.timers.tick(3000);
  assert.equal(page.player().received.length, 0);
  page.player().element.isConnected = true;
  mock.timers.tick(100);
  assert.equal(page.player().received.length, 1);
  mock.timers.tick(60_000);
  assert.equal(page.player().received.length, 1);
});

test("players inside subgraphs are let go with their workflow", () => {
  const inner = workflow("s", [sampler, { id: 6, inner: workflow("t") }]);
  const nested = workflow("a", [{ id: 29, inner }, sampler]);
  page.open(nested);
  const before = page.panels.slice(-3);
  assert.deepEqual(before.map((panel) => panel.disposed), [undefined, undefined, undefined]);
  page.open(nested);
  assert.deepEqual(before.map((panel) => panel.disposed), [true, true, true]);
  page.send({ workflow: "a" }, { node: "29:6:5" });
  assert.deepEqual(page.panels.slice(-3).map((panel) => [panel.disposed, panel.received.length]), [
    [undefined, 0], [undefined, 1], [undefined, 0],
  ]);
});

test("every command tells the server which page it is from", async () => {
  page.open(workflow("a"));
  await page.player().host.post({ run: "r", action: "hold" });
  assert.deepEqual(page.posted.at(-1), ["/selfforcing/live", { run: "r", action: "hold", client: "c1" }]);
});

test("the player's height follows the node's width, and no side panel sets either", () => {
  page.open(workflow("a"));
  const node = page.app.graph.getNodeById("5");
  const { options } = node.widgets.find(({ name }) => name === "live_player");
  node.size = [520, 300];
  assert.equal(options.getMinHeight(), 270); // ten pixels around it on each side
  assert.deepEqual([options.hideInPanel, options.serialize], [true, false]);
});

test("a node has one player: ComfyUI's own finds its place taken, and ours plays the file", () => {
  page.open(workflow("a"));
  const node = page.app.graph.getNodeById("5");
  const container = node.videoContainer;
  node.videoContainer = undefined; // what ComfyUI does when a file cannot be loaded
  assert.ok(container && node.videoContainer === container && node.hideOutputImages);
  node.onExecuted({ images: [{ filename: "a.mp4", subfolder: "video", type: "output" }], animated: [true] });
  assert.deepEqual(node.panel.shown[0], [{ filename: "a.mp4", subfolder: "video", type: "output" }]);
  node.onExecuted(null);
});

test("a workflow that is opened again shows the file of its last run", () => {
  page.open(workflow("a"));
  page.app.nodeOutputs = { 5: { images: [{ filename: "b.mp4", subfolder: "", type: "output" }] } };
  assert.equal(page.player().shown?.[0].length ?? 0, 0);
  mock.timers.tick(1000);
  assert.equal(page.player().shown[0][0].filename, "b.mp4");
  page.app.nodeOutputs = undefined;
});
