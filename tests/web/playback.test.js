/** Promises of the player's logic: node --test tests/web/playback.test.js */

import assert from "node:assert/strict";
import test from "node:test";

import { MAX_FRAMES, Playback, readMessage } from "../../web/playback.js";

const JPEG = btoa("picture");

/** A message as the server sends it, with frames from `first` up to and without `end`. */
function sent(first, end, more = {}) {
  const indices = Array.from({ length: end - first }, (_, place) => first + place);
  return {
    run: "a1", prompt_id: "p", node: "5", number: 0, state: "sampling", chunk: 1, num_chunks: 3, num_frames: 33,
    fps: 16, indices, jpegs: indices.map(() => JPEG), again: false, can_prompt: true, message: "",
    stats: { fps: 12.3, first_frame_seconds: 0.81, real_time: 0.77, share_of_limit: 0.3 }, ...more,
  };
}

function receive(playback, ...message) {
  playback.receive(readMessage(sent(...message)));
}

/** Read the clock every 1/64 s from `from` seconds on; the frames shown. */
function watch(playback, from, seconds) {
  const ticks = Array.from({ length: seconds * 64 + 1 }, (_, place) => (from + place / 64) * 1000);
  return [...new Set(ticks.map((now) => playback.tick(now)))];
}

function numbers(first, end) {
  return Array.from({ length: end - first }, (_, place) => first + place);
}

test("frames are shown in order on the content's clock", () => {
  const playback = new Playback("a1");
  receive(playback, 0, 9, { num_frames: 81, fps: 8 });
  assert.deepEqual(watch(playback, 100, 1), numbers(0, 9));
  assert.equal(playback.position, 8);
});

test("playing starts when the first chunk is there, not at its first frames", () => {
  const playback = new Playback("a1");
  receive(playback, 0, 4, { chunk: 0 });
  watch(playback, 0, 2);
  assert.deepEqual([playback.started, playback.waiting, playback.position], [false, true, 0]);
  receive(playback, 4, 9);
  assert.deepEqual(watch(playback, 2, 0.5), numbers(0, 9));
});

test("a dry buffer is waited out on the spot and playing goes on by itself without a leap", () => {
  const playback = new Playback("a1");
  receive(playback, 0, 4);
  assert.deepEqual(watch(playback, 0, 10), [0, 1, 2, 3]);
  assert.deepEqual([playback.waiting, playback.playing, playback.position], [true, true, 4]);
  receive(playback, 4, 12, { chunk: 2 });
  assert.equal(playback.waiting, false);
  assert.deepEqual(watch(playback, 60, 0.25), [4, 5, 6, 7, 8]);
});

test("the clock stands while nobody looks", () => {
  const playback = new Playback("a1");
  receive(playback, 0, 33);
  playback.tick(0);
  playback.tick(3_600_000);
  assert.equal(playback.position, 4); // a quarter of a second
  playback.tick(0); // a clock set back
  assert.equal(playback.position, 4);
});

test("a dropped frame's time is filled with the picture before it", () => {
  const playback = new Playback("a1");
  receive(playback, 0, 0, { indices: [0, 1, 4, 5], jpegs: [JPEG, JPEG, JPEG, JPEG] });
  const shown = [];
  for (let now = 0; now <= 5 / 16; now += 1 / 16) shown.push(playback.tick(now * 1000));
  assert.deepEqual(shown, [0, 1, 1, 1, 4, 5]);
});

test("a page that joins a run late starts at the first frame it gets", () => {
  const playback = new Playback("a1");
  receive(playback, 21, 33, { chunk: 3 });
  assert.equal(playback.tick(0), 21);
  assert.equal(playback.first, 21);
});

test("a chunk that is rolled again replaces the old one, also where it has fewer frames", () => {
  const playback = new Playback("a1");
  receive(playback, 0, 21, { chunk: 2 });
  watch(playback, 0, 5);
  receive(playback, 9, 15, { again: true, chunk: 2, jpegs: numbers(9, 15).map(() => btoa("new")) });
  assert.deepEqual([playback.end, playback.position, playback.waiting], [15, 9, false]);
  assert.deepEqual(watch(playback, 6, 1), numbers(9, 15));
  playback.seek(8);
  assert.deepEqual(playback.ahead(2).map((frame) => frame.picture.size), [7, 3]);
});

test("a chunk that is rolled again does not move a viewer who is before it", () => {
  const playback = new Playback("a1");
  receive(playback, 0, 21, { chunk: 2 });
  playback.pause();
  playback.seek(3);
  receive(playback, 9, 21, { again: true, chunk: 2 });
  assert.equal(playback.position, 3);
});

test("a video at its end stops, starts over on play, and loops where that is wished", () => {
  const playback = new Playback("a1");
  receive(playback, 0, 4, { state: "done" });
  watch(playback, 0, 1);
  assert.deepEqual([playback.playing, playback.shown()], [false, 3]);
  playback.play();
  assert.equal(playback.tick(0), 0);
  playback.loop = true;
  watch(playback, 0, 2);
  assert.deepEqual([playback.playing, playback.moving], [true, true]);
});

test("the time of frames that were left out at the end is shown too, so a whole video ends at its length", () => {
  const playback = new Playback("a1");
  receive(playback, 0, 0, { indices: [0, 2, 4, 6], jpegs: [JPEG, JPEG, JPEG, JPEG], num_frames: 9, chunk: 2 });
  assert.deepEqual([playback.end, playback.total], [7, 9]);
  receive(playback, 0, 0, { state: "done", chunk: 3, num_frames: 9 });
  assert.deepEqual(watch(playback, 0, 2), [0, 2, 4, 6]);
  assert.deepEqual([playback.position, playback.total, playback.playing], [9, 9, false]);
});

test("a run that ended early is as long as what was made", () => {
  const playback = new Playback("a1");
  receive(playback, 0, 21, { state: "done", ending: "early", chunk: 2 });
  assert.deepEqual([playback.end, playback.total], [21, 21]);
});

test("a last message without frames ends the wait", () => {
  const playback = new Playback("a1");
  receive(playback, 0, 4);
  watch(playback, 0, 1);
  receive(playback, 0, 0, { state: "done" });
  watch(playback, 1, 1);
  assert.deepEqual([playback.waiting, playback.playing], [false, false]);
});

test("frames that come after the end of the run are still played, unless the viewer paused", () => {
  const playback = new Playback("a1");
  receive(playback, 0, 4, { state: "done" });
  watch(playback, 0, 1);
  receive(playback, 4, 8, { state: "done" });
  assert.deepEqual(watch(playback, 1, 1), [4, 5, 6, 7]);
  playback.pause();
  receive(playback, 8, 12, { state: "done" });
  assert.equal(playback.playing, false);
});

test("pause keeps the place and seek stays within what was received", () => {
  const playback = new Playback("a1");
  receive(playback, 9, 21);
  playback.pause();
  watch(playback, 0, 1);
  assert.equal(playback.shown(), 9);
  for (const [wish, shown] of [[-5, 9], [12, 12], [1e9, 20], [NaN, 20], [Infinity, 20]]) {
    playback.seek(wish);
    assert.equal(playback.shown(), shown);
  }
});

test("the oldest frames beyond the bound are dropped and a viewer who was there moves on", () => {
  const playback = new Playback("a1");
  playback.pause();
  for (let first = 0; first < 2400; first += 12) receive(playback, first, first + 12, { num_frames: 0 });
  assert.deepEqual([playback.length, playback.first, playback.end], [MAX_FRAMES, 400, 2400]);
  assert.equal(playback.tick(0), 400);
});

test("frames out of order and sent twice are kept once and in order", () => {
  const playback = new Playback("a1");
  for (const first of [6, 3, 0, 3]) receive(playback, first, first + 3);
  assert.deepEqual(playback.ahead(20).map((frame) => frame.index), numbers(6, 9));
  playback.seek(0);
  assert.deepEqual(playback.ahead(20).map((frame) => frame.index), numbers(0, 9));
});

test("a run that ended without a last message can be watched and waits for nothing", () => {
  const playback = new Playback("a1");
  receive(playback, 0, 4, { chunk: 0 });
  playback.finish();
  assert.deepEqual(watch(playback, 0, 1), [0, 1, 2, 3]);
  assert.deepEqual([playback.waiting, playback.playing], [false, false]);
});

test("every field of a message is read", () => {
  const event = { kind: "prompt", chunk: 2, frame: 21, seconds: 1.3125, text: "rain", history: "keep", seed: 7 };
  const file = { filename: "a_00001_.mp4", subfolder: "video", type: "output" };
  const more = {
    node: 7, workflow: "w", tab: "t", again: true, number: 4, message: "hello", state: "done", ending: "early",
    ahead: 2.1, pace: 2, events: [event], schedule: "0: rain", files: [file], can_finish: true,
  };
  const message = readMessage(sent(0, 2, more));
  const { frames, ...rest } = message;
  assert.deepEqual(rest, {
    run: "a1", promptId: "p", node: "7", workflow: "w", tab: "t", number: 4, state: "done", ending: "early", chunk: 1,
    numChunks: 3, numFrames: 33, fps: 16, again: 0, ahead: 2.1, pace: 2, events: [event], schedule: "0: rain",
    files: [file], canFinish: true, stats: { fps: 12.3, firstFrameSeconds: 0.81, realTime: 0.77, shareOfLimit: 0.3 },
    canPrompt: true, text: "hello",
  });
  assert.deepEqual(frames.map((frame) => [frame.index, frame.picture.size, frame.picture.type]), [
    [0, 7, "image/jpeg"], [1, 7, "image/jpeg"],
  ]);
});

test("a message without a run or a node is no message", () => {
  for (const detail of [undefined, null, 3, "run", [], {}, { run: "a" }, { node: "5" }, { run: 3, node: "5" }])
    assert.equal(readMessage(detail), null);
  for (const node of ["", null, {}, ["5"]]) assert.equal(readMessage(sent(0, 1, { node })), null);
});

test("wrong fields become defaults and only whole frames with a valid number are taken", () => {
  const message = readMessage({
    run: "a", node: "5", number: -1, state: "?", chunk: 1e300, num_chunks: "7", num_frames: 10, fps: -3, stats: 4,
    again: 1, ending: "so", ahead: "2", pace: -1, schedule: 7, can_finish: 1,
    events: [3, null, { kind: "else", frame: 1 }, { kind: "seed" }, { kind: "seed", frame: 4 }],
    files: [{}, "a.mp4", { filename: 3 }, { filename: "b.mp4" }],
    indices: [0, 1.5, -2, 10, "3", 4, 5, null],
    jpegs: [JPEG, JPEG, JPEG, JPEG, JPEG, "%%", 7],
  });
  assert.deepEqual(message.frames.map((frame) => frame.index), [0]);
  const { number, chunk, numChunks, fps, again } = message;
  assert.deepEqual([number, chunk, numChunks, fps, again], [null, 0, 0, 16, null]);
  const { ending, ahead, pace, events, files, schedule, canFinish } = message;
  assert.deepEqual([ending, ahead, pace, schedule, canFinish], [null, null, null, "", false]);
  const seed = { kind: "seed", chunk: 0, frame: 4, seconds: 0, text: "", history: "", seed: null };
  assert.deepEqual([events, files], [[seed], [{ filename: "b.mp4", subfolder: "", type: "output" }]]);
  assert.deepEqual(message.stats, { fps: null, firstFrameSeconds: null, realTime: null, shareOfLimit: null });
});

test("ten thousand random messages neither throw nor outgrow the bound", () => {
  let state = 7; // a linear congruential generator: the same messages every time
  const random = () => (state = (Math.imul(state, 1664525) + 1013904223) >>> 0) / 2 ** 32;
  const pick = (values) => values[Math.floor(random() * values.length)];
  const odd = [null, undefined, -1, 0, 1, 3.7, 1e9, NaN, Infinity, "", "5", JPEG, "%", [], {}, true, false];
  const playback = new Playback("a1", 50);
  for (let round = 0; round < 10_000; round++) {
    const first = Math.floor(random() * 1000);
    const message = sent(first, first + Math.floor(random() * 4), { again: random() < 0.1, num_frames: 0 });
    for (const name of Object.keys(message)) if (random() < 0.1) message[name] = pick(odd);
    if (random() < 0.2) message.indices = [pick(odd), pick(odd)];
    if (random() < 0.2) message.jpegs = [pick(odd), pick(odd)];
    const read = readMessage(message);
    if (read) playback.receive(read);
    const seek = () => playback.seek(random() * 1200 - 100);
    pick([seek, () => playback.play(), () => playback.pause(), () => {}, () => {}])();
    const shown = playback.tick(round * 20 * random());
    assert.ok(playback.length <= 50);
    assert.ok(shown === null ? playback.length === 0 : playback.first <= shown && shown < playback.end);
    assert.ok(Number.isFinite(playback.position) && playback.position >= 0);
    if (random() < 0.02) playback.over = false;
  }
});
