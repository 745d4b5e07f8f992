/** Promises of the desk and the line below the video: node --test tests/web/desk.test.js */

import assert from "node:assert/strict";
import test from "node:test";

import { stillWaiting } from "../../web/desk.js";
import { clock } from "../../web/elements.js";
import { nearestMark, placeOf } from "../../web/timeline.js";

const prompt = (text, frame = 0) => ({ kind: "prompt", chunk: 0, frame, seconds: 0, text, history: "keep", seed: null });

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
