"""Prompts from files, names of files from prompts, and longer prompts from short ones.

Models are trained on long captions, so a few words give less than they could. A language model can say more: one that
runs here (any chat model of transformers) or one behind an OpenAI-compatible address. Nothing is asked of the network
unless the user names it.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request as HttpRequest
from urllib.request import urlopen

Messages = list[dict[str, str]]  # as chat models take them: role and content
NAME_LENGTH = 60  # characters of a prompt that a file's name keeps; far below what any file system allows
RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(1, 10))}  # Windows
ANSWER_TOKENS = 300  # more than 100 English words take
TIMEOUT = 120  # seconds; a server may load its model first
INSTRUCTION = (
    "You write captions for a text-to-video model. Rewrite the user's idea as one paragraph of 60 to 100 English words "
    "that describes a single continuous shot: the subject and what it looks like, what it does from beginning to end, "
    "the place, the light, the camera's distance and movement, and the style. Keep every fact that the user gives, and "
    "keep quoted words as they are. Add only what fits. Answer with the caption alone."
)


# -------------------------------------------------------------------- files --
def read_prompts(path: Path) -> list[str]:
    """Return the prompts of a text file, one per line without empty lines. Raises ValueError if there are none."""
    prompts = [line.strip() for line in read_lines(path) if line.strip()]
    if not prompts:
        raise ValueError(f"{path}: holds no prompt; write one per line")
    return prompts


def read_extended(path: Path, prompts: list[str]) -> list[str]:
    """Return the longer prompts that belong to `prompts`, line by line. Raises ValueError if their numbers differ."""
    extended = read_prompts(path)
    if len(extended) != len(prompts):
        raise ValueError(f"{path}: holds {len(extended)} prompts for {len(prompts)}; give one line for each")
    return extended


def read_lines(path: Path) -> list[str]:
    r"""Return the lines of a text file, which end with \n, \r\n or \r alone.

    Other separators (form feed, NEL, U+2028), as chat pages put into a paragraph, belong to the line. Raises ValueError
    for what is no text in UTF-8.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")  # drops a mark of byte order, makes every line's end \n
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ValueError(f"{path}: cannot be read as text ({reason})") from error
    return text.removesuffix("\n").split("\n")


def read_one(path: Path) -> str:
    """Return the one prompt that a whole file holds, on a line. Raises ValueError for what is no text in UTF-8."""
    return " ".join("\n".join(read_lines(path)).split())


def safe_name(prompt: str) -> str:
    """Return a file name's stem from any prompt: letters, digits and dashes of ASCII, never empty, never reserved."""
    # Letters lose their accents; what has no ASCII form at all is left out.
    plain = unicodedata.normalize("NFKD", prompt).encode("ascii", "ignore").decode()
    name = re.sub(r"[^A-Za-z0-9]+", "-", plain).strip("-")[:NAME_LENGTH].strip("-").lower()
    return "video" if not name else f"{name}-" if name in RESERVED else name


def output_name(index: int, prompt: str, sample: int, ending: str = ".mp4") -> str:
    """Return the name of a prompt's video among many: sorted by prompt, then by sample."""
    return f"{index:04d}-{safe_name(prompt)}-{sample}{ending}"


# ---------------------------------------------------------------- extension --
def extend_prompts(
    prompts: list[str], model: str | None, *, name: str | None = None, key: str | None = None
) -> list[str]:
    """Return a longer prompt for each, by the language model at `model`.

    model: a folder of transformers, or an http(s) address.

    name, key: which model behind the address, and the key it asks for. Raises ValueError if there is no answer.
    """
    if not model:
        raise ValueError(
            "--extend-prompt needs a language model: the folder of a chat model of transformers (for instance after "
            "`huggingface-cli download Qwen/Qwen2.5-1.5B-Instruct --local-dir qwen`), or the address of an "
            "OpenAI-compatible server such as http://localhost:11434/v1"
        )
    is_address = model.startswith(("http://", "https://"))
    ask = partial(_ask_server, model, name, key) if is_address else _local_model(Path(model))
    # Each different prompt is asked for once; models like to quote their answer.
    longer = {prompt: " ".join(ask(_messages(prompt)).split()).strip('" ') for prompt in dict.fromkeys(prompts)}
    if not all(longer.values()):
        raise ValueError(f"{model}: answered with nothing; try again or another model")
    return [longer[prompt] for prompt in prompts]


def _messages(prompt: str) -> Messages:
    return [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": prompt}]


def _ask_server(address: str, name: str | None, key: str | None, messages: Messages) -> str:
    body = {"messages": messages, "max_tokens": ANSWER_TOKENS, **({"model": name} if name else {})}
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    url = address.rstrip("/") + "/chat/completions"
    try:
        with urlopen(HttpRequest(url, json.dumps(body).encode(), headers), timeout=TIMEOUT) as response:
            answer = json.loads(response.read())
        return str(answer["choices"][0]["message"]["content"])
    except (URLError, OSError, ValueError) as error:
        raise ValueError(f"{url}: gave no answer ({error})") from error
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{url}: answered without choices; it is not an OpenAI-compatible address") from error


def _local_model(folder: Path) -> Callable[[Messages], str]:
    """Return the chat model of a folder, loaded once, as a function from messages to its answer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: is neither a folder of a chat model (with config.json) nor an http address")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        model: Any = AutoModelForCausalLM.from_pretrained(str(folder), local_files_only=True).eval()
        tokenizer.apply_chat_template(_messages(""), tokenize=False)  # raises for a model that is not for chats
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder}: is no usable chat model ({' '.join(str(error).split())[:200]})") from error

    def ask(messages: Messages) -> str:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        # The template has written the special tokens already.
        inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False, return_token_type_ids=False)
        # Not sampled, so that the same prompts give the same videos again.
        tokens = model.generate(**inputs, max_new_tokens=ANSWER_TOKENS, do_sample=False)
        return str(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))

    return ask
