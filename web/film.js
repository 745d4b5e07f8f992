/** A written video file as the player's picture: with every frame, and sound where it has some. */

/**
 * Plays as `Playback` does: places are frames, counted from 0 at `fps`.
 */
export class Film {
  element = document.createElement("video");
  isReady = false;
  first = 0;
  over = true;
  waiting = false;
  #disposed = false;
  /** @type {number | null} where to go once the file is open */
  #wish = null;

  /**
   * @param {string} url
   * @param {number} fps
   * @param {() => void} onChange another picture is there to be drawn, or it plays or not
   */
  constructor(url, fps, onChange) {
    this.url = url;
    this.fps = fps;
    const { element } = this;
    Object.assign(element, { muted: true, playsInline: true, preload: "auto", src: url });
    element.addEventListener("loadeddata", () => this.#open(onChange));
    for (const type of ["seeked", "play", "pause", "ended", "volumechange"])
      element.addEventListener(type, () => !this.#disposed && this.isReady && onChange());
  }

  /** A file without a length, as one still being written, has no places to go to. @param {() => void} onChange */
  #open(onChange) {
    if (this.#disposed || this.isReady || !Number.isFinite(this.element.duration) || !this.element.videoWidth) return;
    this.isReady = true;
    if (this.#wish !== null) this.seek(this.#wish);
    onChange();
  }

  get end() {
    return this.isReady ? Math.max(Math.round(this.element.duration * this.fps), 1) : 0;
  }

  get total() {
    return this.end;
  }

  get length() {
    return this.end;
  }

  get position() {
    return this.element.ended ? this.end : Math.min(this.element.currentTime * this.fps, this.end);
  }

  get playing() {
    return !this.element.paused && !this.element.ended;
  }

  get moving() {
    return this.playing;
  }

  get loop() {
    return this.element.loop;
  }

  set loop(loop) {
    this.element.loop = loop;
  }

  /** @returns {number | null} the number of the frame on screen */
  shown() {
    // 1e-3 of a frame: currentTime is rounded, and may lie a little before the frame that it was set to.
    return this.isReady ? Math.min(Math.floor(this.position + 1e-3), this.end - 1) : null;
  }

  /** Its clock is the browser's. */
  tick() {
    return this.shown();
  }

  play() {
    this.element.play().catch(() => {}); // the browser may refuse until the page was clicked; it stays paused then
  }

  pause() {
    this.element.pause();
  }

  /** @param {number} index */
  seek(index) {
    if (!Number.isFinite(index)) return;
    this.#wish = index;
    // The middle of a frame's time is in it whatever the container rounds to.
    if (this.isReady) this.element.currentTime = (Math.min(Math.max(index, 0), this.end - 1) + 0.5) / this.fps;
  }

  dispose() {
    this.#disposed = true;
    this.element.pause();
    this.element.removeAttribute("src");
    this.element.load(); // lets go of the file
  }
}
