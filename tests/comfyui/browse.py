"""Run by ComfyUI's Python: a headless Chromium on its own front end, driven over the DevTools protocol.

python browse.py CHROMIUM ADDRESS PACK FOLDER NAME...

Drops each named workflow of the pack on the canvas as a user's mouse would, reports what the page made of it, runs
the tiny ones with the button, runs `tiny_endless` twice without a change, steers it with the live player, ends it early
and stops it in both renderers, and leaves it for a copy while it waits in the queue. Prints one JSON object;
screenshots go to FOLDER.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import sys
import time
from pathlib import Path
from typing import Any

import aiohttp
from chromium import PATIENCE, Tab, tab

CHROMIUM, ADDRESS, PACK, FOLDER = sys.argv[1:5]
NAMES = sys.argv[5:]
SETTINGS = {"Comfy.TutorialCompleted": True, "Comfy.Workflow.ShowMissingModelsWarning": False}

DROP = """
async (name, file) => {
  const text = await (await fetch(`/api/workflow_templates/PACK/${name}.json`)).text()
  const wanted = JSON.parse(text)
  const data = new DataTransfer()
  data.items.add(new File([text], `${file}.json`, {type: 'application/json'}))
  const canvas = document.querySelector('#graph-canvas')
  const [former] = window.app.graph._nodes  // of a copy that may be open
  for (const kind of ['dragenter', 'dragover', 'drop'])
    canvas.dispatchEvent(new DragEvent(kind, {dataTransfer: data, bubbles: true, cancelable: true}))
  const ids = wanted.nodes.map(node => node.id).sort().join()
  for (let i = 0; i < 100; i++) {
    await new Promise(done => setTimeout(done, 100))
    const graph = window.app.graph
    const isNew = graph.id === wanted.id && graph._nodes[0] !== former
    if (isNew && graph._nodes.map(node => node.id).sort().join() === ids) break
  }
  const nodes = window.app.graph._nodes
  const {output} = await window.app.graphToPrompt()
  return {
    nodes: nodes.length, wanted: wanted.nodes.length,
    missing: nodes.map(node => node.type)  // has_errors also tells of missing model files in later front ends
      .filter(type => type !== 'MarkdownNote' && !window.LiteGraph.registered_node_types[type]),
    prompt: output,
  }
}
"""

# A front end whose host lacks some package cannot draw ComfyUI's own loaders, nor ours.
HOST_LOADER = """
(() => {
  try { new window.LiteGraph.registered_node_types['VAELoader']('probe'); return '' }
  catch (error) { return String(error) }
})()
"""

PLAYER = """
window.player = () => document.querySelector('.selfforcing-player')
window.control = action => window.player().querySelector(`[data-action="${action}"]`)
window.role = name => window.player().querySelector(`[data-role="${name}"]`).textContent
window.figures = () => {  // behind the (i)
  window.control('info').click()
  const told = window.role('figures')
  window.control('info').click()
  return told
}
window.keys = () => Object.fromEntries(['hold', 'go_on', 'reroll', 'finish', 'stop'].map(action => {
  const key = window.control(action)
  return [action, key.getAttribute('aria-pressed') === 'true' ? 'pressed' : key.disabled ? 'off' : 'on']
}))
window.streaming = () => window.app.graph._nodes.find(node => node.comfyClass === 'SelfForcingStreamToFile')
window.widths = async width => {  // of the node and of the player in it, with the side panel open
  const {settings} = window.app.ui
  await settings.setSettingValueAsync?.('Comfy.RightSidePanel.IsOpen', true)
  window.app.canvas.selectNode(window.streaming())
  await new Promise(done => setTimeout(done, 1000))
  window.streaming().setSize([width, window.streaming().size[1]])
  window.app.canvas.setDirty(true, true)
  await new Promise(done => setTimeout(done, 1000))
  return [window.streaming().size[0], window.player().offsetWidth]
}
window.videos = () => ({
  widgets: window.streaming().widgets.map(widget => widget.name).filter(name => /preview/.test(name)),
  elements: [...document.querySelectorAll('video')].filter(video => video.getClientRects().length).length,
  players: document.querySelectorAll('.selfforcing-player').length,
})
window.told = () => window.player().querySelector('[data-role="status"]').textContent
window.seen = () => {  // what the newest picture shows: the middle square of the canvas as 64 by 64 RGB
  const canvas = document.querySelector('.selfforcing-canvas'), small = new OffscreenCanvas(64, 64).getContext('2d')
  const size = Math.min(canvas.width, canvas.height), left = (canvas.width - size) / 2, top = (canvas.height - size) / 2
  small.drawImage(canvas, left, top, size, size, 0, 0, 64, 64)
  return [...small.getImageData(0, 0, 64, 64).data].filter((_, place) => place % 4 < 3)
}
window.colour = () => {  // of most pixels that have one
  const counts = [0, 0, 0], pixels = window.seen()
  for (let i = 0; i < pixels.length; i += 3)
    for (const c of [0, 1, 2])
      if (pixels[i + c] > 60 + Math.max(pixels[i + (c + 1) % 3], pixels[i + (c + 2) % 3])) counts[c]++
  const most = Math.max(...counts)
  return most < 40 ? '' : ['red', 'green', 'blue'][counts.indexOf(most)]
}
window.send = async (text, colour) => {  // seconds until the picture has the colour; null: not within half a minute
  const field = window.control('prompt-text'), began = performance.now()
  field.value = text
  field.dispatchEvent(new Event('input', {bubbles: true}))
  window.control('prompt').click()
  while (performance.now() < began + 30000) {
    await new Promise(done => setTimeout(done, 50))
    if (window.colour() === colour) return (performance.now() - began) / 1000
  }
  return null
}
window.go_to = async frame => {
  const bar = window.control('scrub')
  bar.value = frame
  bar.dispatchEvent(new Event('input', {bubbles: true}))
  bar.dispatchEvent(new Event('change', {bubbles: true}))
  await new Promise(done => setTimeout(done, 500))
}
window.to_the_end = () => window.go_to(window.control('scrub').max)
window.last_place = async () => {  // the file takes the place of the frames as soon as the browser has opened it
  for (let i = 0; i < 20; i++) {
    await window.to_the_end()
    const [shown, whole] = window.role('place').split(' / ')
    if (i > 2 && shown === whole) break
  }
  return window.role('place')
}
window.prepare = (length, seed, pace = 0) => {  // 0: as fast as it goes, whoever watches
  const set = {length, seed, pace}
  const node = window.streaming()
  for (const widget of node.widgets) if (widget.name in set) widget.value = set[widget.name]
  const {ds} = window.app.canvas
  ds.scale = 0.85
  ds.offset[0] = 480 - node.pos[0]
  ds.offset[1] = 930 - node.pos[1] - node.size[1]
  window.app.canvas.setDirty(true, true)
}
window.active = () => window.app.extensionManager.workflow.activeWorkflow.path
window.command = id => window.app.extensionManager.command.execute(id)
window.convert = () => {  // the streaming node into a subgraph
  const graph = window.app.graph
  graph.convertToSubgraph(new Set(graph._nodes.filter(node => node.comfyClass === 'SelfForcingStreamToFile')))
}
window.load_again = async times => {
  const data = JSON.stringify(window.app.graph.serialize())
  for (let i = 0; i < times; i++) {
    await window.app.loadGraphData(JSON.parse(data))
    await new Promise(done => setTimeout(done, 500))
  }
}
window.run = () => [...document.querySelectorAll('button')].find(b => /^Run$/.test(b.textContent.trim())).click()
"""

# What widgets of the streaming node are called, and what an arrow of its length does; all is put back afterwards.
WIDGETS = """
(async () => {
  const pause = () => new Promise(done => setTimeout(done, 500))
  const node = window.app.graph._nodes.find(node => node.comfyClass === 'SelfForcingStreamToFile')
  const find = name => node.widgets.find(widget => widget.name === name)
  const set = (name, value) => { find(name).value = value, find(name).callback?.(value, window.app.canvas, node) }
  const labels = () => node.widgets.map(widget => widget.label).filter(label => label?.includes(' \u00b7 '))
  const drawn = () => document.querySelector(`[data-node-id="${node.id}"]`)
  const before = labels(), values = node.serialize().widgets_values, {value: window_} = find('window')
  set('steps', 3), set('window', -1)
  await pause()
  const after = labels(), text = drawn()?.innerText.replaceAll('\\n', ' ')
  set('steps', 0), set('window', window_), set('length', 35)
  const typed = find('length').value
  set('length', values[2])
  await pause()
  const arrow = drawn()?.querySelectorAll('[aria-label="Increment"]')[2]
  if (arrow) arrow.click()
  else find('length').incrementValue({e: {}, node, canvas: window.app.canvas})
  await pause()
  const stepped = find('length').value
  set('length', values[2])
  const same = JSON.stringify(node.serialize().widgets_values) === JSON.stringify(values)
  return {before, after, text, typed, stepped, same}
})()
"""


def picture(name: str) -> Path:
    return Path(FOLDER) / f"{name}.png"


async def browse(page: Tab, session: aiohttp.ClientSession) -> dict[str, Any]:
    await page.open(**SETTINGS, **{"Comfy.VueNodes.Enabled": False})  # later front ends begin with it
    broken = await page.evaluate(HOST_LOADER)
    if broken:
        return {"broken": broken}
    report: dict[str, Any] = {}
    for name in NAMES:
        report[name] = await drop(page, name)
        await asyncio.sleep(0.5)
        await page.screenshot(picture(name))
    runs = {name: await run_by_the_button(page, session, name) for name in NAMES if name.startswith("tiny")}
    twice = {"classic": await run_twice(page, session)}
    classic = await steer(page, session, "classic", 2)
    left = await leave(page, session)
    await page.open(**{"Comfy.VueNodes.Enabled": True})
    twice["vue"] = await run_twice(page, session)
    vue = await steer(page, session, "vue", 5)
    delays = await send_late(page)
    return {
        "workflows": report,
        "runs": runs,
        "twice": twice,
        "classic": classic,
        "left": left,
        "vue": vue,
        "errors": page.errors,
        "delays": delays,
    }


async def run_by_the_button(page: Tab, session: aiohttp.ClientSession, name: str) -> Any:
    """Return what the history says of a dropped workflow."""
    await drop(page, name)
    await page.evaluate(PLAYER)
    ran = await press(page, session)
    await asyncio.sleep(1.5)
    await page.screenshot(picture(f"ran_{name}"))
    return ran


async def press(page: Tab, session: aiohttp.ClientSession) -> Any:
    """Press the button Run; the history's entry when that run has ended."""
    before = set(await history(session))
    await page.evaluate("window.run()")
    return await next_entry(session, before)


async def next_entry(session: aiohttp.ClientSession, before: set[str]) -> Any:
    after = await history(session)
    for _ in range(PATIENCE * 5):
        after = await history(session)
        if set(after) - before:
            break
        await asyncio.sleep(0.2)
    (ran,) = set(after) - before
    return after[ran]


async def run_twice(page: Tab, session: aiohttp.ClientSession) -> dict[str, Any]:
    """Run an endless workflow, and again without a change; what was made anew, and what plays its video."""
    await drop(page, "tiny_endless")
    await page.evaluate(PLAYER)
    await page.evaluate(f"window.prepare(33, {random.randrange(2**32)})")
    first = await press(page, session)
    await asyncio.sleep(1.5)
    second = await press(page, session)
    await asyncio.sleep(1.5)
    return {
        "ran": [made(entry) for entry in (first, second)],
        "videos": await page.evaluate("window.videos()"),
        "place": await page.evaluate("window.last_place()"),
        "widths": [await page.evaluate(f"window.widths({width})") for width in (600, 320)],
    }


async def send_late(page: Tab) -> list[list[Any]]:
    """Send prompts at seconds 1, 12 and 60 of a run that keeps its pace.

    Return for each how long it took until it showed, the status then, when that was, and the status as it was sent.
    """
    await drop(page, "tiny_endless")
    await page.evaluate(PLAYER)
    await asyncio.sleep(1)
    await page.evaluate("window.prepare(2001, 5, 2); window.run()")
    await page.until("/chunk [1-9]/.test(window.told()) && window.colour() === 'red'")
    start, rows = time.monotonic(), []
    for second, colour in ((1, "blue"), (12, "green"), (60, "red")):
        await asyncio.sleep(max(0.0, start + second - time.monotonic()))
        text = json.dumps(f"a {colour} square moving left slowly on a black background")
        before = await page.evaluate("window.told()")
        delay, status = await page.evaluate(f"window.send({text}, '{colour}')"), await page.evaluate("window.told()")
        rows.append([delay, status, time.monotonic() - start, before])
    await page.evaluate("window.control('finish').click()")
    await page.until("/finished here/.test(window.told())")
    return rows


def made(entry: Any) -> bool:
    """Return whether a run made its video anew, by what the server says that it took from its cache."""
    (cached,) = (data["nodes"] for kind, data in entry["status"]["messages"] if kind == "execution_cached")
    (stream,) = (key for key, node in entry["prompt"][2].items() if node["class_type"] == "SelfForcingStreamToFile")
    return stream not in cached


async def drop(page: Tab, name: str, file: str | None = None) -> Any:
    return await page.evaluate(f"({DROP.replace('PACK', PACK)})({json.dumps(name)}, {json.dumps(file or name)})")


async def steer(page: Tab, session: aiohttp.ClientSession, renderer: str, seed: int) -> dict[str, Any]:
    """Hold a chunk, type another prompt, go on to the end; then stop a second run. Pictures are the canvas' own."""
    await drop(page, "tiny_endless")
    await page.evaluate(PLAYER)
    await asyncio.sleep(1)
    report: dict[str, Any] = {"is_shown": await page.evaluate("!!window.player()?.isConnected")}
    if not report["is_shown"]:
        return report
    report["widgets"] = await page.evaluate(WIDGETS)
    await page.evaluate(f"window.prepare(333, {seed}); window.run()")
    # In one step: between two, a fast host may end the run.
    await page.until("/chunk/.test(window.told()) && (window.control('hold').click(), true)")
    # The chunk that was being made is finished first, and is the one that is held.
    await page.until("/held/.test(window.told())")
    report["told"] = await page.evaluate("window.told()")
    report["figures"] = await page.evaluate("window.figures()")
    report["keys_when_held"] = await page.evaluate("window.keys()")
    await page.evaluate("window.go_to(8)")  # the last frame of the first chunk: made under the first prompt
    report["before"] = await page.evaluate("window.seen()")
    await page.evaluate("window.control('prompt-text').focus()")
    # As a keyboard does it, since scripts cannot raise the events that a browser trusts.
    await page.call("Input.insertText", text="a blue square moving left slowly on a black background")
    await page.screenshot(picture(f"held_{renderer}"))
    for kind in ("keyDown", "keyUp"):
        await page.call("Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", windowsVirtualKeyCode=13)
    await asyncio.sleep(0.5)
    report["written"] = await page.evaluate("window.control('prompt-text').value")
    await page.evaluate("window.control('go_on').click()")
    await page.until("!/held/.test(window.told()) && (window.keys_then = window.keys(), true)")
    report["keys_when_on"] = await page.evaluate("window.keys_then")
    await page.until("/chunk 28 of 28/.test(window.told()) && (window.to_the_end(), true)")
    await asyncio.sleep(1.5)
    await page.evaluate("window.to_the_end()")
    report["after"] = await page.evaluate("window.seen()")
    report["sent"] = await page.evaluate("window.role('sent')")
    report["error"] = await page.evaluate("window.role('error')")
    await page.screenshot(picture(f"steered_{renderer}"))
    report["finished"] = await end(page, session, "finish", renderer)
    report["stopped"] = await end(page, session, "stop", renderer)
    return report


async def end(page: Tab, session: aiohttp.ClientSession, key: str, renderer: str) -> dict[str, Any]:
    """End a long run by a key of the player: the history's entry, the player's words, and the file that it names."""
    before = set(await history(session))
    await page.evaluate(f"window.prepare(2001, {random.randrange(2**32)}); window.run()")
    # Once a chunk is finished: before that there is nothing to keep, and no file to name.
    going = "window.keys().stop === 'on' && /chunk [1-9][0-9]* of 167/.test(window.told())"
    await page.until(f"{going} && (window.control('{key}').click(), true)")
    entry = await next_entry(session, before)
    await asyncio.sleep(1.5)
    await page.screenshot(picture(f"{key}_{renderer}"))
    return {
        "entry": entry,
        "told": await page.evaluate("window.told()"),
        "files": await page.evaluate("[...window.player().querySelectorAll('a')].map(link => link.href)"),
    }


async def leave(page: Tab, session: aiohttp.ClientSession) -> dict[str, Any]:
    """Open a copy of a queued workflow, let the run begin meanwhile, and come back; then load a subgraph again."""
    await drop(page, "tiny_endless")
    await page.evaluate(PLAYER)
    await asyncio.sleep(1)
    prompt = json.loads((Path(__file__).parents[2] / "workflows/api/tiny_endless.json").read_text())
    for node in prompt.values():
        if node["class_type"] == "SelfForcingStreamToFile":
            node["inputs"] |= {"length": 2001, "seed": random.randrange(2**32)}
    # Another client's run goes first, so that the page's own waits in the queue while the page is elsewhere.
    await session.post(f"http://{ADDRESS}/prompt", json={"prompt": prompt})
    await page.evaluate(f"window.prepare(2001, {random.randrange(2**32)}); window.run()")
    (waiting,) = await queued(session, "queue_pending")
    workflow = await page.evaluate("window.active()")
    await drop(page, "tiny_endless", "a copy")  # with the same ids
    await page.until(f"window.active() !== {json.dumps(workflow)} && !!window.player()?.isConnected")
    await session.post(f"http://{ADDRESS}/interrupt")
    while await queued(session, "queue_running") != [waiting]:
        await asyncio.sleep(0.2)
    await asyncio.sleep(4)
    report: dict[str, Any] = {"told_in_the_copy": await page.evaluate("window.told()")}
    for _ in range(30):
        await page.evaluate("window.command('Workspace.PreviousOpenedWorkflow')")
        await asyncio.sleep(0.5)
        if await page.evaluate("window.active()") == workflow:
            break
    for _ in range(60):
        await asyncio.sleep(0.5)
        report["told_when_back"] = await page.evaluate("window.told()")
        if re.search("chunk [1-9]", report["told_when_back"]):
            break
    await page.screenshot(picture("back"))
    report["is_running"] = await queued(session, "queue_running") == [waiting]
    await session.post(f"http://{ADDRESS}/interrupt")
    await page.evaluate("window.convert()")
    await page.evaluate("window.load_again(5)")
    report["players"] = await players(page)
    return report


async def queued(session: aiohttp.ClientSession, state: str) -> list[str]:
    """Return the prompts that wait or run; those that wait as soon as there are any."""
    for _ in range(PATIENCE * 5):
        async with session.get(f"http://{ADDRESS}/queue") as answer:
            prompt_ids = [entry[1] for entry in (await answer.json())[state]]
        if prompt_ids or state == "queue_running":
            break
        await asyncio.sleep(0.2)
    return prompt_ids


async def players(page: Tab) -> int:
    """Count the players that are alive, by the browser's own count of objects."""
    # A player that nothing refers to any more is collected, so counting objects finds those that leak.
    script = f"import('/extensions/{PACK}/panel.js').then(module => module.Panel.prototype)"
    prototype = await page.call("Runtime.evaluate", expression=script, awaitPromise=True)
    objects = await page.call("Runtime.queryObjects", prototypeObjectId=prototype["result"]["objectId"])
    count = "function () { return this.filter(panel => !panel.disposed).length }"
    answer = await page.call(
        "Runtime.callFunctionOn", functionDeclaration=count, objectId=objects["objects"]["objectId"], returnByValue=True
    )
    return answer["result"]["value"]


async def history(session: aiohttp.ClientSession) -> dict[str, Any]:
    async with session.get(f"http://{ADDRESS}/history") as answer:
        return await answer.json()


async def main() -> None:
    async with tab(CHROMIUM, ADDRESS, PACK) as page:
        print("\n" + json.dumps(await browse(page, page.session)))


asyncio.run(main())
