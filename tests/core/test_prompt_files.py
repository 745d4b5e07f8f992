"""Prompts become safe names; longer prompts come from a model that the user names, and from nowhere else."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfforcing_core.generate import prompt_files
from selfforcing_core.generate.prompt_files import (
    INSTRUCTION,
    extend_prompts,
    output_name,
    read_extended,
    read_lines,
    read_prompts,
    safe_name,
)


@given(st.text(max_size=300))
def test_any_prompt_gives_a_name_that_every_file_system_takes(prompt: str) -> None:
    name = safe_name(prompt)
    assert name
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
    assert name not in prompt_files.RESERVED
    assert len(output_name(9999, prompt, 99)) < 100


def test_file_names_of_prompts_stay_readable() -> None:
    assert safe_name("A red square, moving LEFT!") == "a-red-square-moving-left"
    assert safe_name("Caf\u00e9 \u2603") == "cafe"
    assert safe_name("\u732b") == "video"
    assert safe_name("con") == "con-"


def test_prompt_files_are_read_line_by_line(tmp_path: Path) -> None:
    file = tmp_path / "p.txt"
    file.write_bytes("\ufeffone\r\n\r\n  two \n".encode())
    assert read_prompts(file) == ["one", "two"]
    assert read_extended(file, ["a", "b"]) == ["one", "two"]
    with pytest.raises(ValueError, match="holds 2 prompts for 3"):
        read_extended(file, ["a", "b", "c"])
    file.write_text("\n \n")
    with pytest.raises(ValueError, match="holds no prompt"):
        read_prompts(file)
    file.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ValueError, match="it is not UTF-8"):
        read_prompts(file)


SEPARATORS = "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"  # line ends to str.splitlines, none to an editor


@given(
    st.lists(st.text(st.sampled_from("ab " + SEPARATORS), min_size=1), min_size=1),
    st.sampled_from(["\n", "\r\n", "\r"]),
)
def test_prompt_files_are_cut_at_line_ends_only(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], end: str
) -> None:
    """What else separates lines somewhere stays in its prompt, to be cleaned as any other text."""
    file = tmp_path_factory.getbasetemp() / "lines.txt"
    for last in ("", end):
        file.write_bytes((end.join(["first", *lines]) + last).encode())
        assert read_prompts(file) == ["first", *(line.strip() for line in lines if line.strip())]
        assert read_lines(file) == ["first", *lines]
    file.write_bytes(end.join(lines).encode())
    kept = [line.strip() for line in lines if line.strip()]
    if kept:
        assert read_extended(file, kept) == kept


@pytest.fixture
def server() -> Iterator[tuple[str, list[dict[str, Any]], dict[str, Any]]]:
    """An OpenAI-compatible address, what it was asked, and what it answers."""
    asked: list[dict[str, Any]] = []
    answer: dict[str, Any] = {"choices": [{"message": {"content": ' "A long\n caption."  '}}]}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append({"path": self.path, "key": self.headers.get("Authorization"), **body})
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        def log_message(self, *_: Any) -> None:
            pass

    http = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{http.server_port}/v1", asked, answer
    http.shutdown()
    thread.join()
    http.server_close()


def test_a_server_writes_the_longer_prompt(server: tuple[str, list[dict[str, Any]], dict[str, Any]]) -> None:
    address, asked, answer = server
    assert extend_prompts(["a cat"], address, name="qwen", key="secret") == ["A long caption."]
    assert (asked[0]["path"], asked[0]["model"], asked[0]["key"]) == ("/v1/chat/completions", "qwen", "Bearer secret")
    assert [message["content"] for message in asked[0]["messages"]] == [INSTRUCTION, "a cat"]
    answer.clear()
    with pytest.raises(ValueError, match="answered without choices"):
        extend_prompts(["a cat"], address)
    answer["choices"] = [{"message": {"content": "  "}}]
    with pytest.raises(ValueError, match="answered with nothing"):
        extend_prompts(["a cat"], address)


def test_no_answer_and_no_model_are_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="gave no answer"):
        extend_prompts(["a cat"], "http://127.0.0.1:9/v1")
    with pytest.raises(ValueError, match="needs a language model"):
        extend_prompts(["a cat"], "")
    with pytest.raises(ValueError, match="neither a folder of a chat model"):
        extend_prompts(["a cat"], str(tmp_path))


def test_a_local_chat_model_writes_the_longer_prompt(tmp_path: Path) -> None:
    """With random weights it writes nonsense, but it is asked in its own template and only its answer comes back."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<end>", "<unk>", "shot", "of", "cat", "light", "slowly", "a"]
    core = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", unk_token="<unk>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    tokenizer.save_pretrained(str(tmp_path))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=1024,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(str(tmp_path))
    result = extend_prompts(["a cat"], str(tmp_path))[0]
    assert set(result.split()) <= set(words)
    assert INSTRUCTION not in result
