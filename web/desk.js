/** The director's desk below the video: the next prompt, hold and re-roll, the end, and the list of what was sent. */

import { box, button, clock, explain, make } from "./elements.js";
import { sayMark } from "./timeline.js";

/** @typedef {import("./playback.js").Happening} Happening */
/** @typedef {import("./playback.js").Message} Message */
/** @typedef {{action: string} & Record<string, unknown>} Command */
/** @typedef {{text: string, chunk: number}} Sent a prompt, and how many chunks there were when it was sent */
/**
 * @typedef {object} Orders what the desk does through the player
 * @property {(command: Command, done: string) => Promise<boolean>} act whether the server took it; `done` is said then
 * @property {(error: string) => unknown} fail say what is wrong
 * @property {() => unknown} stop
 * @property {(frame: number) => unknown} seek
 */

const MAX_SEED = Number.MAX_SAFE_INTEGER; // JSON numbers are exact up to here
const COMPARED = 100; // letters: the server shortens prompts in its events to 120
const NO_TEXT = "Nothing on the server can read a new prompt for this run; connect clip to the node.";
const FINISH = "End after this chunk and keep what was made: it goes on to the other nodes.";
const NO_FINISH = "This server cannot end a run early; restart it after an update.";
const COPY = "Copy as Prompt Schedule";
const AS_POLICY = "as the policy says";
/** What a new prompt may do to the frames so far, in the words of Prompt Schedule, with what each means. */
const HISTORIES = {
  recode: "The frames so far are read again under the new prompt, chunk by chunk.",
  keep: "The frames so far stay as they are; the change is slower.",
  recache: "The window is read again in one pass.",
  recache_sink: "The window is read again in one pass, its first frames as the sink.",
  flush: "All but the sink and the last frames are forgotten.",
  cut: "They are forgotten, and the next chunk stands far from them: a hard cut.",
};
const MAX_BLEND = 9999; // chunks; the server's bound
const HOLD = {
  held: "Held: click to go on.",
  asked: "Holds after this chunk; click to go on.",
  free: "Wait after the chunk that is being made.",
};
const NOT_RUNNING = "There is no run; queue the workflow to begin one.";

/** Whether an event is that of a prompt that was sent. @param {Happening} event @param {Sent} sent */
function isOf(event, sent) {
  return event.kind === "prompt" && event.text.slice(0, COMPARED) === sent.text.slice(0, COMPARED);
}

/**
 * The prompts that still wait for their chunk: a later one of them replaces those before it.
 * @param {Sent[]} sent
 * @param {Happening[]} news events that came since
 */
export function stillWaiting(sent, news) {
  const lastTaken = sent.map((each) => news.some((event) => isOf(event, each))).lastIndexOf(true);
  return sent.slice(lastTaken + 1);
}

/**
 * What is sent for a new prompt; without a history the run's cache policy says it.
 * @param {string} text
 * @param {string} history a word of HISTORIES; "": none
 * @param {string} blend chunks over which the prompt becomes this one; "": at once
 * @returns {Command | null} null for a blend that is no number of chunks
 */
export function promptCommand(text, history, blend) {
  const chunks = blend === "" ? 1 : Number(blend);
  if (!Number.isInteger(chunks) || chunks < 1 || chunks > MAX_BLEND) return null;
  return { action: "prompt", text, ...(history ? { history } : {}), ...(chunks > 1 ? { blend: chunks } : {}) };
}

/**
 * Copy text where the page may use the clipboard, and also where it may not.
 * @param {string} text
 * @param {HTMLElement} place
 */
async function copy(text, place) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const field = make("textarea", {}, text); // pages that are not served by https nor from this machine
  place.append(field);
  field.select();
  const isDone = document.execCommand("copy");
  field.remove();
  if (!isDone) throw new Error("The browser does not let this page copy.");
}

function build() {
  const history = make(
    "select",
    { "data-action": "history", "aria-label": "What becomes of the frames so far" },
    make("option", { value: "" }, AS_POLICY),
    ...Object.entries(HISTORIES).map(([word, meaning]) => make("option", { value: word, title: meaning }, word)),
  );
  return {
    prompt: make("textarea", {
      rows: "2",
      "data-action": "prompt-text",
      "aria-label": "Prompt",
      "data-capture-wheel": "true",
    }),
    history,
    blend: make("input", {
      type: "number",
      min: "1",
      max: String(MAX_BLEND),
      step: "1",
      "data-action": "blend",
      "aria-label": "Chunks of the blend",
      placeholder: "blend",
      title: "Chunks over which the prompt before becomes this one; empty: at once.",
    }),
    send: button("prompt", "", "Send"),
    hold: button("hold", "", "Hold"),
    goOn: button("go_on", "", "Go on"),
    reroll: button("reroll", "", "Re-roll"),
    seed: make("input", {
      type: "number",
      min: "0",
      max: String(MAX_SEED),
      step: "1",
      "data-action": "seed-value",
      "aria-label": "Seed",
      placeholder: "random",
      title: `A whole number from 0 to ${MAX_SEED}; empty: a new one each time.`,
    }),
    useSeed: button("seed", "", "Set seed"),
    stop: button("stop", "", "Stop"),
    finish: button("finish", "", "Finish here"),
    copy: button("copy", "Copy what was sent as text for the node Prompt Schedule: it repeats this run.", COPY),
    list: make("ol", { class: "selfforcing-list", "data-role": "sent" }),
  };
}

export class Desk {
  parts = build();
  /** @type {Sent[]} */
  sent = [];
  /** @type {Happening[]} */
  events = [];
  schedule = "";
  isHoldAsked = false;
  isRerolled = false; // the held chunk is being made again
  isFinishAsked = false;
  /** @type {Message | null} */
  message = null;
  running = false;
  #drawn = "";

  /** @param {Orders} orders */
  constructor(orders) {
    this.orders = orders;
    const { prompt, history, blend, send, hold, goOn, reroll, seed, useSeed, stop, finish, list } = this.parts;
    const write = box("write", prompt, box("row", history, blend, box("gap"), send));
    const takes = box("group", hold, goOn, reroll);
    const seeds = box("group", seed, useSeed);
    const ends = box("group", stop, finish);
    this.controls = box("desk", write, box("controls", takes, seeds, ends));
    this.log = box(
      "log",
      box("row", make("span", { class: "selfforcing-quiet" }, "Sent"), box("gap"), this.parts.copy),
      make("div", { class: "selfforcing-scroll", "data-capture-wheel": "true" }, list),
    );
    this.#listen();
    this.update(null, false);
  }

  #listen() {
    const { prompt, send, history, hold, goOn, reroll, useSeed, stop, finish } = this.parts;
    send.onclick = () => this.#sendPrompt();
    history.onchange = () => this.#draw();
    prompt.onkeydown = (event) => {
      // Enter also ends the composition of a character; that one sends nothing.
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.#sendPrompt();
    };
    hold.onclick = () => (this.isHoldAsked ? this.#goOn() : this.#hold());
    goOn.onclick = () => this.#goOn();
    reroll.onclick = () => this.#reroll();
    useSeed.onclick = () => this.#sendSeed("seed", "from the next chunk on");
    finish.onclick = () => this.#finish();
    stop.onclick = () => this.orders.stop();
    this.parts.copy.onclick = () => this.#copy();
  }

  /** Another run: nothing of the one before is left but what is being written. */
  begin() {
    this.sent = [];
    this.events = [];
    this.schedule = "";
    this.isHoldAsked = this.isRerolled = this.isFinishAsked = false;
  }

  /** @param {Message} message */
  receive(message) {
    if (message.events) {
      this.sent = stillWaiting(this.sent, message.events.slice(this.events.length));
      this.events = message.events;
    }
    if (message.schedule) this.schedule = message.schedule;
    if (message.state === "held") this.isHoldAsked = true;
    else if (this.message?.state === "held") this.isHoldAsked = this.isRerolled; // the other attempt is held as well
    if (message.state === "held") this.isRerolled = false;
    if (/^the prompt was not taken/.test(message.text)) this.#giveBack(this.sent.at(-1));
  }

  /** A prompt that was not taken returns to the field, unless another is in it. @param {Sent} [refused] */
  #giveBack(refused) {
    this.sent = this.sent.filter((sent) => sent !== refused);
    if (refused && !this.parts.prompt.value) this.parts.prompt.value = refused.text;
    this.#draw();
  }

  // ------------------------------------------------------------------- orders --
  async #sendPrompt() {
    const { prompt, history, blend } = this.parts;
    const text = prompt.value.trim();
    if (!text) return this.orders.fail("The prompt is empty; write what happens next.");
    const command = blend.validity.badInput ? null : promptCommand(text, history.value, blend.value);
    if (!command) return this.orders.fail(`A blend is a whole number of chunks from 1 to ${MAX_BLEND}.`);
    const sent = { text, chunk: this.message?.chunk ?? 0 };
    this.sent = [...this.sent, sent]; // at once: the chunk that follows it may be quicker than the answer
    prompt.value = "";
    this.#draw();
    if (!(await this.orders.act(command, "Prompt sent; the next chunk follows it."))) this.#giveBack(sent);
  }

  async #hold() {
    this.isHoldAsked = await this.orders.act({ action: "hold" }, "");
    this.#draw();
  }

  async #goOn() {
    if (await this.orders.act({ action: "go_on" }, "")) this.isHoldAsked = false;
    this.#draw();
  }

  async #reroll() {
    this.isRerolled = true;
    this.isRerolled = (await this.#sendSeed("reroll", "for the last chunk once more")) === true;
  }

  async #finish() {
    this.isFinishAsked = await this.orders.act({ action: "finish" }, "");
    this.#draw();
  }

  /** @param {"seed" | "reroll"} action @param {string} when */
  #sendSeed(action, when) {
    const { value, validity } = this.parts.seed;
    const seed = value === "" ? Math.floor(Math.random() * 2 ** 32) : Number(value);
    if (validity.badInput || !Number.isSafeInteger(seed) || seed < 0)
      return this.orders.fail(`A seed is a whole number from 0 to ${MAX_SEED}.`);
    return this.orders.act({ action, seed }, `Seed ${seed} ${when}.`);
  }

  async #copy() {
    const { copy: key } = this.parts;
    try {
      await copy(this.schedule, this.log);
      key.textContent = "Copied";
      setTimeout(() => (key.textContent = COPY), 1500);
    } catch (error) {
      this.orders.fail(error instanceof Error ? error.message : String(error));
    }
  }

  // ------------------------------------------------------------- to the page --
  /** @param {Message | null} message the newest one @param {boolean} running */
  update(message, running) {
    this.message = message;
    this.running = running;
    this.#draw();
  }

  #draw() {
    const { message, running } = this;
    const held = running && message?.state === "held";
    const waits = running && (held || this.isHoldAsked);
    this.#drawPrompt(running, message?.canPrompt ?? false);
    this.#drawTakes(running, held, waits);
    this.#drawEnds(running, message?.canFinish ?? false);
    this.#drawList();
  }

  /** @param {boolean} running @param {boolean} canPrompt */
  #drawPrompt(running, canPrompt) {
    const { prompt, send, history, blend } = this.parts;
    const why = !running ? NOT_RUNNING : canPrompt ? "" : NO_TEXT;
    prompt.disabled = running && !canPrompt; // the first prompt may be written before the run begins
    send.disabled = history.disabled = blend.disabled = why !== "";
    const meaning = Object.entries(HISTORIES).find(([word]) => word === history.value)?.[1];
    explain(history, `What becomes of the frames so far. ${meaning ?? "The model's cache policy says it."}`);
    prompt.placeholder = running && !canPrompt ? NO_TEXT : "What happens next";
    explain(prompt, why || "Enter sends; Shift and Enter begin a new line.");
    explain(send, why || "The next chunk follows this prompt (Enter).");
  }

  /** @param {boolean} running @param {boolean} held @param {boolean} waits */
  #drawTakes(running, held, waits) {
    const { hold, goOn, reroll, useSeed } = this.parts;
    hold.disabled = useSeed.disabled = !running;
    goOn.disabled = !waits;
    reroll.disabled = !held;
    hold.setAttribute("aria-pressed", String(waits));
    explain(hold, running ? HOLD[held ? "held" : waits ? "asked" : "free"] : NOT_RUNNING);
    explain(goOn, waits ? "Make the next chunk." : "Nothing is held.");
    explain(
      reroll,
      held ? "Make the last chunk once more, with this seed." : "Only while a chunk is held: press Hold first.",
    );
    explain(useSeed, running ? "Take this seed from the next chunk on." : NOT_RUNNING);
  }

  /** @param {boolean} running @param {boolean} canFinish */
  #drawEnds(running, canFinish) {
    const { stop, finish } = this.parts;
    stop.disabled = !running;
    finish.disabled = !running || !canFinish || this.isFinishAsked;
    finish.setAttribute("aria-busy", String(running && this.isFinishAsked));
    explain(stop, running ? "Interrupt the run and throw it away: nothing goes on to other nodes." : NOT_RUNNING);
    explain(finish, running ? (canFinish ? FINISH : NO_FINISH) : NOT_RUNNING);
  }

  #drawList() {
    const { list, copy: key } = this.parts;
    const fps = this.message?.fps ?? 16;
    const drawn = JSON.stringify([this.events, this.sent, fps]);
    this.log.hidden = !this.events.length && !this.sent.length;
    key.hidden = !this.schedule;
    if (drawn === this.#drawn) return;
    this.#drawn = drawn;
    const past = this.events.map((event) => this.#event(event, fps));
    const waiting = this.sent.map((sent) => this.#waiting(sent));
    list.replaceChildren(...[...past, ...waiting].map((entry) => make("li", {}, entry)));
  }

  /** @param {Happening} event @param {number} fps */
  #event(event, fps) {
    const title = `Chunk ${event.chunk + 1}: click to see it.`;
    const entry = this.#entry(clock(event.frame / fps), sayMark(event), title, event.kind);
    entry.onclick = () => this.orders.seek(event.frame);
    return entry;
  }

  /** @param {Sent} sent */
  #waiting({ text, chunk }) {
    const when = this.message?.events ? "next" : `chunk ${chunk + 1}`; // servers that tell nothing more
    return this.#entry(when, `Prompt: ${text}`, `Sent after chunk ${chunk}.`, "prompt");
  }

  /** @param {string} when @param {string} text @param {string} title @param {string} kind */
  #entry(when, text, title, kind) {
    const time = make("span", { class: "selfforcing-when" }, when);
    return make(
      "button",
      { type: "button", class: `selfforcing-entry selfforcing-${kind}`, title },
      time,
      make("span", {}, text),
    );
  }
}
