/** Promises of the desk and the line below the video: node --test tests/web/desk.test.js */

import assert from "node:assert/strict";
import test from "node:test";

import { promptCommand, stillWaiting } from "../../web/desk.js";
import { clock } from "../../web/elements.js";
import { nearestMark, placeOf } from "../../web/timeline.js";
import { sayStatus } from "../../web/words.js";

const PROMPT = { kind: "prompt", chunk: 0, seconds: 0, history: "keep", seed: null };
const prompt = (text, frame = 0) => ({ ...PROMPT, frame, text });

test("a sent prompt waits until its chunk is made, and those that it replaced go with it", () => {
  const sent = ["one", "two", "three"].map((text) => ({ text, chunk: 0 }));
  assert.deepEqual(stillWaiting(sent, []), sent);
  assert.deepEqual(stillWaiting(sent, [prompt("two")]), sent.slice(2));
  assert.deepEqual(stillWaiting(sent, [{ ...prompt("three"), kind: "seed" }]), sent);
});

test("a long prompt is known again by its beginning, which is all that the server tells", () => {
  const text = "a storm rises over the bay ".repeat(20);
  assert.deepEqual(stillWaiting([{ text, chunk: 0 }], [prompt(`${text.slice(0, 117)}...`)]), []);
});

test("a prompt leaves to the policy what nobody chose", () => {
  assert.deepEqual(promptCommand("a", "", ""), { action: "prompt", text: "a" });
  assert.deepEqual(promptCommand("a", "cut", "1"), { action: "prompt", text: "a", history: "cut" });
  assert.deepEqual(promptCommand("a", "", "4"), { action: "prompt", text: "a", blend: 4 });
  for (const blend of ["0", "1.5", "-1", "10000"]) assert.equal(promptCommand("a", "", blend), null);
});

test("places are written as players write them", () => {
  assert.deepEqual([0, 9.96, 61.25, 3600, 3.3].map(clock), ["0:00.0", "0:09.9", "1:01.2", "1:00:00.0", "0:03.3"]);
});

test("the pointer means the nearest mark within reach, of two at one frame the later", () => {
  const marks = [prompt("a", 10), prompt("b", 20), prompt("c", 20)];
  assert.equal(nearestMark(marks, 17, 5)?.text, "c");
  assert.equal(nearestMark(marks, 14, 3), null);
  assert.equal(nearestMark([], 0, 100), null);
});

test("the first and the last frame lie where the thumb stands at its ends", () => {
  assert.deepEqual([placeOf(0, 33), placeOf(32, 33), placeOf(99, 33)], [
    "calc(6px + (100% - 12px) * 0.00000)", "calc(6px + (100% - 12px) * 1.00000)", "calc(6px + (100% - 12px) * 1.00000)",
  ]);
});

test("every state of a run has its words", () => {
  const viewing = { over: false, isDry: false, secondsAhead: 2.14, isHoldAsked: false, isFinishAsked: false };
  const newest = { state: "sampling", ending: null, chunk: 2, numChunks: 14, pace: 2 };
  const say = (message, more = {}) =>
    sayStatus({ ...newest, ...message }, { ...viewing, ...more })
      .map(([words]) => words)
      .join(" · ");
  assert.equal(say({}), "chunk 2 of 14 · 2.1 s ahead");
  assert.equal(say({ state: "ahead" }), "waiting for you to watch · chunk 2 of 14 · 2.1 s ahead");
  assert.equal(say({ state: "held" }, { isHoldAsked: true }), "held · chunk 2 of 14 · 2.1 s ahead");
  assert.equal(say({}, { isHoldAsked: true }), "holds after this chunk · chunk 2 of 14 · 2.1 s ahead");
  assert.equal(say({}, { isFinishAsked: true }), "finishing · chunk 2 of 14 · 2.1 s ahead");
  assert.equal(say({}, { isDry: true, secondsAhead: null }), "waiting for the next chunk · chunk 2 of 14");
  const over = { over: true };
  assert.equal(say({ state: "done", ending: "early" }, over), "finished here · chunk 2 of 14");
  assert.equal(say({ state: "done", ending: "stopped", chunk: 14 }, over), "stopped · chunk 14 of 14");
  assert.equal(say({ state: "done", ending: "whole", chunk: 14 }, over), "done · chunk 14 of 14");
  assert.equal(say({}, over), "stopped · chunk 2 of 14"); // the last message never came
});
