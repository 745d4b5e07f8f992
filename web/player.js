/** The live player: shows the chunks of the streaming nodes while they are made, and takes wishes for the next ones. */

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { Panel } from "./panel.js";
import { readMessage } from "./playback.js";

const NODES = ["SelfForcingStreamSampler", "SelfForcingStreamToFile"];
const EVENT = "selfforcing.live";
const ROUTE = "/selfforcing/live";
const ENDS = ["execution_success", "execution_error", "execution_interrupted"];
const MIN_HEIGHT = 310; // that of player.css and the margins that the host puts around it

/** @type {Map<ComfyNode, Panel>} */
const panels = new Map();

/**
 * The newest message whose node is not on the page, as while another workflow is open. Nobody acknowledged it, so the
 * server waits; it is delivered when the node is back.
 * @type {import("./playback.js").Message | null}
 */
let missed = null;

/** @type {import("./panel.js").Host} */
const host = {
  post: async (body) => {
    if (!api.fetchApi) throw new Error("This front end cannot send to its server.");
    const headers = { "Content-Type": "application/json" };
    return api.fetchApi(ROUTE, { method: "POST", headers, body: JSON.stringify(body) });
  },
  interrupt: (promptId) => api.interrupt?.(promptId || null),
};

/**
 * The node that a path of ids names: "5" in the workflow itself, "29:12" node 12 inside the subgraph node 29.
 * Two instances of one subgraph share its nodes, and so one player.
 * @param {string} path
 */
function find(path) {
  /** @type {ComfyNode | null | undefined} */
  let node;
  let graph = app.rootGraph ?? app.graph;
  for (const id of path.split(":")) {
    node = graph?.getNodeById?.(id);
    graph = node?.subgraph;
  }
  return node;
}

/** @param {import("./playback.js").Message} message */
function deliver(message) {
  const node = find(message.node);
  let panel = node && panels.get(node);
  // A front end that draws nodes without our widget shows nothing: unanswered, the server keeps to its own preview.
  if (!panel?.element.isConnected) panel = undefined;
  missed = panel ? null : message;
  panel?.receive(message);
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

/** @param {ComfyNode} node */
function addPlayer(node) {
  if (!node.addDOMWidget) return;
  const panel = new Panel(host);
  // The first flag keeps the widget out of prompts, the second out of saved workflows.
  const options = { serialize: false, hideOnZoom: false, getMinHeight: () => MIN_HEIGHT };
  node.addDOMWidget("live_player", "SELFFORCING_PLAYER", panel.element, options).serialize = false;
  panels.set(node, panel);
  const { onRemoved } = node;
  node.onRemoved = function () {
    panels.delete(node);
    panel.dispose();
    return onRemoved?.apply(this);
  };
}

app.registerExtension?.({
  name: "selfforcing.player",
  setup() {
    const href = new URL("player.css", import.meta.url).href;
    document.head.append(Object.assign(document.createElement("link"), { rel: "stylesheet", href }));
    api.addEventListener?.(EVENT, onMessage);
    for (const type of ENDS) api.addEventListener?.(type, onEnd);
  },
  nodeCreated(node) {
    if (NODES.includes(node.comfyClass ?? "")) addPlayer(node);
  },
  afterConfigureGraph() {
    if (missed) deliver(missed);
  },
});
