/**
 * Shows which widgets stand at "auto": their values are sentinels (steps 0), which read like settings otherwise. And lets
 * the arrows of a length go from chunk to chunk.
 */

import { app } from "../../scripts/app.js";

/**
 * What a value of a widget stands for, by node and widget. Values and saved workflows stay as they are.
 * @type {Record<string, Record<string, Record<number, string>>>}
 */
const MEANINGS = {
  SelfForcingStreamSampler: {
    steps: { 0: "auto" }, shift: { 0: "auto" }, chunk: { 0: "auto" },
    window: { 0: "auto", [-1]: "whole video" }, sink: { [-1]: "auto", 0: "none" }, pace: { 0: "no limit" },
    quality: { [-1]: "auto" }, first_chunk_steps: { 0: "auto" },
  },
  SelfForcingCacheOptions: {
    chunk: { 0: "auto" }, window: { 0: "auto", [-1]: "whole video" }, sink: { [-1]: "auto", 0: "none" },
    context_noise: { [-1]: "auto", 0: "clean" },
  },
  SelfForcingSigmas: { steps: { 0: "auto" }, shift: { 0: "auto" }, first_chunk_steps: { 0: "auto" } },
};
MEANINGS.SelfForcingStreamToFile = MEANINGS.SelfForcingStreamSampler;

const LENGTHS = ["SelfForcingStreamSampler", "SelfForcingStreamToFile", "SelfForcingImageToVideo"];
const FRAMES = 4; // video frames of a latent frame
const CHUNK = 3; // latent frames, where the node does not say

/** The names that we gave. A widget that the user has named otherwise keeps that name. @type {WeakMap<object, string>} */
const ownLabels = new WeakMap();

/** @param {any} widget @param {Record<number, string>} meanings */
function label(widget, meanings) {
  if (widget.label !== undefined && widget.label !== widget.name && widget.label !== ownLabels.get(widget)) return;
  const meaning = meanings[widget.value];
  if (!meaning && !ownLabels.has(widget)) return;
  const text = meaning ? `${widget.name} \u00b7 ${meaning}` : widget.name;
  ownLabels.set(widget, text);
  widget.label = text;
}

/** @param {any} node */
function labelAll(node) {
  const meanings = MEANINGS[node?.comfyClass] ?? {};
  for (const widget of node?.widgets ?? []) if (meanings[widget.name]) label(widget, meanings[widget.name]);
}

/** The arrows go by whole chunks; what is typed stays, and the run rounds it down and says so. @param {any} node */
function stepByChunks(node) {
  const find = (/** @type {string} */ name) => node.widgets?.find((/** @type {any} */ each) => each.name === name);
  const length = find("length");
  if (!LENGTHS.includes(node.comfyClass) || !length?.options) return;
  const step = FRAMES * (find("chunk")?.value || CHUNK);
  // Newer front ends read step2; older ones step, of which an arrow adds a tenth.
  Object.assign(length.options, { step2: step, step: 10 * step });
  length.callback = (/** @type {number} */ value) => {
    const { min = 1, max = value } = length.options;
    length.value = Math.min(Math.max(Math.round(value), min), max); // ComfyUI's own would round it to a step
  };
}

/** @param {any} node */
function follow(node) {
  stepByChunks(node);
  const meanings = MEANINGS[node.comfyClass];
  if (!meanings) return;
  for (const widget of node.widgets ?? []) {
    if (!meanings[widget.name]) continue;
    const { callback } = widget;
    widget.callback = function (/** @type {any[]} */ ...args) {
      const result = callback?.apply(this, args);
      label(widget, meanings[widget.name]);
      if (widget.name === "chunk") stepByChunks(node);
      return result;
    };
  }
  const { onConfigure } = node;
  node.onConfigure = function (/** @type {any[]} */ ...args) {
    const result = onConfigure?.apply(this, args);
    labelAll(node);
    stepByChunks(node);
    return result;
  };
  labelAll(node);
}

app.registerExtension?.({ name: "selfforcingstream.auto", nodeCreated: follow, loadedGraphNode: labelAll });
