"""Queue a workflow of workflows/api on a running ComfyUI, wait for it, and fetch what it saved.

    python workflows/client.py workflows/api/tiny_t2v.json --set 2.text="a green circle moving up slowly" --set 4.seed=7

Needs nothing but Python. --set NODE.INPUT=VALUE changes one input; values are JSON where they parse, else text.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from pathlib import Path
from typing import Any


def ask(server: str, path: str, body: Any = None) -> Any:
    """GET, or POST with a body. Raises ValueError with the server's own reasons."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://{server}{path}", data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        raise ValueError(f"{server} refused: {error.read().decode(errors='replace')}") from error
    except OSError as error:
        raise ValueError(f"{server} does not answer ({error}); start ComfyUI, or name another --server") from error


def changed(prompt: dict[str, Any], settings: list[str]) -> dict[str, Any]:
    """The prompt with some inputs set. Raises ValueError for inputs that it does not have."""
    for setting in settings:
        name, equals, text = setting.partition("=")
        node, _, given = name.partition(".")
        if not equals or given not in prompt.get(node, {}).get("inputs", {}):
            known = ", ".join(f"{key}.{entry}" for key, value in prompt.items() for entry in value["inputs"])
            raise ValueError(f"{setting!r} sets no input of this workflow; use NODE.INPUT=VALUE with one of {known}")
        try:
            prompt[node]["inputs"][given] = json.loads(text)
        except ValueError:
            prompt[node]["inputs"][given] = text
    return prompt


def run(server: str, prompt: dict[str, Any]) -> dict[str, Any]:
    """Queue a prompt and wait until it has ended; what each node put out. Raises ValueError if it failed."""
    queued = ask(server, "/prompt", {"prompt": prompt, "client_id": uuid.uuid4().hex})["prompt_id"]
    while True:
        entry = ask(server, f"/history/{queued}").get(queued)
        if entry is not None:
            break
        time.sleep(0.5)
    if entry["status"]["status_str"] != "success":
        kind, data = entry["status"]["messages"][-1]
        raise ValueError(f"{kind}: {data.get('node_type')}: {data.get('exception_message', '').strip()}")
    return entry["outputs"]


def fetch(server: str, outputs: dict[str, Any], folder: Path) -> list[Path]:
    """Download every saved file; their places here."""
    found = []
    for output in outputs.values():
        for files in output.values():
            for file in files:
                if not isinstance(file, dict) or file.get("type") != "output":
                    continue
                query = urllib.parse.urlencode({key: file[key] for key in ("filename", "subfolder", "type")})
                with urllib.request.urlopen(f"http://{server}/view?{query}", timeout=60) as answer:
                    content = answer.read()
                folder.mkdir(parents=True, exist_ok=True)
                found.append(folder / Path(file["filename"]).name)
                found[-1].write_bytes(content)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("workflow", type=Path, help="a file of workflows/api, or of the menu entry Export (API)")
    parser.add_argument("--server", default="127.0.0.1:8188", help="address of ComfyUI (default: 127.0.0.1:8188)")
    parser.add_argument("--set", action="append", default=[], metavar="NODE.INPUT=VALUE", help="change one input")
    parser.add_argument("--to", type=Path, default=Path("out"), help="folder for the results (default: out)")
    options = parser.parse_args()
    try:
        prompt = changed(json.loads(options.workflow.read_text(encoding="utf-8")), options.set)
        for path in fetch(options.server, run(options.server, prompt), options.to):
            print(path)
    except (ValueError, OSError) as error:
        print(f"client: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
