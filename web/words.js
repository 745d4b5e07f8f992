/** What the player says of a run: its state in a line, its figures behind the (i). No page, no import of ComfyUI. */

import { clock } from "./elements.js";

/** @typedef {import("./playback.js").Message} Message */
/** @typedef {[string, string]} Phrase words, and the sentence that explains them */
/**
 * @typedef {object} Viewing what the page knows beyond the newest message
 * @property {boolean} over the run ended
 * @property {boolean} isDry all that was received has been shown
 * @property {number | null} secondsAhead received and not yet shown; null: nothing is being shown
 * @property {boolean} isHoldAsked
 * @property {boolean} isFinishAsked
 */

/** The server's line of figures before the run: it belongs behind the (i). */
export const ESTIMATE = /^by estimate /;
/** @type {Phrase} */
export const NO_RUN = ["no run yet", "Queue the workflow to begin."];
const CHUNKS = "Chunks finished: the parts of the video that are made one after the other.";
const REAL_TIME = "Speed of making over speed of playing; from 100 % on it never waits.";
const LIMIT =
  "Of the frames per second that this device can reach at most: its own speed of products and copies, measured once.";

/**
 * What happens now.
 * @param {Message} message the newest one
 * @param {Viewing} viewing
 * @returns {Phrase[]}
 */
export function sayStatus(message, viewing) {
  const { over, secondsAhead } = viewing;
  /** @type {Phrase} */
  const chunks = [`chunk ${message.chunk} of ${message.numChunks || "?"}`, CHUNKS];
  if (over) return [sayEnding(message), chunks];
  return [...sayState(message, viewing), chunks, ...(secondsAhead === null ? [] : [sayAhead(message, secondsAhead)])];
}

/** @param {Message} message @param {Viewing} viewing @returns {Phrase[]} one, or none while chunks are simply made */
function sayState({ state, chunk, numChunks }, { isDry, isHoldAsked, isFinishAsked }) {
  if (numChunks && chunk >= numChunks && state !== "held")
    return [["ending", "Every chunk is made; the last frames and the file are written."]];
  if (isFinishAsked) return [["finishing", "The run ends after the chunk that is being made."]];
  if (state === "held") return [["held", "The run waits for Go on or Re-roll."]];
  if (isHoldAsked) return [["holds after this chunk", "The chunk that is being made is finished first."]];
  if (state === "ahead")
    return [["waiting for you to watch", "Enough is made; the next chunk is begun when more of it was shown."]];
  return isDry ? [["waiting for the next chunk", "All that was received has been shown."]] : [];
}

/** @param {Message} message @returns {Phrase} */
function sayEnding({ state, ending, chunk, numChunks }) {
  if (ending === "early") return ["finished here", "Ended by hand; what was made went on to the other nodes."];
  if (state === "done" && ending !== "stopped" && chunk >= numChunks) return ["done", "The video is whole."];
  return ["stopped", "The run ended before the video was whole; nothing went on to other nodes."];
}

/** @param {Message} message @param {number} seconds @returns {Phrase} */
function sayAhead({ pace }, seconds) {
  const limit = pace === null ? "" : ` The run waits from ${pace} s on.`;
  return [
    `${seconds.toFixed(1)} s ahead`,
    `Made and not yet shown; a new prompt shows after that and one chunk.${limit}`,
  ];
}

/** @param {number | null} value @param {(value: number) => string} say */
function known(value, say) {
  return value === null ? "not yet known" : say(value);
}

/** @param {number} share */
function percent(share) {
  return `${Math.round(share * 100)} %`;
}

/**
 * Name, value and explanation of each figure.
 * @param {Message | null} message the newest one
 * @param {string} estimate the server's line of figures; "": none came
 * @returns {[string, string, string][]}
 */
export function sayFigures(message, estimate) {
  if (!message) return [["No run yet", "", "The figures of a run come with its first chunk."]];
  const { stats, pace, numFrames, fps } = message;
  const length = numFrames ? `${numFrames} frames, ${clock(numFrames / fps)}` : "open";
  /** @type {[string, string, string][]} */
  const figures = [
    ["Speed", known(stats.fps, (rate) => `${rate.toFixed(1)} FPS`), "Video frames made per second."],
    [
      "First frame",
      known(stats.firstFrameSeconds, (seconds) => `${seconds.toFixed(1)} s`),
      "From the start of the run.",
    ],
    ["Real time", known(stats.realTime, percent), REAL_TIME],
    ["Of the limit", known(stats.shareOfLimit, percent), LIMIT],
    ["Length", length, `At ${fps} frames per second.`],
    ["Ahead at most", pace === null ? "no limit" : `${pace} s`, "The node's input pace."],
  ];
  if (estimate)
    figures.push(["Estimate", estimate.replace(ESTIMATE, ""), "From the model's sizes and this device's speed."]);
  return figures;
}
