"""Run by the Python of ComfyUI: a film of the player while somebody types another prompt.

python film.py CHROMIUM ADDRESS PACK FOLDER FIRST SECOND SECOND_COLOUR

Runs `tiny_endless` with the prompt FIRST, types SECOND below the player as a person would, and waits for its colour.
Writes pictures of the player to FOLDER, named by their milliseconds, and prints one JSON object: when the prompt was
sent, and when the player showed it.
"""

from __future__ import annotations

import asyncio
import base64
import json
import sys
import time
from pathlib import Path
from typing import Any

from chromium import Tab, tab

CHROMIUM, ADDRESS, PACK, FOLDER, FIRST, SECOND, SECOND_COLOUR = sys.argv[1:8]
SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.Workflow.ShowMissingModelsWarning": False,
    "Comfy.VueNodes.Enabled": True,
    "Comfy.ColorPalette": "dark",
    "Comfy.Minimap.Visible": False,
}
PAUSE, BEFORE, AFTER = 0.08, 2.5, 3.5  # seconds: between pictures, of the first prompt's video, of the second's

OPEN = """
(async () => {
  const graph = await (await fetch('/api/workflow_templates/PACK/tiny_endless.json')).json()
  await window.app.loadGraphData(graph, true, true, 'tiny_endless')
  const streaming = window.app.graph._nodes.find(node => node.comfyClass === 'SelfForcingStreamToFile')
  const prompt = window.app.graph._nodes.find(node => node.comfyClass === 'SelfForcingTextEncode')
  prompt.widgets.find(widget => widget.name === 'text').value = FIRST
  const {ds} = window.app.canvas
  ds.scale = 1
  ds.offset[0] = 130 - streaming.pos[0]
  ds.offset[1] = 60 - streaming.pos[1]
  window.app.canvas.setDirty(true, true)
  await new Promise(done => setTimeout(done, 1500))
  ds.offset[1] += 90 - document.querySelector('.selfforcing-player').getBoundingClientRect().y  // below the menus
  window.app.canvas.setDirty(true, true)
  await new Promise(done => setTimeout(done, 500))
})()
"""
BOX = """
(() => {
  const {x, y, width, height} = document.querySelector('.selfforcing-player').getBoundingClientRect()
  return [x, y, width, height]
})()
"""
RUN = "[...document.querySelectorAll('button')].find(b => /^Run$/.test(b.textContent.trim())).click()"
CONTROL = """document.querySelector('.selfforcing-player [data-action="NAME"]')"""
# The colour (red, green or blue) of most of the picture's pixels that have one.
COLOUR = """
(() => {
  const canvas = document.querySelector('.selfforcing-canvas'), counts = [0, 0, 0]
  const pixels = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data
  for (let i = 0; i < pixels.length; i += 4)
    for (const c of [0, 1, 2])
      if (pixels[i + c] > 60 + Math.max(pixels[i + (c + 1) % 3], pixels[i + (c + 2) % 3])) counts[c]++
  return Math.max(...counts) < 40 ? '' : ['red', 'green', 'blue'][counts.indexOf(Math.max(...counts))]
})()
"""


class Film:
    """Pictures of the player, taken between whatever else the page is asked."""

    def __init__(self, page: Tab, box: list[float]) -> None:
        x, y, width, height = box
        self.page, self.start = page, time.monotonic()
        self.clip = {"x": x - 6, "y": y - 6, "width": width + 12, "height": height + 12, "scale": 1}

    def now(self) -> float:
        return time.monotonic() - self.start

    async def take(self) -> None:
        milliseconds = round(1000 * self.now())
        shot = await self.page.call("Page.captureScreenshot", format="png", clip=self.clip)
        (Path(FOLDER) / f"{milliseconds:06}.png").write_bytes(base64.b64decode(shot["data"]))
        await asyncio.sleep(PAUSE)

    async def roll(self, seconds: float) -> None:
        end = self.now() + seconds
        while self.now() < end:
            await self.take()


async def record(page: Tab) -> dict[str, Any]:
    await page.call("Emulation.setDeviceMetricsOverride", width=1100, height=1300, deviceScaleFactor=1, mobile=False)
    await page.open(**SETTINGS)
    await page.evaluate(OPEN.replace("PACK", PACK).replace("FIRST", json.dumps(FIRST)))
    await page.evaluate(RUN)
    await page.until(f"{COLOUR} !== ''")
    # From the first picture on: before it, loading the model would fill the film.
    film = Film(page, await page.evaluate(BOX))
    await film.roll(BEFORE)
    before = await page.evaluate(COLOUR)
    await page.evaluate(CONTROL.replace("NAME", "prompt-text") + ".focus()")
    # Four letters between two pictures look like typing, at the speed at which pictures can be taken.
    for place in range(0, len(SECOND), 4):
        await page.call("Input.insertText", text=SECOND[place : place + 4])
        await film.take()
    await page.evaluate(CONTROL.replace("NAME", "prompt") + ".click()")
    sent_at = film.now()
    while await page.evaluate(COLOUR) != SECOND_COLOUR:
        await film.take()
        assert film.now() < sent_at + 60, "the picture never had the colour of the prompt that was typed"
    shown_at = film.now()
    await film.roll(AFTER)
    await page.evaluate(CONTROL.replace("NAME", "finish") + ".click()")
    return {"before": before, "sent": sent_at, "shown": shown_at, "errors": page.errors}


async def main() -> None:
    async with tab(CHROMIUM, ADDRESS, PACK) as page:
        print("\n" + json.dumps(await record(page)))


asyncio.run(main())
