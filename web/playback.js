/**
 * What the player received and which frame is due now: no page, no network, no timer. Times are milliseconds.
 *
 * Anything may arrive over the websocket, so readMessage() takes any value; behind it every field has type and range.
 */

/** @typedef {{index: number, picture: Blob}} Frame */
/**
 * @typedef {object} Message one event of the server, checked
 * @property {string} run one execution of one node
 * @property {string} promptId
 * @property {string} node its id; inside subgraphs the path of ids, "29:12"
 * @property {string} workflow the id of the workflow that queued the run; "": unknown
 * @property {string} tab that workflow in the words of the page that queued it; "": unknown
 * @property {number | null} number of the message within the run; null: nothing to acknowledge
 * @property {"sampling" | "held" | "done"} state
 * @property {number} chunk finished chunks
 * @property {number} numChunks 0: unknown
 * @property {number} numFrames of the whole video; 0: unknown
 * @property {number} fps the content's clock
 * @property {Frame[]} frames in the order of the message
 * @property {number | null} again forget what was received from this frame on
 * @property {{fps: number | null, firstFrameSeconds: number | null, realTime: number | null,
 *   shareOfLimit: number | null}} stats
 * @property {boolean} canPrompt
 * @property {string} text a line for the user
 */

export const MAX_FRAMES = 2000; // two minutes at 16 frames per second
const MAX_INDEX = 1e7; // a week at 16 frames per second
const MAX_TEXT = 500;
// A page in the background gets no animation frames. Its player stands still instead of leaping ahead on return.
const MAX_STEP_MS = 250;

/** @param {unknown} value @param {number} top @returns {number | null} */
function count(value, top) {
  return typeof value === "number" && Number.isSafeInteger(value) && value >= 0 && value <= top ? value : null;
}

/** @param {unknown} value @returns {number | null} */
function measure(value) {
  return typeof value === "number" && value >= 0 && value < 1e6 ? value : null;
}

/** @param {unknown} value */
function line(value) {
  return typeof value === "string" ? value.slice(0, MAX_TEXT) : "";
}

/** @param {unknown} base64 @returns {Blob | null} null where it is not base64 */
function picture(base64) {
  if (typeof base64 !== "string" || !base64) return null;
  try {
    return new Blob([Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0))], { type: "image/jpeg" });
  } catch {
    return null;
  }
}

/**
 * The message in an event's detail; null where it lacks the run or the node. What else is wrong becomes a default.
 * @param {unknown} detail
 * @returns {Message | null}
 */
export function readMessage(detail) {
  if (typeof detail !== "object" || detail === null) return null;
  const given = /** @type {Record<string, unknown>} */ (detail);
  const node = typeof given.node === "number" ? String(given.node) : given.node;
  if (typeof given.run !== "string" || !given.run || typeof node !== "string" || !node) return null;
  const numFrames = count(given.num_frames, MAX_INDEX) ?? 0;
  const jpegs = Array.isArray(given.jpegs) ? given.jpegs : [];
  const indices = (Array.isArray(given.indices) ? given.indices : []).map((index) =>
    count(index, (numFrames || MAX_INDEX) - 1),
  );
  /** @type {Frame[]} */
  const frames = [];
  for (const [place, index] of indices.entries()) {
    const blob = index === null ? null : picture(jpegs[place]);
    if (index !== null && blob) frames.push({ index, picture: blob });
  }
  const stats = /** @type {Record<string, unknown>} */ (
    typeof given.stats === "object" && given.stats !== null ? given.stats : {}
  );
  const fps = measure(given.fps);
  return {
    run: given.run,
    promptId: line(given.prompt_id),
    node,
    workflow: line(given.workflow),
    tab: line(given.tab),
    number: count(given.number, Number.MAX_SAFE_INTEGER),
    state: given.state === "held" || given.state === "done" ? given.state : "sampling",
    chunk: count(given.chunk, MAX_INDEX) ?? 0,
    numChunks: count(given.num_chunks, MAX_INDEX) ?? 0,
    numFrames,
    fps: fps && fps >= 0.1 && fps <= 240 ? fps : 16,
    frames,
    again: given.again === true ? (indices[0] ?? null) : null,
    stats: {
      fps: measure(stats.fps),
      firstFrameSeconds: measure(stats.first_frame_seconds),
      realTime: measure(stats.real_time),
      shareOfLimit: measure(stats.share_of_limit),
    },
    canPrompt: given.can_prompt === true,
    text: line(given.message),
  };
}

/** One run: frames by number, a bounded buffer of the newest ones, and a clock that waits for those not yet there. */
export class Playback {
  /** @type {number | null} when the clock was last read; null while it stands */
  #read = null;
  /** @type {Map<number, Blob>} */
  #pictures = new Map();
  /** @type {number[]} numbers of the frames at hand, ascending */
  #order = [];
  /** @type {Message | null} the newest message */
  message = null;
  position = 0; // in frames of the video; the whole part is the frame that is due
  loop = false;
  playing = true;
  waiting = true; // for a frame at `position`
  started = false;
  over = false; // the run ended; its last frames may still be on their way
  ended = false; // paused by the end of the video, not by the user

  /** @param {string} run @param {number} maxFrames */
  constructor(run = "", maxFrames = MAX_FRAMES) {
    this.run = run;
    this.maxFrames = maxFrames;
  }

  get first() {
    return this.#order[0] ?? 0;
  }

  /** Behind the last frame: where it has been shown for its time. */
  get end() {
    return this.#order.length ? this.#order[this.#order.length - 1] + 1 : 0;
  }

  get length() {
    return this.#order.length;
  }

  /** Whether the picture changes by itself. */
  get moving() {
    return this.started && this.playing && !this.waiting;
  }

  /**
   * Take what a message of this run brings. `frames` are those of its pictures that could be decoded.
   * @param {Message} message
   * @param {Frame[]} frames
   */
  receive(message, frames = message.frames) {
    this.message = message;
    if (message.again !== null) this.#forget(message.again);
    for (const frame of frames) this.#add(frame);
    while (this.#order.length > this.maxFrames) this.#pictures.delete(/** @type {number} */ (this.#order.shift()));
    if (message.state === "done") this.over = true;
    if (!this.started && this.#order.length && (message.chunk > 0 || this.over)) {
      this.started = true;
      this.position = this.first;
    }
    if (this.started) this.position = Math.max(this.position, this.first);
    if (this.ended && this.position < this.end) this.play();
    this.#look();
  }

  /** @param {Frame} frame */
  #add({ index, picture }) {
    if (!this.#pictures.has(index)) this.#order.splice(this.#upTo(index), 0, index);
    this.#pictures.set(index, picture);
  }

  /** @param {number} from */
  #forget(from) {
    for (const index of this.#order.splice(this.#upTo(from - 1))) this.#pictures.delete(index);
    this.position = Math.min(this.position, from);
  }

  /** How many frames at hand have a number of at most `index`. @param {number} index */
  #upTo(index) {
    let [low, high] = [0, this.#order.length];
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.#order[middle] <= index) low = middle + 1;
      else high = middle;
    }
    return low;
  }

  /** Whether there is a frame to go on to. The clock stands while there is none, so the place is kept. */
  #look() {
    const waiting = !this.over && (!this.started || this.position >= this.end);
    if (waiting !== this.waiting) this.#read = null;
    this.waiting = waiting;
  }

  /**
   * Move the clock to `now`.
   * @param {number} now
   * @returns {number | null} the frame to show: the due one, or the last received before it; null: none yet
   */
  tick(now) {
    if (this.moving) {
      const passed = this.#read === null ? 0 : Math.min(Math.max(now - this.#read, 0), MAX_STEP_MS);
      this.#read = now;
      this.#advance((passed / 1000) * (this.message?.fps ?? 0));
    }
    return this.shown();
  }

  /** @param {number} frames */
  #advance(frames) {
    this.position = Math.min(this.position + frames, this.end);
    this.#look();
    if (this.waiting || this.position < this.end) return;
    if (this.loop && this.#order.length) this.position = this.first;
    else {
      this.pause();
      this.ended = true;
    }
  }

  /** The number of the frame on screen. @returns {number | null} */
  shown() {
    return this.#order[Math.max(this.#upTo(Math.floor(this.position)) - 1, 0)] ?? null;
  }

  /** The frame on screen and those that follow it. @param {number} frames @returns {Frame[]} */
  ahead(frames) {
    const from = Math.max(this.#upTo(Math.floor(this.position)) - 1, 0);
    return this.#order
      .slice(from, from + frames)
      .map((index) => ({ index, picture: /** @type {Blob} */ (this.#pictures.get(index)) }));
  }

  play() {
    if (this.over && this.position >= this.end) this.position = this.first;
    this.playing = true;
    this.ended = false;
  }

  pause() {
    this.playing = this.ended = false;
    this.#read = null;
  }

  /** Go to a frame; outside of what is at hand, to the nearest. @param {number} index */
  seek(index) {
    if (!Number.isFinite(index) || !this.#order.length) return;
    this.started = true;
    this.ended = false;
    this.position = Math.min(Math.max(index, this.first), this.end - 1);
    this.#look();
  }

  /** The run ended without its last message. What was received can still be watched. */
  finish() {
    this.over = true;
    if (this.#order.length && !this.started) this.seek(this.first);
    this.#look();
  }
}
