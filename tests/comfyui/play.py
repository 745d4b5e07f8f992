"""Run by ComfyUI's Python: what the live player's page would do, without a page.

python play.py ADDRESS CLIENT_ID REACTIONS

Prints every message of "selfforcing.live" without its pictures, one JSON object a line, and acknowledges it. It shows
the video at its speed from the first frame that comes, and says twice a second where it is. REACTIONS is JSON, a list
of {"when": {name: value, ...}, "do": [command, ...]}: the first message that has these values sends these commands,
"after" so many seconds. {"when": {}, "do": []} with "acknowledge": false in its place makes a page that never answers,
with "plays": false one that is paused on its first frame, with "speaks": false an older one, which does not say who it
is and what it shows.
"""

import asyncio
import base64
import io
import json
import sys
import time

import aiohttp
from PIL import Image

EVERY = 0.5  # seconds between two words about what is on screen


class Screen:
    """Plays what it has received, as the player does: it waits where a frame is not there yet."""

    def __init__(self, plays: bool) -> None:
        self.plays, self.position, self.end, self.moved_at, self.fps = plays, None, 0, 0.0, 16.0

    def receive(self, indices: list, fps: float) -> None:
        if indices and self.position is None:
            self.position, self.moved_at = indices[0], time.monotonic()
        self.fps, self.end = fps, max([self.end, *indices])

    def frame(self) -> int | None:
        if self.position is None:
            return None
        now = time.monotonic()  # by the clock, as a page does: a message may come late and hold many frames
        if self.plays:
            self.position = min(self.position + (now - self.moved_at) * self.fps, self.end)
        self.moved_at = now
        return int(self.position)


async def play(address: str, client_id: str, reactions: list) -> None:
    answers, plays, speaks = (
        all(reaction.get(name, True) for reaction in reactions) for name in ("acknowledge", "plays", "speaks")
    )
    silent = not answers
    screen, run = Screen(plays), ""
    async with aiohttp.ClientSession() as session:

        async def command(**body: object) -> None:
            body = {"client": client_id, **body} if speaks else body
            async with session.post(f"http://{address}/selfforcing/live", json=body) as answer:
                if answer.status != 200:
                    print(json.dumps({"refused": answer.status, **await answer.json()}), flush=True)

        async def react(reaction: dict, data: dict) -> None:
            await asyncio.sleep(reaction.get("after", 0))
            for each in reaction["do"]:
                print(json.dumps({"type": "did", "data": {**each, "shown": screen.frame()}}), flush=True)
                await command(run=data["run"], **each)

        async def tell() -> None:
            reported = None
            while True:
                await asyncio.sleep(EVERY)
                if run and screen.frame() != reported:
                    reported = screen.frame()
                    await command(run=run, action="shown", frame=reported)

        telling = asyncio.create_task(tell()) if speaks and not silent else None
        tasks = [telling]
        async with session.ws_connect(f"ws://{address}/ws?clientId={client_id}", max_msg_size=0) as socket:
            print(json.dumps({"type": "listening"}), flush=True)
            async for message in socket:
                if message.type != aiohttp.WSMsgType.TEXT:
                    print(json.dumps({"type": "binary"}), flush=True)
                    continue
                event = json.loads(message.data)
                if event["type"] != "selfforcing.live":
                    print(json.dumps({"type": event["type"]}), flush=True)
                    continue
                data = event["data"]
                run = data["run"]
                pictures = [Image.open(io.BytesIO(base64.b64decode(jpeg))) for jpeg in data.pop("jpegs")]
                data["sizes"] = [picture.size for picture in pictures]
                # One pixel is enough to tell whose frames they are, and keeps the line short.
                data["corners"] = [picture.convert("RGB").getpixel((0, 0)) for picture in pictures]
                screen.receive(data["indices"], data["fps"])
                print(json.dumps({"type": "live", "data": data}), flush=True)
                for reaction in reactions:
                    if all(data.get(name) == value for name, value in reaction.get("when", {}).items()):
                        # Each reaction is for one message, the first that fits.
                        reactions = [other for other in reactions if other is not reaction]
                        if "after" in reaction:
                            tasks.append(asyncio.create_task(react(reaction, data)))
                        else:
                            await react(reaction, data)
                        break
                if not silent:
                    position = {"shown": screen.frame()} if speaks else {}
                    await command(run=data["run"], action="ack", number=data["number"], **position)


asyncio.run(play(sys.argv[1], sys.argv[2], json.loads(sys.argv[3])))
