/**
 * What the player received and which frame is due now: no page, no network, no timer. Times are milliseconds.
 *
 * Anything may arrive over the websocket, so readMessage() takes any value; behind it every field has type and range.
 */

/** @typedef {{index: number, picture: Blob}} Frame */
/**
 * @typedef {object} Happening what was done by hand, with the chunk that it first holds for
 * @property {"prompt" | "seed" | "reroll"} kind
 * @property {number} chunk from 0
 * @property {number} frame that chunk's first
 * @property {number} seconds of the video before that frame
 * @property {string} text the prompt, shortened by the server
 * @property {string} history what became of the frames before it: "recode", "keep"
 * @property {number | null} seed
 */
/** @typedef {{filename: string, subfolder: string, type: string}} SavedFile in the words of ComfyUI's /view */
/**
 * @typedef {object} Message one event of the server, checked
 * @property {string} run one execution of one node
 * @property {string} promptId
 * @property {string} node its id; inside subgraphs the path of ids, "29:12"
 * @property {string} workflow the id of the workflow that queued the run; "": unknown
 * @property {string} tab that workflow in the words of the page that queued it; "": unknown
 * @property {number | null} number of the message within the run; null: nothing to acknowledge
 * @property {"sampling" | "held" | "ahead" | "done"} state "ahead": waits until more of it was watched
 * @property {"whole" | "early" | "stopped" | null} ending how a run ended; null: it has not, or nothing is known
 * @property {number} chunk finished chunks
 * @property {number} numChunks 0: unknown
 * @property {number} numFrames of the whole video; 0: unknown
 * @property {number} fps the content's clock
 * @property {Frame[]} frames in the order of the message
 * @property {number | null} again forget what was received from this frame on
 * @property {{fps: number | null, firstFrameSeconds: number | null, realTime: number | null,
 *   shareOfLimit: number | null}} stats
 * @property {number | null} ahead seconds made and not yet shown when the message was sent; null: unknown
 * @property {number | null} pace at most so many seconds are made ahead; null: without limit
 * @property {Happening[] | null} events all that was done by hand, in order; null from servers that do not tell
 * @property {string} schedule Prompt Schedule text that repeats the run so far; "": not in this message
 * @property {SavedFile[]} files that were written; in the last message
 * @property {boolean} canFinish whether the server can end the run in an orderly way before its time
 * @property {boolean} canPrompt
 * @property {string} text a line for the user
 */

export const MAX_FRAMES = 2000; // two minutes at 16 frames per second
const MAX_INDEX = 1e7; // a week at 16 frames per second
const MAX_TEXT = 500;
const MAX_SCHEDULE = 1e6; // letters: a hundred prompts of the greatest length
const MAX_EVENTS = 2000;
const MAX_FILES = 100;
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

/** @param {unknown} value @param {number} top */
function line(value, top = MAX_TEXT) {
  return typeof value === "string" ? value.slice(0, top) : "";
}

/**
 * @template {string} Name
 * @param {unknown} value
 * @param {readonly Name[]} names
 * @returns {Name | null}
 */
function oneOf(value, names) {
  return names.find((name) => name === value) ?? null;
}

/** The entries of a list that are objects. @param {unknown} list @param {number} top */
function records(list, top) {
  const records = (Array.isArray(list) ? list.slice(0, top) : []).filter((each) => typeof each === "object" && each);
  return /** @type {Record<string, unknown>[]} */ (records);
}

/** @param {Record<string, unknown>} fields @returns {Happening[]} one, or none where it says too little */
function happening(fields) {
  const kind = oneOf(fields.kind, /** @type {const} */ (["prompt", "seed", "reroll"]));
  const frame = count(fields.frame, MAX_INDEX);
  if (!kind || frame === null) return [];
  const [chunk, seconds] = [count(fields.chunk, MAX_INDEX) ?? 0, measure(fields.seconds) ?? 0];
  const seed = count(fields.seed, Number.MAX_SAFE_INTEGER);
  return [{ kind, chunk, frame, seconds, text: line(fields.text), history: line(fields.history), seed }];
}

/** @param {unknown} files @returns {SavedFile[]} */
export function readFiles(files) {
  return records(files, MAX_FILES)
    .map(({ filename, subfolder, type }) => ({
      filename: line(filename),
      subfolder: line(subfolder),
      type: line(type) || "output",
    }))
    .filter(({ filename }) => filename);
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
  const fields = /** @type {Record<string, unknown>} */ (detail);
  const node = typeof fields.node === "number" ? String(fields.node) : fields.node;
  if (typeof fields.run !== "string" || !fields.run || typeof node !== "string" || !node) return null;
  const numFrames = count(fields.num_frames, MAX_INDEX) ?? 0;
  const jpegs = Array.isArray(fields.jpegs) ? fields.jpegs : [];
  const indices = (Array.isArray(fields.indices) ? fields.indices : []).map((index) =>
    count(index, (numFrames || MAX_INDEX) - 1),
  );
  /** @type {Frame[]} */
  const frames = [];
  for (const [place, index] of indices.entries()) {
    const blob = index === null ? null : picture(jpegs[place]);
    if (index !== null && blob) frames.push({ index, picture: blob });
  }
  const stats = /** @type {Record<string, unknown>} */ (
    typeof fields.stats === "object" && fields.stats !== null ? fields.stats : {}
  );
  const fps = measure(fields.fps);
  return {
    run: fields.run,
    promptId: line(fields.prompt_id),
    node,
    workflow: line(fields.workflow),
    tab: line(fields.tab),
    number: count(fields.number, Number.MAX_SAFE_INTEGER),
    state: oneOf(fields.state, /** @type {const} */ (["held", "ahead", "done"])) ?? "sampling",
    ending: oneOf(fields.ending, /** @type {const} */ (["whole", "early", "stopped"])),
    chunk: count(fields.chunk, MAX_INDEX) ?? 0,
    numChunks: count(fields.num_chunks, MAX_INDEX) ?? 0,
    numFrames,
    fps: fps && fps >= 0.1 && fps <= 240 ? fps : 16,
    frames,
    again: fields.again === true ? (indices[0] ?? null) : null,
    stats: {
      fps: measure(stats.fps),
      firstFrameSeconds: measure(stats.first_frame_seconds),
      realTime: measure(stats.real_time),
      shareOfLimit: measure(stats.share_of_limit),
    },
    ahead: measure(fields.ahead),
    pace: measure(fields.pace),
    events: Array.isArray(fields.events) ? records(fields.events, MAX_EVENTS).flatMap(happening) : null,
    schedule: line(fields.schedule, MAX_SCHEDULE),
    files: readFiles(fields.files),
    canFinish: fields.can_finish === true,
    canPrompt: fields.can_prompt === true,
    text: line(fields.message),
  };
}

/** One run: frames by number, a bounded buffer of the newest ones, and a clock that waits for those not yet there. */
export class Playback {
  /** @type {number | null} when the clock was last read; null while it stands */
  #readAt = null;
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

  /** Behind the last frame: where it has been shown for its time. That of frames left out at the end is filled too. */
  get end() {
    const { chunk = 0, numChunks = 0, numFrames = 0 } = this.message ?? {};
    const received = this.#order.length ? this.#order[this.#order.length - 1] + 1 : 0;
    return received && this.over && numChunks && chunk === numChunks ? Math.max(numFrames, received) : received;
  }

  /** Frames of the whole video, as far as that is known. */
  get total() {
    return this.over && this.length ? this.end : Math.max(this.message?.numFrames ?? 0, this.end);
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
    if (waiting !== this.waiting) this.#readAt = null;
    this.waiting = waiting;
  }

  /**
   * Move the clock to `now`.
   * @param {number} now
   * @returns {number | null} the frame to show: the due one, or the last received before it; null: none yet
   */
  tick(now) {
    if (this.moving) {
      const elapsed = this.#readAt === null ? 0 : Math.min(Math.max(now - this.#readAt, 0), MAX_STEP_MS);
      this.#readAt = now;
      this.#advance((elapsed / 1000) * (this.message?.fps ?? 0));
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
    this.#readAt = null;
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
