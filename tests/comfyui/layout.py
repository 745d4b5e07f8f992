"""Run by the host's Python: how each workflow of the pack looks as it opens, measured in a headless Chromium.

python layout.py CHROMIUM ADDRESS PACK FOLDER NAME...

Opens each workflow in the classic renderer and in Nodes 2.0, and asks the front end's own search for the node that a
user means by some words. Prints one JSON object; screenshots go to FOLDER.
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

# Boxes are in pixels of the canvas: left, top, width, height with the title.
LOOK = """
() => {
  const {scale, offset} = window.app.canvas.ds
  const over = element => {
    const box = element.getBoundingClientRect()
    return [box.left / scale - offset[0], box.top / scale - offset[1], box.width / scale, box.height / scale]
  }
  const boxes = window.app.graph._nodes.map(node => {
    const element = document.querySelector(`[data-node-id="${node.id}"]`)
    const drawn = [...node.boundingRect]
    return {id: node.id, type: node.type, box: element ? over(element) : drawn, in_vue: !!element}
  })
  const note = window.app.graph._nodes.find(node => node.type === 'MarkdownNote')
  const vue = document.querySelector(`[data-node-id="${note.id}"]`)
  const root = vue ?? document.querySelector('.comfy-markdown')
  const rgb = text => (text.match(/[\\d.]+/g) ?? []).map(Number)
  const hex = text => { const c = document.createElement('canvas').getContext('2d'); c.fillStyle = text; c.fillRect(0, 0, 1, 1)
    return [...c.getImageData(0, 0, 1, 1).data].slice(0, 3) }
  const light = ([r, g, b]) => { const f = v => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4
    return .2126 * f(r) + .7152 * f(g) + .0722 * f(b) }
  const behind = element => {
    for (let at = element; at; at = at.parentElement) {
      const colour = hex(getComputedStyle(at).backgroundColor), alpha = rgb(getComputedStyle(at).backgroundColor)[3] ?? 1
      if (alpha > .9 && getComputedStyle(at).backgroundColor !== 'rgba(0, 0, 0, 0)') return colour
      if (at === root && !vue) break
    }
    return hex(note.bgcolor)
  }
  const text = []
  const walk = document.createTreeWalker(root, NodeFilter.SHOW_TEXT)
  while (walk.nextNode()) {
    const element = walk.currentNode.parentElement
    if (!walk.currentNode.data.trim() || !element.closest('.comfy-markdown, .comfy-markdown-content, .widget-markdown')) continue
    if (!element.getClientRects().length) continue
    const style = getComputedStyle(element), one = light(hex(style.color)), two = light(behind(element))
    text.push({words: walk.currentNode.data.slice(0, 30), size: parseFloat(style.fontSize) * (vue ? 1 : 1), colour: style.color, behind: behind(element),
      contrast: (Math.max(one, two) + .05) / (Math.min(one, two) + .05)})
  }
  const scroller = root.querySelector('.comfy-markdown-content') ?? root
  return {scale, offset: [...offset], boxes, text, title: note.title,
    groups: window.app.graph._groups.map(group => ({title: group.title, box: [...group._bounding]})),
    hidden_text: Math.max(0, scroller.scrollHeight - scroller.clientHeight), window: [innerWidth, innerHeight]}
}
"""

# The front end's own service, found by what it can do: its files have other names in every release.
SEARCH = """
async queries => {
  const store = [...window.app.extensionManager ? [0] : []]
  const pinia = document.querySelector('#vue-app').__vue_app__.config.globalProperties.$pinia
  const service = pinia._s.get('nodeDef').nodeSearchService
  return Object.fromEntries(queries.map(query =>
    [query, service.searchNode(query).map(node => node.name).slice(0, 200)]))
}
"""


async def look(page: Tab) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for renderer, is_vue in (("classic", False), ("vue", True)):
        await page.open(**SETTINGS, **{"Comfy.VueNodes.Enabled": is_vue})
        for name in NAMES:
            await page.evaluate(f"({OPEN.replace('PACK', PACK)})({json.dumps(name)})")
            found[f"{renderer} {name}"] = await page.evaluate(f"({LOOK})()")
            await page.screenshot(Path(FOLDER) / f"{renderer}_{name}.png")
    found["search"] = await page.evaluate(f"({SEARCH})({QUERIES})")
    return found


async def main() -> None:
    async with tab(CHROMIUM, ADDRESS) as page:
        print("\n" + json.dumps(await look(page)))


asyncio.run(main())
