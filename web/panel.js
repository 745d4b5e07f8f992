/** The player's box on the page: the canvas, its controls, and the row that steers the run. No import of the host. */

import { Playback } from "./playback.js";

/** @typedef {import("./playback.js").Message} Message */
/**
 * @typedef {object} Host what the panel asks of ComfyUI
 * @property {(body: object) => Promise<Response>} post to the server's half of the player
 * @property {(promptId: string) => unknown} interrupt stop the prompt that is being executed
 */

const LOOK_AHEAD = 6; // bitmaps held: enough to hide a decoder's hiccup; each takes the size of a raw frame
const MAX_SEED = Number.MAX_SAFE_INTEGER; // JSON numbers are exact up to here
const NO_TEXT = "Nothing on the server can read a new prompt for this run; connect clip to the node.";
/** Outlines on a 16 by 16 grid. */
const ICONS = {
  play: "M4 2.5v11l9-5.5z",
  pause: "M4 3h3v10H4zM9 3h3v10H9z",
  stop: "M3.5 3.5h9v9h-9z",
  loop: "M4 4.2h6.5V2L14 5l-3.5 3V5.8H5.6V9H4zM12 11.8H5.5V14L2 11l3.5-3v2.2h4.9V7H12z",
};

/**
 * @template {keyof HTMLElementTagNameMap} Tag
 * @param {Tag} tag
 * @param {Record<string, string>} attributes
 * @param {(Node | string)[]} children
 * @returns {HTMLElementTagNameMap[Tag]}
 */
function make(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** @param {string} action @param {string} title @param {(Node | string)[]} children */
function button(action, title, ...children) {
  return make("button", { type: "button", "data-action": action, title, "aria-label": title }, ...children);
}

/** @param {keyof typeof ICONS} name */
function icon(name) {
  const [svg, path] = ["svg", "path"].map((tag) => document.createElementNS("http://www.w3.org/2000/svg", tag));
  svg.setAttribute("viewBox", "0 0 16 16");
  path.setAttribute("d", ICONS[name]);
  svg.append(path);
  return svg;
}

/** @param {Node[]} children */
function row(...children) {
  return make("div", { class: "selfforcing-row" }, ...children);
}

/** The parts of the player; those that never change are only in `element`. */
function build() {
  const parts = {
    canvas: make("canvas", { class: "selfforcing-canvas" }),
    hint: make("div", { class: "selfforcing-hint" }),
    play: button("play", "Play", icon("play")),
    stop: button("stop", "Stop: end the run; what was received stays here.", icon("stop")),
    loop: button("loop", "Loop: when the run is over, start again at the end.", icon("loop")),
    scrub: make("input", {
      type: "range", min: "0", max: "0", step: "1", "data-action": "scrub", "aria-label": "Position",
      title: "The frames received so far; the oldest make room for new ones.",
    }),
    place: make("span", { class: "selfforcing-place", title: "Frame on screen / frames of the video" }),
    status: make("div", { class: "selfforcing-status", "data-role": "status" }),
    text: make("div", { class: "selfforcing-note", "data-role": "message" }),
    error: make("div", { class: "selfforcing-error", "data-role": "error", role: "alert" }),
    prompt: make("input", {
      type: "text", "data-action": "prompt-text", "aria-label": "Prompt", placeholder: "What happens next",
    }),
    send: button("prompt", "", "Prompt"),
    history: make("input", { type: "checkbox", "data-action": "history" }),
    seed: make("input", {
      type: "number", min: "0", max: String(MAX_SEED), step: "1", "data-action": "seed-value", "aria-label": "Seed",
      placeholder: "random", title: `A whole number from 0 to ${MAX_SEED}; empty: a new one each time.`,
    }),
    useSeed: button("seed", "Take this seed from the next chunk on.", "Seed"),
    hold: button("hold", "Wait after the chunk that is being made.", "Hold"),
    goOn: button("go_on", "Make the next chunk.", "Go on"),
    reroll: button("reroll", "While held: make the last chunk once more, with this seed.", "Re-roll"),
  };
  const { canvas, hint, play, stop, loop, scrub, place, status, text, error } = parts;
  const title = "On: the frames so far are read again under the new prompt. Off: they are kept, the change is slower.";
  parts.history.checked = true;
  const steering = make(
    "div",
    { class: "selfforcing-steering" },
    row(parts.prompt, make("label", { title }, parts.history, "rewrite history"), parts.send),
    row(parts.seed, parts.useSeed, parts.hold, parts.goOn, parts.reroll),
  );
  const element = make(
    "div",
    { class: "selfforcing-player" },
    make("div", { class: "selfforcing-screen" }, canvas, hint),
    row(play, stop, loop, scrub, place),
    status,
    text,
    error,
    steering,
  );
  return { ...parts, steering, element };
}

/** One player: owns its element, its frames and its animation frame; dispose() lets go of all. */
export class Panel {
  playback = new Playback();
  former = ""; // the run before; its late messages are not a new run
  /** Messages are handled one after the other, each when the pictures of the one before are decoded. */
  queue = Promise.resolve();
  /** @type {Map<Blob, ImageBitmap | null>} the pictures due next; null: being decoded */
  bitmaps = new Map();
  /** @type {Blob | undefined} the picture on the canvas */
  drawn;
  animation = 0;
  disposed = false;
  dragging = false;
  note = ""; // what the user's last action led to; gone with the next chunk
  told = ""; // the server's last line; it comes in one message only
  parts = build();

  /** @param {Host} host */
  constructor(host) {
    this.host = host;
    this.#listen();
    this.#refresh();
  }

  get element() {
    return this.parts.element;
  }

  #listen() {
    const { play, loop, stop, scrub, send, prompt, useSeed, reroll, hold, goOn, seed } = this.parts;
    play.onclick = () => (this.playback.playing ? this.playback.pause() : this.playback.play(), this.#refresh());
    loop.onclick = () => ((this.playback.loop = !this.playback.loop), this.#refresh());
    stop.onclick = () => this.#try(async () => this.host.interrupt(this.playback.message?.promptId ?? ""));
    scrub.oninput = () => {
      this.dragging = true;
      this.playback.seek(scrub.valueAsNumber);
      this.#refresh();
    };
    scrub.onchange = () => ((this.dragging = false), this.#refresh());
    send.onclick = () => this.#sendPrompt();
    prompt.onkeydown = (event) => {
      // Enter also ends the composition of a character; that one sends nothing.
      if (event.key === "Enter" && !event.isComposing) this.#sendPrompt();
    };
    useSeed.onclick = () => this.#sendSeed("seed", "from the next chunk on");
    reroll.onclick = () => this.#sendSeed("reroll", "for the last chunk once more");
    hold.onclick = () => this.#act({ action: "hold" }, "Holds after this chunk.");
    goOn.onclick = () => this.#act({ action: "go_on" }, "");
    // The canvas below has shortcuts on plain keys and drags nodes; what is meant for a control ends here.
    for (const type of ["keydown", "keyup", "keypress", "pointerdown", "mousedown", "dblclick", "copy", "paste", "cut"])
      this.element.addEventListener(type, (event) => {
        const control = event.target instanceof Element && event.target.closest("input, button, label");
        const shortcut = event instanceof KeyboardEvent && control instanceof HTMLButtonElement;
        if (control && !(shortcut && ![" ", "Enter"].includes(event.key))) event.stopPropagation();
      });
    seed.addEventListener("wheel", (event) => {
      if (document.activeElement === seed) event.stopPropagation(); // it counts; the canvas would zoom as well
    });
  }

  /**
   * Take a message of the server: decode its pictures, put them in the buffer, and acknowledge it.
   * @param {Message} message
   * @returns {Promise<void>} settled when that is done; never rejected
   */
  receive(message) {
    this.queue = this.queue.then(() => this.#take(message)).catch((error) => console.error("Self Forcing:", error));
    return this.queue;
  }

  /** @param {Message} message */
  async #take(message) {
    if (this.disposed) return;
    const frames = [];
    for (const frame of message.frames) {
      // One at a time, and only the JPEG is kept: raw, the pictures of a long message would fill the memory.
      const bitmap = await createImageBitmap(frame.picture).catch(() => null);
      if (bitmap) frames.push(frame);
      bitmap?.close();
    }
    if (this.disposed) return;
    const { run, number } = message;
    // A lost answer needs no words: the server sends less, and the next one makes up for it.
    if (number !== null) this.#post({ run, action: "ack", number }).catch(() => {});
    if (message.run === this.former) return;
    if (message.run !== this.playback.run) this.#begin(message.run);
    const last = this.playback.message;
    if (message.text || last?.chunk !== message.chunk || last.state !== message.state) this.note = "";
    if (message.text) this.told = message.text;
    this.playback.receive(message, frames);
    this.#refresh();
  }

  /** @param {string} run */
  #begin(run) {
    this.former = this.playback.run;
    const { loop } = this.playback;
    this.playback = Object.assign(new Playback(run), { loop });
    this.#fail("");
    this.told = "";
  }

  /** The host says that the prompt ended, in whatever way. @param {unknown} promptId */
  finish(promptId) {
    // In the queue, for messages that came before may still be decoding.
    this.queue = this.queue.then(() => {
      if (this.disposed || !promptId || this.playback.message?.promptId !== promptId) return;
      this.playback.finish();
      this.#refresh();
    });
  }

  dispose() {
    this.disposed = true;
    cancelAnimationFrame(this.animation);
    for (const bitmap of this.bitmaps.values()) bitmap?.close();
    this.bitmaps.clear();
    this.playback = new Playback(); // the host may keep the element
  }

  // ------------------------------------------------------------ to the server --
  /** @param {{run: string, action: string} & Record<string, unknown>} body @returns {Promise<string>} error or "" */
  async #post(body) {
    const answer = await this.host.post(body);
    if (answer.ok) return "";
    const told = await answer.json().catch(() => null);
    const reason = typeof told?.error === "string" && told.error;
    if (answer.status === 404 && reason && body.run === this.playback.run) {
      this.playback.finish(); // the run is over
      this.#refresh();
    }
    return reason || `The server answered ${answer.status} ${answer.statusText}`;
  }

  /** @param {{action: string} & Record<string, unknown>} body @param {string} done what to say when it is accepted */
  #act(body, done) {
    return this.#try(async () => {
      const error = await this.#post({ run: this.playback.run, ...body });
      this.#fail(error);
      if (!error) [this.note, this.told] = [done, ""];
      this.#refresh();
    });
  }

  /** What goes wrong is said in the player. @param {() => Promise<unknown>} action */
  async #try(action) {
    try {
      await action();
    } catch (error) {
      this.#fail(error instanceof Error ? error.message : String(error));
    }
  }

  /** @param {string} error "" clears the line */
  #fail(error) {
    this.parts.error.textContent = error;
    if (error) this.parts.text.textContent = this.note = "";
  }

  #sendPrompt() {
    const text = this.parts.prompt.value.trim();
    if (!text) return this.#fail("The prompt is empty; write what happens next.");
    const history = this.parts.history.checked ? "recode" : "keep";
    return this.#act({ action: "prompt", text, history }, "Prompt sent; the next chunk follows it.");
  }

  /** @param {"seed" | "reroll"} action @param {string} when */
  #sendSeed(action, when) {
    const { value, validity } = this.parts.seed;
    const seed = value === "" ? Math.floor(Math.random() * 2 ** 32) : Number(value);
    if (validity.badInput || !Number.isSafeInteger(seed) || seed < 0)
      return this.#fail(`A seed is a whole number from 0 to ${MAX_SEED}.`);
    return this.#act({ action, seed }, `Seed ${seed} ${when}.`);
  }

  // -------------------------------------------------------------- to the page --
  /** Draw what is due now, and again on the page's next frame while the video moves. */
  #refresh() {
    if (this.disposed) return;
    cancelAnimationFrame(this.animation);
    const now = performance.now();
    if (!this.dragging) this.playback.tick(now);
    this.#draw();
    this.#controls();
    if (this.playback.moving && !this.dragging) this.animation = requestAnimationFrame(() => this.#refresh());
  }

  #draw() {
    const due = this.playback.ahead(LOOK_AHEAD).map((frame) => frame.picture);
    for (const [picture, bitmap] of this.bitmaps)
      if (!due.includes(picture)) {
        bitmap?.close();
        this.bitmaps.delete(picture);
      }
    for (const picture of due) if (!this.bitmaps.has(picture)) this.#decode(picture);
    const bitmap = due.length ? this.bitmaps.get(due[0]) : null;
    if (!bitmap || this.drawn === due[0]) return; // the previous picture stays until this one is decoded
    const { canvas } = this.parts;
    if (canvas.width !== bitmap.width) canvas.width = bitmap.width;
    if (canvas.height !== bitmap.height) canvas.height = bitmap.height;
    canvas.getContext("2d")?.drawImage(bitmap, 0, 0);
    this.drawn = due[0];
  }

  /** @param {Blob} picture */
  #decode(picture) {
    this.bitmaps.set(picture, null);
    createImageBitmap(picture).then(
      (bitmap) => {
        if (this.disposed || !this.bitmaps.has(picture)) return bitmap.close(); // no longer due
        this.bitmaps.get(picture)?.close();
        this.bitmaps.set(picture, bitmap);
        if (!this.playback.moving) this.#refresh();
      },
      () => {}, // it was decoded once; if memory is short now, the picture before it stays
    );
  }

  #controls() {
    const { playback, parts } = this;
    const { message } = playback;
    const running = message !== null && !playback.over;
    const held = running && message.state === "held";
    const shown = playback.shown();
    this.#playButton(playback.playing ? "pause" : "play");
    parts.play.disabled = parts.scrub.disabled = !playback.length;
    parts.stop.disabled = !running;
    parts.loop.setAttribute("aria-pressed", String(playback.loop));
    parts.hint.hidden = this.drawn !== undefined;
    parts.hint.textContent = running ? "The first chunk is being made." : "The video plays here while it is made.";
    parts.scrub.min = String(playback.first);
    parts.scrub.max = String(Math.max(playback.end - 1, playback.first));
    if (!this.dragging) parts.scrub.value = String(shown ?? 0);
    parts.place.textContent = shown === null ? "" : `${shown + 1} / ${message?.numFrames || playback.end}`;
    parts.text.textContent = this.note || this.told;
    this.#words(this.#told());
    parts.steering.hidden = !running;
    const canPrompt = message?.canPrompt ?? false;
    parts.prompt.disabled = parts.send.disabled = parts.history.disabled = !canPrompt;
    parts.send.title = canPrompt ? "The next chunk follows this prompt (Enter)." : NO_TEXT;
    parts.prompt.title = canPrompt ? "A prompt for what comes next; Enter sends it." : NO_TEXT;
    parts.hold.disabled = held;
    parts.reroll.disabled = !held;
  }

  /** @param {"play" | "pause"} action what a click will do */
  #playButton(action) {
    const { play } = this.parts;
    const title = action === "play" ? "Play" : "Pause";
    if (play.title === title && play.dataset.action === action) return; // an open tooltip would close
    Object.assign(play, { title, ariaLabel: title }).dataset.action = action;
    play.replaceChildren(icon(action));
  }

  /** The status line's parts, each with the sentence that explains it. @returns {[string, string][]} */
  #told() {
    const { playback } = this;
    const { message } = playback;
    if (!message) return [];
    const { fps, firstFrameSeconds, realTime, shareOfLimit } = message.stats;
    /** @type {[string, string][]} */
    const told = [];
    if (playback.over && (message.state !== "done" || message.chunk < message.numChunks)) told.push(["stopped", "The run ended before the video was whole."]);
    else if (message.state === "held") told.push(["held", "The run waits for Go on or Re-roll."]);
    else if (playback.waiting && playback.playing)
      told.push(["waiting", "All that was received has been shown; it goes on with the next chunk."]);
    told.push([
      `chunk ${message.chunk} of ${message.numChunks || "?"}`,
      "Chunks finished: the parts of the video that are made one after the other.",
    ]);
    if (fps !== null) told.push([`${fps.toFixed(1)} FPS generated`, "Video frames made per second."]);
    if (firstFrameSeconds !== null)
      told.push([`first frame ${firstFrameSeconds.toFixed(1)} s`, "From the start of the run to its first picture."]);
    if (realTime !== null)
      told.push([
        `${Math.round(realTime * 100)} % of real time`,
        `Speed of making over speed of playing (${message.fps} frames per second); from 100 % on it never waits.`,
      ]);
    if (shareOfLimit !== null)
      told.push([
        `${Math.round(shareOfLimit * 100)} % of the limit`,
        "Of the frames per second that this device can reach at most: its own speed of products and copies, measured once.",
      ]);
    return told;
  }

  /** @param {[string, string][]} told */
  #words(told) {
    const text = told.map(([words]) => words).join(" · ");
    if (text === this.parts.status.textContent) return;
    this.parts.status.replaceChildren(
      ...told.flatMap(([words, title], place) => [place ? " · " : "", make("span", { title }, words)]),
    );
  }
}
