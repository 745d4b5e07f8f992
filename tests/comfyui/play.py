"""Run by the host's Python: what the live player's page would do, without a page.

python play.py ADDRESS CLIENT_ID REACTIONS

Prints every message of "selfforcing.live" without its pictures, one JSON object a line, and acknowledges it. REACTIONS
is JSON, a list of {"when": {name: value, ...}, "do": [command, ...]}: the first message that has these values sends
these commands. {"when": {}, "do": []} with "acknowledge": false in its place makes a page that never answers.
"""

import asyncio
import base64
import io
import json
import sys

import aiohttp
from PIL import Image


async def play(address: str, client_id: str, reactions: list) -> None:
    silent = any(not reaction.get("acknowledge", True) for reaction in reactions)
    async with aiohttp.ClientSession() as session:

        async def command(**body: object) -> None:
            async with session.post(f"http://{address}/selfforcing/live", json=body) as answer:
                if answer.status != 200:
                    print(json.dumps({"refused": answer.status, **await answer.json()}), flush=True)

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
                pictures = [Image.open(io.BytesIO(base64.b64decode(jpeg))) for jpeg in data.pop("jpegs")]
                data["sizes"] = [picture.size for picture in pictures]
                data["corners"] = [picture.convert("RGB").getpixel((0, 0)) for picture in pictures]
                print(json.dumps({"type": "live", "data": data}), flush=True)
                for reaction in reactions:
                    if all(data.get(name) == value for name, value in reaction.get("when", {}).items()):
                        reactions = [other for other in reactions if other is not reaction]
                        for each in reaction["do"]:
                            await command(run=data["run"], **each)
                        break
                if not silent:
                    await command(run=data["run"], action="ack", number=data["number"])


asyncio.run(play(sys.argv[1], sys.argv[2], json.loads(sys.argv[3])))
