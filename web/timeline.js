/** The line below the video: what was received, where the viewer is, and where something was changed by hand. */

import { box, clock, make } from "./elements.js";

/** @typedef {import("./playback.js").Happening} Happening */
/**
 * @typedef {object} Span what the line shows, in frames
 * @property {number} first oldest frame at hand
 * @property {number} end behind the newest one
 * @property {number} total of the whole video
 * @property {number} position due now
 * @property {number} fps
 * @property {Happening[]} marks
 */

const THUMB = 12; // pixels; of player.css. The middle of the thumb, not its edge, is at the frame.
const NEAR = 6; // pixels from a mark at which the pointer means it
const KINDS = { prompt: "Prompt", seed: "Seed", reroll: "Made again" };

/** What a mark says in one line. @param {Happening} mark */
export function sayMark({ kind, text, seed }) {
  return `${KINDS[kind]}: ${kind === "prompt" ? text : (seed ?? "another seed")}`;
}

/**
 * The mark nearest to a frame; null where none is within `reach` frames.
 * @param {Happening[]} marks
 * @param {number} frame
 * @param {number} reach
 */
export function nearestMark(marks, frame, reach) {
  /** @type {Happening | null} */
  let nearest = null;
  for (const mark of marks) {
    const distance = Math.abs(mark.frame - frame);
    if (distance <= reach && (!nearest || distance <= Math.abs(nearest.frame - frame))) nearest = mark;
  }
  return nearest;
}

/** Where a frame lies on the line, as CSS writes it. @param {number} frame @param {number} total */
export function placeOf(frame, total) {
  const share = Math.min(Math.max(frame / Math.max(total - 1, 1), 0), 1);
  return `calc(${THUMB / 2}px + (100% - ${THUMB}px) * ${share.toFixed(5)})`;
}

export class Timeline {
  received = box("received");
  played = box("played");
  marks = box("marks");
  bubble = box("bubble");
  bar = make("input", {
    type: "range",
    min: "0",
    max: "0",
    step: "1",
    "data-action": "scrub",
    "aria-label": "Position",
  });
  element = box("timeline", box("track", this.received, this.played), this.marks, this.bar, this.bubble);
  isDragged = false;
  /** @type {Span | undefined} */
  span;
  #drawn = "";

  /** @param {(frame: number) => void} onSeek while the viewer drags, and once more at the end */
  constructor(onSeek) {
    this.bubble.hidden = true;
    this.bar.oninput = () => {
      this.isDragged = true;
      onSeek(this.bar.valueAsNumber);
    };
    this.bar.onchange = () => {
      this.isDragged = false;
      onSeek(this.bar.valueAsNumber);
    };
    this.bar.onpointermove = (event) => this.#point(event);
    this.bar.onpointerleave = () => (this.bubble.hidden = true);
    // A click on a mark means its frame, not the pixel.
    this.bar.onclick = (event) => {
      const mark = this.#under(event);
      if (mark) onSeek(mark.frame);
    };
  }

  /** @param {Span} span */
  draw(span) {
    this.span = span;
    const { first, end, total, position, marks } = span;
    this.bar.max = String(Math.max(total - 1, 0));
    this.bar.disabled = !end;
    if (!this.isDragged) this.bar.value = String(Math.floor(position));
    const at = end ? placeOf(Math.min(position, total - 1), total) : "0px";
    const from = first ? placeOf(first, total) : "0px";
    const to = end >= total ? "100%" : placeOf(end - 1, total);
    this.#place(this.received, from, end ? to : "0px");
    this.#place(this.played, from, at);
    this.#drawMarks(marks, total);
  }

  /** @param {HTMLElement} part @param {string} from @param {string} to */
  #place(part, from, to) {
    part.style.left = from;
    part.style.width = `calc(${to} - ${from})`;
  }

  /** @param {Happening[]} marks @param {number} total */
  #drawMarks(marks, total) {
    const drawn = JSON.stringify([total, marks.map(({ kind, frame }) => [kind, frame])]);
    if (drawn === this.#drawn) return;
    this.#drawn = drawn;
    const ticks = marks.map(({ kind, frame }) =>
      make("span", { class: `selfforcing-mark selfforcing-${kind}`, style: `left: ${placeOf(frame, total)}` }),
    );
    this.marks.replaceChildren(...ticks);
  }

  /** The frame below the pointer, and how many frames a pixel takes. @param {MouseEvent} event */
  #frameAt(event) {
    const { left, width } = this.bar.getBoundingClientRect();
    const scale = width / (this.bar.offsetWidth || width); // the canvas may be zoomed
    const perPixel = Math.max((this.span?.total ?? 1) - 1, 1) / Math.max(width - THUMB * scale, 1);
    const frame = (event.clientX - left - (THUMB / 2) * scale) * perPixel;
    return { frame: Math.min(Math.max(frame, 0), Math.max((this.span?.total ?? 1) - 1, 0)), perPixel };
  }

  /** @param {MouseEvent} event */
  #under(event) {
    const { frame, perPixel } = this.#frameAt(event);
    return nearestMark(this.span?.marks ?? [], frame, NEAR * perPixel);
  }

  /** Say what is below the pointer. @param {MouseEvent} event */
  #point(event) {
    const { span } = this;
    if (!span?.total) return;
    const mark = this.#under(event);
    const frame = mark?.frame ?? Math.round(this.#frameAt(event).frame);
    this.bubble.replaceChildren(make("b", {}, clock(frame / span.fps)), ...(mark ? [` ${sayMark(mark)}`] : []));
    this.bubble.hidden = false;
    const share = frame / Math.max(span.total - 1, 1);
    this.bubble.style.left = `${(share * 100).toFixed(2)}%`;
    this.bubble.style.transform = `translateX(-${(share * 100).toFixed(2)}%)`; // never beyond the player's edges
  }
}
