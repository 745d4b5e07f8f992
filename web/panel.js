/** The player's box on the page: the picture, the line below it, what plays it, and the desk. No import of ComfyUI. */

import { Desk } from "./desk.js";
import { IconButton, box, clock, explain, make } from "./elements.js";
import { Film } from "./film.js";
import { Playback } from "./playback.js";
import { Timeline } from "./timeline.js";
import { ESTIMATE, NO_RUN, sayFigures, sayStatus } from "./words.js";

/** @typedef {import("./desk.js").Command} Command */
/** @typedef {import("./playback.js").Message} Message */
/** @typedef {import("./playback.js").SavedFile} SavedFile */
/**
 * @typedef {object} Host what the panel asks of ComfyUI
 * @property {(body: object) => Promise<Response>} post to the server's half of the player
 * @property {(promptId: string) => unknown} interrupt stop the prompt that is being executed
 * @property {(file: SavedFile) => string} address where the server gives a file out
 * @property {() => unknown} resized the player needs another height
 */

const LOOK_AHEAD = 6; // bitmaps held: enough to hide a decoder's hiccup; each takes the size of a raw frame
const REPORT_MS = 500; // between two reports of the frame on screen
const STILL_MS = 2000; // between two of the same frame: a run that keeps its pace does not wait for a silent page
const TALLEST = 560; // pixels of the picture: a narrow node with an upright video would grow out of the page
const LIST_HEIGHT = 110; // pixels of the list of what was sent, with its heading; more where the node has room
const IDLE = "The video plays here while it is made.";
const FIRST = "The first chunk is being made.";

/** The parts that the panel itself moves. */
function build() {
  return {
    canvas: make("canvas", { class: "selfforcing-canvas" }),
    hint: box("hint"),
    figures: make("dl", { class: "selfforcing-figures", "data-role": "figures", "data-capture-wheel": "true" }),
    play: new IconButton("play", "play", "Play"),
    loop: new IconButton("loop", "loop", "Loop: start again at the end, when the run is over."),
    sound: new IconButton("sound", "silent", "Sound"),
    info: new IconButton("info", "figures", "Figures of this run"),
    full: new IconButton("full", "full", "Full screen"),
    place: make("span", { class: "selfforcing-place", "data-role": "place" }),
    status: make("div", { class: "selfforcing-status", "data-role": "status" }),
    text: make("span", { "data-role": "message" }),
    files: make("span", { "data-role": "files" }),
    error: make("span", { class: "selfforcing-error", "data-role": "error", role: "alert" }),
  };
}

/** One player: owns its element, its frames and its animation frame; dispose() lets go of all. */
export class Panel {
  playback = new Playback();
  /** @type {Film | null} the written file, once the run is over and the browser can play it */
  film = null;
  former = ""; // the run before; its late messages are not a new run
  /** Messages are handled one after the other, each when the pictures of the one before are decoded. */
  queue = Promise.resolve();
  /** @type {Map<Blob, ImageBitmap | null>} the pictures due next; null: being decoded */
  bitmaps = new Map();
  /** @type {Blob | Film | undefined} what the picture on the canvas is of */
  drawn;
  animation = 0;
  disposed = false;
  note = ""; // what the user's last action led to; gone with the next chunk
  serverLine = ""; // the server's last line; it comes in one message only
  estimate = ""; // its line of what the run will take
  /** @type {SavedFile[]} */
  files = [];
  canReport = true; // servers of earlier versions do not know what is done with it
  reported = { frame: -1, at: -Infinity };
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  reporting;
  ratio = 0;
  fps = 16; // of the files
  /** @type {Film | undefined} the file that was gone on in */
  entered;
  parts = build();

  /** @param {Host} host @param {string} sheet address of player.css */
  constructor(host, sheet) {
    this.host = host;
    this.timeline = new Timeline((frame) => this.#seek(frame));
    this.desk = new Desk({
      act: (command, done) => this.#act(command, done),
      fail: (error) => this.#fail(error),
      stop: () => this.#try(async () => this.host.interrupt(this.playback.message?.promptId ?? "")),
      seek: (frame) => this.#seek(frame),
    });
    const { canvas, hint, figures, play, loop, sound, info, full, place, status, text, files, error } = this.parts;
    this.screen = box("screen", canvas, hint, figures);
    const keys = box("row", play.element, loop.element, sound.element, place, box("gap"), info.element, full.element);
    const words = box("words", status, box("note", text, files, error));
    this.stack = box("stack", this.screen, this.timeline.element, keys, words, this.desk.controls);
    // The sheet lies in the player itself: nothing of the page that is not its own is touched.
    const link = make("link", { rel: "stylesheet", href: sheet });
    this.element = box("player", link, this.stack, this.desk.log);
    this.observer = typeof ResizeObserver === "undefined" ? null : new ResizeObserver(() => this.host.resized());
    this.observer?.observe(this.stack);
    figures.hidden = true;
    this.setSize(16, 9);
    this.#listen();
    this.#refresh();
  }

  /** The run that is watched can still be steered. */
  get running() {
    return this.playback.message !== null && !this.playback.over;
  }

  /** Whether there is neither a run nor a file. */
  get isEmpty() {
    return this.playback.message === null && !this.film;
  }

  /** What gives the picture. */
  get source() {
    return this.film?.isReady ? this.film : this.playback;
  }

  /** The pixels that the player needs in a node where it is `width` wide. @param {number} width */
  minHeight(width) {
    const rest = this.stack.offsetHeight - this.screen.offsetHeight;
    const list = this.desk.log.hidden ? 0 : LIST_HEIGHT;
    return Math.ceil(Math.min(width / this.ratio, TALLEST) + (rest > 0 ? rest : 190) + list);
  }

  /** The picture's ratio. @param {number} width @param {number} height in whatever unit */
  setSize(width, height) {
    if (!(width > 0 && height > 0)) return;
    const ratio = width / height;
    if (ratio === this.ratio) return;
    this.ratio = ratio;
    this.screen.style.setProperty("--selfforcing-ratio", String(ratio));
    this.host.resized();
  }

  #listen() {
    const { play, loop, sound, info, full, figures } = this.parts;
    play.element.onclick = this.screen.onclick = () => this.#playOrPause();
    loop.element.onclick = () => ((this.source.loop = !this.source.loop), this.#refresh());
    sound.element.onclick = () => this.film && (this.film.element.muted = !this.film.element.muted);
    info.element.onclick = () => ((figures.hidden = !figures.hidden), this.#refresh());
    figures.onclick = (event) => event.stopPropagation();
    full.element.onclick = this.screen.ondblclick = () => this.#try(() => this.#fullScreen());
    this.element.addEventListener("fullscreenchange", () => this.#refresh());
    // The canvas below has shortcuts on plain keys and drags nodes; what is meant for a control ends here.
    for (const type of ["keydown", "keyup", "keypress", "pointerdown", "mousedown", "dblclick", "copy", "paste", "cut"])
      this.element.addEventListener(type, (event) => {
        const control = event.target instanceof Element && event.target.closest("input, textarea, select, button, label, a");
        const shortcut = event instanceof KeyboardEvent && control instanceof HTMLButtonElement;
        if (control && !(shortcut && ![" ", "Enter"].includes(event.key))) event.stopPropagation();
      });
    this.element.addEventListener("wheel", (event) => this.#keepWheel(event));
  }

  /**
   * A list that can be scrolled and a field that counts take the wheel; elsewhere it is the canvas' own.
   * @param {WheelEvent} event
   */
  #keepWheel(event) {
    const taker =
      event.target instanceof Element && event.target.closest(".selfforcing-scroll, dl, textarea, input[type=number]");
    if (!taker || event.ctrlKey) return;
    if (taker.scrollHeight > taker.clientHeight || taker === document.activeElement) event.stopPropagation();
  }

  #playOrPause() {
    if (this.source.playing) this.source.pause();
    else this.source.play();
    this.#refresh();
  }

  async #fullScreen() {
    if (document.fullscreenElement === this.element) await document.exitFullscreen();
    else await this.element.requestFullscreen();
  }

  /** @param {number} frame */
  #seek(frame) {
    this.source.seek(frame);
    this.#refresh();
  }

  // ------------------------------------------------------- from the server --
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
    this.#acknowledge(message);
    if (message.run === this.former) return;
    if (message.run !== this.playback.run) this.#begin(message.run);
    const last = this.playback.message;
    if (last?.chunk !== message.chunk || last.state !== message.state) this.note = "";
    this.#hear(message.text);
    this.desk.receive(message);
    this.playback.receive(message, frames);
    if (message.files.length) this.showFiles(message.files, message.fps);
    this.#refresh();
  }

  /** @param {string} text the server's line for the user, or "" */
  #hear(text) {
    if (ESTIMATE.test(text)) this.estimate = text;
    else if (text) [this.serverLine, this.note] = [text, ""];
  }

  /** A lost answer needs no words: the server sends less, and the next one makes up for it. @param {Message} message */
  #acknowledge({ run, number }) {
    if (number === null) return;
    const shown = run === this.playback.run ? this.playback.shown() : null;
    this.#post({ run, action: "ack", number, ...(shown === null ? {} : { shown }) }).catch(() => {});
  }

  /** @param {string} run */
  #begin(run) {
    this.former = this.playback.run;
    const { loop } = this.source;
    this.#leaveFilm();
    this.#clear();
    this.playback = Object.assign(new Playback(run), { loop });
    this.desk.begin();
    this.files = [];
    this.reported = { frame: -1, at: -Infinity };
    this.#fail("");
    this.serverLine = this.estimate = "";
  }

  /** ComfyUI says that the prompt ended, in whatever way. @param {unknown} promptId */
  finish(promptId) {
    // In the queue, for messages that came before may still be decoding.
    this.queue = this.queue.then(() => {
      if (this.disposed || !promptId || this.playback.message?.promptId !== promptId) return;
      this.playback.finish();
      this.#openFilm();
      this.#refresh();
    });
  }

  /**
   * Name the files of the run and, when it is over, play the first of them, which has every frame.
   * @param {SavedFile[]} files
   * @param {number} fps
   */
  showFiles(files, fps) {
    if (this.disposed || !files.length) return;
    this.files = files;
    this.fps = fps > 0 ? fps : this.fps;
    this.#openFilm();
    this.#refresh();
  }

  #openFilm() {
    if (this.running || !this.files.length) return;
    const url = this.host.address(this.files[0]);
    if (this.film?.url === url) return;
    this.#leaveFilm();
    // Where the browser cannot play the file, the frames that were received stay.
    this.film = new Film(url, this.fps, () => (this.film?.isReady ? this.#enterFilm(this.film) : undefined));
  }

  /** Go on in the file where the frames are. @param {Film} film */
  #enterFilm(film) {
    if (this.entered !== film) {
      this.entered = film;
      const { playback } = this;
      film.loop = playback.loop;
      this.setSize(film.element.videoWidth, film.element.videoHeight);
      film.seek(playback.ended ? film.end - 1 : playback.position);
      if (playback.playing && playback.length) film.play();
    }
    this.#refresh();
  }

  #leaveFilm() {
    this.film?.dispose();
    this.film = null;
  }

  dispose() {
    this.disposed = true;
    cancelAnimationFrame(this.animation);
    clearTimeout(this.reporting);
    this.observer?.disconnect();
    this.#leaveFilm();
    for (const bitmap of this.bitmaps.values()) bitmap?.close();
    this.bitmaps.clear();
    this.playback = new Playback(); // ComfyUI may keep the element
  }

  // ------------------------------------------------------------ to the server --
  /** @param {{run: string} & Command} body @returns {Promise<string>} error or "" */
  async #post(body) {
    const answer = await this.host.post(body);
    if (answer.ok) return "";
    const reply = await answer.json().catch(() => null);
    const reason = typeof reply?.error === "string" && reply.error;
    if (answer.status === 404 && reason && body.run === this.playback.run) {
      this.playback.finish(); // the run is over
      this.#refresh();
    }
    return reason || `The server answered ${answer.status} ${answer.statusText}`;
  }

  /**
   * @param {Command} command
   * @param {string} done what to say when it is accepted
   * @returns {Promise<boolean>} whether it is
   */
  async #act(command, done) {
    let isTaken = false;
    await this.#try(async () => {
      const error = await this.#post({ run: this.playback.run, ...command });
      isTaken = !error;
      this.#fail(error);
      if (isTaken) [this.note, this.serverLine] = [done, ""];
      this.#refresh();
    });
    return isTaken;
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

  /** Tell the server which frame is on screen: it waits where too much is made ahead. */
  #report() {
    clearTimeout(this.reporting);
    const frame = this.playback.shown();
    if (!this.canReport || !this.running || frame === null || !this.element.isConnected) return;
    const pause = frame === this.reported.frame ? STILL_MS : REPORT_MS;
    const rest = this.reported.at + pause - performance.now();
    if (rest > 0) {
      this.reporting = setTimeout(() => this.#report(), rest); // also when the picture stands still by then
      return;
    }
    this.reported = { frame, at: performance.now() };
    this.reporting = setTimeout(() => this.#report(), STILL_MS);
    const refused = /** @param {string} error */ (error) => {
      if (/^action 'shown' is unknown/.test(error)) this.canReport = false;
    };
    this.#post({ run: this.playback.run, action: "shown", frame }).then(refused, () => {});
  }

  // -------------------------------------------------------------- to the page --
  /** Draw what is due now, and again on the page's next frame while the video moves. */
  #refresh() {
    if (this.disposed) return;
    cancelAnimationFrame(this.animation);
    const { source, timeline } = this;
    if (!timeline.isDragged) source.tick(performance.now());
    if (source instanceof Film) this.#drawFilm(source);
    else this.#drawFrames();
    this.#report();
    this.#controls();
    if (source.moving && !timeline.isDragged) this.animation = requestAnimationFrame(() => this.#refresh());
  }

  /** @param {Film} film */
  #drawFilm(film) {
    this.#paint(film.element, film.element.videoWidth, film.element.videoHeight);
    this.drawn = film;
  }

  #drawFrames() {
    const due = this.playback.ahead(LOOK_AHEAD).map((frame) => frame.picture);
    for (const [picture, bitmap] of this.bitmaps)
      if (!due.includes(picture)) {
        bitmap?.close();
        this.bitmaps.delete(picture);
      }
    for (const picture of due) if (!this.bitmaps.has(picture)) this.#decode(picture);
    const bitmap = due.length ? this.bitmaps.get(due[0]) : null;
    if (!bitmap || this.drawn === due[0]) return; // the previous picture stays until this one is decoded
    this.setSize(bitmap.width, bitmap.height);
    this.#paint(bitmap, bitmap.width, bitmap.height);
    this.drawn = due[0];
  }

  /** @param {CanvasImageSource} picture @param {number} width @param {number} height */
  #paint(picture, width, height) {
    const { canvas } = this.parts;
    if (canvas.width !== width) canvas.width = width;
    if (canvas.height !== height) canvas.height = height;
    canvas.getContext("2d")?.drawImage(picture, 0, 0);
  }

  /** No picture, as before the first run: that of another one would be taken for this one's. */
  #clear() {
    const { canvas } = this.parts;
    this.drawn = undefined;
    canvas.getContext("2d")?.clearRect(0, 0, canvas.width, canvas.height);
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
    const { source, parts, desk, running } = this;
    const { message } = this.playback;
    const marks = desk.events;
    const { first, end, total, position } = source;
    const fps = source instanceof Film ? source.fps : (message?.fps ?? 16);
    this.timeline.draw({ first, end, total, position, fps, marks });
    this.#keys(fps);
    parts.hint.hidden = this.drawn !== undefined;
    parts.hint.textContent = running ? FIRST : IDLE;
    parts.text.textContent = this.note || this.serverLine;
    this.#sayFiles();
    this.#say(parts.status, this.#status());
    if (!parts.figures.hidden) this.#sayFigures();
    desk.update(message, running);
  }

  /** @param {number} fps */
  #keys(fps) {
    const { source, parts, film } = this;
    const { play, loop, sound, info, full, place } = parts;
    const plays = source.playing && source.length > 0;
    play.show(plays ? "pause" : "play", plays ? "Pause" : "Play");
    play.element.dataset.action = plays ? "pause" : "play";
    play.element.disabled = !source.length;
    loop.element.setAttribute("aria-pressed", String(source.loop));
    info.element.setAttribute("aria-pressed", String(!parts.figures.hidden));
    sound.element.hidden = !film?.isReady;
    if (film) sound.show(film.element.muted ? "silent" : "sound", film.element.muted ? "Sound on" : "Sound off");
    full.show("full", document.fullscreenElement === this.element ? "Leave full screen" : "Full screen");
    const shown = source.shown();
    place.textContent = shown === null ? "" : `${clock(source.position / fps)} / ${clock(source.total / fps)}`;
    explain(place, shown === null ? "" : `Frame ${shown + 1} of ${source.total}`);
  }

  /** @param {HTMLElement} line @param {[string, string][]} entries words, each with the sentence that explains them */
  #say(line, entries) {
    const text = entries.map(([words]) => words).join(" · ");
    if (text === line.textContent) return;
    line.replaceChildren(
      ...entries.flatMap(([words, title], place) => [place ? " · " : "", make("span", { title }, words)]),
    );
  }

  #sayFiles() {
    const { files } = this.parts;
    const [named, key] = [this.running ? [] : this.files, JSON.stringify(this.running ? [] : this.files)];
    if (files.dataset.key === key) return;
    files.dataset.key = key;
    const links = named.map((file) => {
      const path = [file.subfolder, file.filename].filter(Boolean).join("/");
      const href = this.host.address(file);
      return make("a", { href, target: "_blank", rel: "noopener", title: `Open ${file.type}/${path}` }, file.filename);
    });
    files.replaceChildren(...links.flatMap((link, place) => [place ? ", " : "File: ", link]));
  }

  /** @returns {import("./words.js").Phrase[]} */
  #status() {
    const { over, started, waiting, playing, end, position, message } = this.playback;
    if (!message) return this.film ? [] : [NO_RUN];
    const { isHoldAsked, isFinishAsked } = this.desk;
    const secondsAhead = started && !waiting ? Math.max(end - position, 0) / message.fps : null;
    return sayStatus(message, { over, isDry: waiting && playing, secondsAhead, isHoldAsked, isFinishAsked });
  }

  #sayFigures() {
    const { figures } = this.parts;
    const entries = sayFigures(this.playback.message, this.estimate);
    const key = JSON.stringify(entries);
    if (figures.dataset.key === key) return;
    figures.dataset.key = key;
    const rows = entries.flatMap(([name, value, title]) => [make("dt", { title }, name), make("dd", { title }, value)]);
    figures.replaceChildren(...rows);
  }
}
