"""Run by ComfyUI's Python: how each workflow of the pack looks as it opens, measured in a headless Chromium.

python layout.py CHROMIUM ADDRESS PACK FOLDER QUERIES NAME...

Opens each workflow in the classic renderer and in Nodes 2.0, the first also in the light theme, and asks the front
end's own search for QUERIES (a JSON list). Prints one JSON object; screenshots go to FOLDER.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from chromium import Tab, tab

CHROMIUM, ADDRESS, PACK, FOLDER, QUERIES = sys.argv[1:6]
NAMES = sys.argv[6:]
SETTINGS = {"Comfy.TutorialCompleted": True, "Comfy.Workflow.ShowMissingModelsWarning": False}

OPEN = """
async name => {
  const graph = await (await fetch(`/api/workflow_templates/PACK/${name}.json`)).json()
  await window.app.loadGraphData(graph, true, true, name)
  await new Promise(done => setTimeout(done, 1500))  // pictures and players have found their height
}
"""

# Boxes in pixels of the graph at 100 %: left, top, width, height, the title included.
BOXES = """
() => {
  const {scale, offset} = window.app.canvas.ds
  const measured = element => {
    const {left, top, width, height} = element.getBoundingClientRect()
    return [left / scale - offset[0], top / scale - offset[1], width / scale, height / scale]
  }
  const nodes = window.app.graph._nodes.map(node => {
    const element = document.querySelector(`[data-node-id="${node.id}"]`)
    return {type: node.type, is_dom: !!element, box: element ? measured(element) : [...node.boundingRect]}
  })
  const groups = window.app.graph._groups.map(({title, _bounding}) => ({title, box: [..._bounding]}))
  return {scale, offset: [...offset], nodes, groups}
}
"""

# Contrast (WCAG 2) of each run of text in the note with what is painted behind it: in the classic renderer the canvas.
NOTE = """
() => {
  const note = window.app.graph._nodes.find(node => node.type === 'MarkdownNote')
  const root = document.querySelector(`[data-node-id="${note.id}"]`) ?? document.querySelector('.comfy-markdown')
  const pen = new OffscreenCanvas(1, 1).getContext('2d', {willReadFrequently: true})
  const read = colour => {
    pen.clearRect(0, 0, 1, 1), pen.fillStyle = colour, pen.fillRect(0, 0, 1, 1)
    return [...pen.getImageData(0, 0, 1, 1).data]
  }
  const painted = () => {
    const {scale, offset} = window.app.canvas.ds, {canvas} = window.app, ratio = canvas.canvas.width / innerWidth
    const x = (note.pos[0] + 4 + offset[0]) * scale * ratio, y = (note.pos[1] + 4 + offset[1]) * scale * ratio
    return [...canvas.canvas.getContext('2d').getImageData(Math.round(x), Math.round(y), 1, 1).data]
  }
  const behind = element => {
    for (let at = element; at && at !== document.body; at = at.parentElement) {
      const colour = read(getComputedStyle(at).backgroundColor)
      if (colour[3] > 230) return colour
      if (at === root && !root.dataset.nodeId) break
    }
    return painted()
  }
  const linear = value => (value /= 255) <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4
  const luminance = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b)
  const found = [], walk = document.createTreeWalker(root, NodeFilter.SHOW_TEXT)
  while (walk.nextNode()) {
    const element = walk.currentNode.parentElement, words = walk.currentNode.data.trim()
    if (!words || !element.getClientRects().length || !element.closest('[class*="markdown"]')) continue
    const text = read(getComputedStyle(element).color), ground = behind(element)
    const [dark, bright] = [luminance(text), luminance(ground)].sort((a, b) => a - b)
    found.push({words, text, ground, contrast: (bright + 0.05) / (dark + 0.05)})
  }
  const scroller = root.querySelector('.comfy-markdown-content') ?? root
  return {text: found, hidden: scroller.scrollHeight - scroller.clientHeight}
}
"""

SEARCH = """
queries => {
  const {$pinia} = document.querySelector('#vue-app').__vue_app__.config.globalProperties
  const {nodeSearchService} = $pinia._s.get('nodeDef')
  return Object.fromEntries(queries.map(query => [query, nodeSearchService.searchNode(query).map(({name}) => name)]))
}
"""


async def look(page: Tab) -> dict[str, Any]:
    report: dict[str, Any] = {}
    for renderer, is_vue in (("classic", False), ("vue", True)):
        for theme, names in (("light", NAMES[:1]), ("dark", NAMES)):
            await page.open(**SETTINGS, **{"Comfy.VueNodes.Enabled": is_vue, "Comfy.ColorPalette": theme})
            for name in names:
                await page.evaluate(f"({OPEN.replace('PACK', PACK)})({json.dumps(name)})")
                key = f"{renderer} {theme} {name}"
                report[key] = {**await page.evaluate(f"({BOXES})()"), "note": await page.evaluate(f"({NOTE})()")}
                await page.screenshot(Path(FOLDER) / f"{key.replace(' ', '_')}.png")
    report["search"] = await page.evaluate(f"({SEARCH})({QUERIES})")
    return report


async def main() -> None:
    async with tab(CHROMIUM, ADDRESS, PACK) as page:
        print("\n" + json.dumps(await look(page)))


asyncio.run(main())
