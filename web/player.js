/** The live player: shows the chunks of the streaming nodes while they are made, and takes wishes for the next ones. */

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { Panel } from "./panel.js";
import { readFiles, readMessage } from "./playback.js";

const NODES = ["SelfForcingStreamSampler", "SelfForcingStreamToFile"];
const EVENT = "selfforcing.live";
const ROUTE = "/selfforcing/live";
const ENDS = ["execution_success", "execution_error", "execution_interrupted"];
const MARGIN = 10; // pixels that the classic canvas puts around a widget
const SHEET = new URL("player.css", import.meta.url).href;
const TAB = "selfforcing_tab"; // where the server finds which of the open workflows queued a run
const NO_ID = "00000000-0000-0000-0000-000000000000"; // of a graph until it is loaded from a workflow
const OUTPUTS_MS = 1000; // after a workflow was opened; nothing tells when ComfyUI has its files
const AGAIN_MS = 100; // between two attempts to deliver a message to a workflow that is being opened
const AGAIN_AT_MOST = 100; // attempts: ten seconds

/** @type {Map<ComfyNode, Panel>} */
const panels = new Map();

/**
 * The newest message whose node is not on the page, as while another workflow is open. Nobody acknowledged it, so the
 * server waits; it is delivered when the node is back.
 * @type {import("./playback.js").Message | null}
 */
let missed = null;
/** @type {ReturnType<typeof setTimeout> | undefined} */
let retry;

/**
 * This page's own names of the workflows that it has open: copies of one may have its id.
 * @type {WeakMap<object, string>}
 */
const tabs = new WeakMap();
/** @type {Set<string>} */
const names = new Set();

/** @type {import("./panel.js").Host} */
const host = {
  post: async (body) => {
    if (!api.fetchApi) throw new Error("This front end cannot send to its server.");
    const headers = { "Content-Type": "application/json" };
    const signed = { ...body, client: api.clientId }; // the server obeys the page alone that queued the run
    return api.fetchApi(ROUTE, { method: "POST", headers, body: JSON.stringify(signed) });
  },
  interrupt: (promptId) => api.interrupt?.(promptId || null),
  address: (file) => {
    const route = `/view?${new URLSearchParams(file)}`;
    return api.apiURL?.(route) ?? route;
  },
  resized: () => app.canvas?.setDirty?.(true, true),
};

function rootGraph() {
  return app.rootGraph ?? app.graph;
}

/** The name of the workflow on the page; "" where the front end does not tell. */
function tab() {
  const workflow = app.extensionManager?.workflow?.activeWorkflow;
  if (!workflow) return "";
  const name = tabs.get(workflow) ?? Math.random().toString(36).slice(2);
  tabs.set(workflow, name);
  names.add(name);
  return name;
}

/** Let the graph say which workflow it is while ComfyUI writes it into the prompt, which it does at once. */
function sign() {
  const extra = rootGraph()?.extra;
  const name = tab();
  if (!extra || !name) return;
  extra[TAB] = name;
  queueMicrotask(() => delete extra[TAB]);
}

/** Whether the workflow on the page is the one that queued the run. @param {import("./playback.js").Message} message */
function isHere(message) {
  const id = rootGraph()?.id;
  const known = [id, message.workflow].every((each) => each && each !== NO_ID);
  if (known && id !== message.workflow) return false;
  return !names.has(message.tab) || message.tab === tab(); // a name from before the page was loaded anew says nothing
}

/**
 * The node that a path of ids names: "5" in the workflow itself, "29:12" node 12 inside the subgraph node 29.
 * Two instances of one subgraph share its nodes, and so one player.
 * @param {string} path
 */
function find(path) {
  /** @type {ComfyNode | null | undefined} */
  let node;
  let graph = rootGraph();
  for (const id of path.split(":")) {
    node = graph?.getNodeById?.(id);
    graph = node?.subgraph;
  }
  return node;
}

/** @param {import("./playback.js").Message} message */
function deliver(message) {
  const node = isHere(message) ? find(message.node) : null;
  let panel = node && panels.get(node);
  // A front end that draws nodes without our widget shows nothing: unanswered, the server keeps to its own preview.
  if (!panel?.element.isConnected) panel = undefined;
  missed = panel ? null : message;
  panel?.receive(message);
}

/**
 * ComfyUI attaches widgets, and says which workflow is open, some time after it has built the graph.
 * @param {number} times
 */
function deliverMissed(times) {
  clearTimeout(retry);
  if (missed) deliver(missed);
  if (missed && times) retry = setTimeout(deliverMissed, AGAIN_MS, times - 1);
}

/** @param {CustomEvent<unknown>} event */
function onMessage(event) {
  const message = readMessage(event.detail);
  if (message) deliver(message);
}

/** @param {CustomEvent<unknown>} event */
function onEnd(event) {
  const detail = /** @type {{prompt_id?: unknown} | null} */ (event.detail);
  if (missed && missed.promptId === detail?.prompt_id) missed = null;
  for (const panel of panels.values()) panel.finish(detail?.prompt_id);
}

/** The value of a node's number widget; NaN where there is none. @param {ComfyNode} node @param {string} name */
function numberOf(node, name) {
  return Number(node.widgets?.find((widget) => widget.name === name)?.value ?? NaN);
}

/** Until there is a picture, the screen has the node's own ratio. @param {ComfyNode} node @param {Panel} panel */
function shape(node, panel) {
  if (panel.isEmpty) panel.setSize(numberOf(node, "width"), numberOf(node, "height"));
}

/** @param {ComfyNode} node */
function addPlayer(node) {
  if (!node.addDOMWidget) return;
  const panel = new Panel(host, SHEET);
  const getMinHeight = () => {
    shape(node, panel);
    return panel.minHeight((node.size?.[0] ?? 0) - 2 * MARGIN) + 2 * MARGIN;
  };
  // serialize: not in prompts. hideInPanel: the side panel would set a width that then stays.
  const options = { serialize: false, hideOnZoom: false, hideInPanel: true, getMinHeight };
  const widget = node.addDOMWidget("live_player", "SELFFORCING_PLAYER", panel.element, options);
  Object.assign(widget, { serialize: false, beforeQueued: sign }); // not in saved workflows either
  panels.set(node, panel);
  keepOnePlayer(node);
  const { onRemoved, onExecuted } = node;
  node.onRemoved = function () {
    removePlayer(node);
    return onRemoved?.apply(this);
  };
  node.onExecuted = function (output) {
    showOutput(node, output);
    return onExecuted?.call(this, output);
  };
}

/**
 * ComfyUI would show a written video in a second player, and in the classic canvas put that one's value into prompts,
 * which makes an unchanged workflow run again. It adds none to a node that seems to have one, or wants none.
 * @param {ComfyNode} node
 */
function keepOnePlayer(node) {
  const unseen = document.createElement("div");
  Object.defineProperty(node, "videoContainer", { get: () => unseen, set() {}, configurable: true });
  node.hideOutputImages = true; // Nodes 2.0
}

/** What ComfyUI reports of a node that ran. @param {ComfyNode} node @param {unknown} output */
function showOutput(node, output) {
  const { images } = /** @type {{images?: unknown}} */ (output ?? {});
  panels.get(node)?.showFiles(readFiles(images), numberOf(node, "fps"));
}

/** ComfyUI knows the files of earlier runs again some time after it has built the graph of their workflow. */
function showOutputs() {
  for (const [node, panel] of panels) {
    const { graph, id } = node;
    const place = !graph || graph === rootGraph() ? String(id) : `${graph.id}:${id}`;
    if (panel.isEmpty) showOutput(node, app.nodeOutputs?.[place]);
  }
}

/** @param {ComfyNode} node */
function removePlayer(node) {
  panels.get(node)?.dispose();
  panels.delete(node);
}

/** ComfyUI removes the nodes of a workflow without a word to those inside its subgraphs. */
function removeLostPlayers() {
  const root = rootGraph();
  if (!root?.nodes) return;
  const graphs = new Set([root]);
  for (const graph of graphs) for (const { subgraph } of graph.nodes ?? []) if (subgraph) graphs.add(subgraph);
  const nodes = new Set([...graphs].flatMap((graph) => graph.nodes ?? []));
  for (const node of panels.keys()) if (!nodes.has(node)) removePlayer(node);
}

app.registerExtension?.({
  name: "selfforcingstream.player", // under the pack's DisplayName
  setup() {
    api.addEventListener?.(EVENT, onMessage);
    for (const type of ENDS) api.addEventListener?.(type, onEnd);
  },
  nodeCreated(node) {
    if (NODES.includes(node.comfyClass ?? "")) addPlayer(node);
  },
  afterConfigureGraph() {
    delete rootGraph()?.extra?.[TAB]; // of a workflow that was read from a video
    removeLostPlayers();
    for (const [node, panel] of panels) shape(node, panel);
    deliverMissed(AGAIN_AT_MOST);
    setTimeout(showOutputs, OUTPUTS_MS);
  },
});
