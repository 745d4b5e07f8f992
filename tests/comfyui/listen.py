"""Run by ComfyUI's Python: print what its server sends on the websocket, one JSON object a line, until killed.

python listen.py 127.0.0.1:8188 CLIENT_ID
"""

import asyncio
import json
import struct
import sys
from typing import Any

import aiohttp

TEXT = 3  # of ComfyUI's binary messages: a line for a node


def described(data: bytes) -> dict[str, Any]:
    """Describe a binary message: what a node shows in words, or how long it is."""
    # Two big-endian numbers come first: the kind of the message, and for a text the length of the node's id.
    kind, length = struct.unpack(">II", data[:8])
    if kind != TEXT:
        return {"type": "binary", "data": {"bytes": len(data)}}
    node, text = data[8 : 8 + length].decode(), data[8 + length :].decode()
    return {"type": "text", "data": {"node": node, "text": text}}


async def listen(address: str, client_id: str) -> None:
    url = f"ws://{address}/ws?clientId={client_id}"
    async with aiohttp.ClientSession() as session, session.ws_connect(url, max_msg_size=0) as socket:
        # From here on nothing is lost: whoever started this queues its prompt only now.
        print(json.dumps({"type": "listening"}), flush=True)
        async for message in socket:
            is_text = message.type == aiohttp.WSMsgType.TEXT
            line = message.data if is_text else json.dumps(described(message.data))
            print(line, flush=True)


asyncio.run(listen(*sys.argv[1:]))
