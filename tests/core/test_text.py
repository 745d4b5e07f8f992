"""Prompts to embeddings: the tiny bundle's encoder, original Wan UMT5 names, and the training command.

tests/core/test_golden.py compares the numbers of Wan's encoder with the reference.
"""

from __future__ import annotations

import hashlib
import html
import json
import logging
import random
import re
import shutil
import socket
import sys
from pathlib import Path
from typing import Any

import ftfy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from packaging.version import Version
from safetensors.torch import load_file, save_file
from torch import Tensor

from selfforcing_core.codecs import text as text_module
from selfforcing_core.codecs.embedding_folder import EmbeddingFolder
from selfforcing_core.codecs.text import TextEncoder, clean_prompt, encoder_bytes
from selfforcing_core.codecs.umt5 import umt5_from_wan_state_dict
from selfforcing_core.codecs.umt5_layout import umt5_key_from_wan, wan_umt5_shapes, wan_umt5_sizes
from selfforcing_core.generate import run
from selfforcing_core.generate.cli import main
from selfforcing_core.weights.load import load_text_encoder
from train.tiny import text as training
from train.tiny.world import Scene, combinations, heldout

ROOT = Path(__file__).resolve().parents[2]
BUNDLE = ROOT / "assets" / "tiny" / "text_encoder"
PROMPTS = ["", "a red square moving left slowly", "a blue circle moving up quickly on a navy background"]
WAN_SIZES = {"vocab": 50, "dim": 24, "dim_attn": 32, "dim_ffn": 40, "num_heads": 4, "num_layers": 2, "num_buckets": 32}


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    return TextEncoder.from_folder(BUNDLE)


def random_wan_weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in wan_umt5_shapes(**WAN_SIZES).items()}


# --------------------------------------------------------------------- files --
def test_an_original_file_finds_the_tokenizer_beside_it(tmp_path: Path) -> None:
    weights = random_wan_weights() | {"token_embedding.weight": torch.randn(300, WAN_SIZES["dim"])}
    file = tmp_path / "models_t5.pth"
    torch.save(weights, file)
    with pytest.raises(ValueError, match="no tokenizer beside it"):
        load_text_encoder(file)
    (tmp_path / "google").mkdir()
    shutil.copytree(BUNDLE, tmp_path / "google" / "umt5-xxl")
    loaded = load_text_encoder(file)
    wanted = TextEncoder(TextEncoder.from_folder(BUNDLE).tokenizer, umt5_from_wan_state_dict(weights), text_len=16)
    assert torch.equal(loaded.encode(PROMPTS), wanted.encode(PROMPTS))
    torch.save({"a": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match="this is not Wan's UMT5 encoder"):
        load_text_encoder(file)


def transformers_file() -> dict[str, Tensor]:
    """The bundle's encoder as ComfyUI's files have it: transformers' names, the tokenizer as a tensor of bytes."""
    tokenizer = torch.frombuffer(bytearray((BUNDLE / "tokenizer.json").read_bytes()), dtype=torch.uint8)
    return {**load_file(BUNDLE / "model.safetensors"), "spiece_model": tokenizer}


@pytest.mark.parametrize("extra", ["", "text_encoder.", "whole"])
def test_a_file_with_transformers_names_is_the_same_encoder(tmp_path: Path, encoder: TextEncoder, extra: str) -> None:
    weights = transformers_file()
    if extra == "whole":  # the whole UMT5, of which Wan reads the encoder
        weights |= {"encoder.embed_tokens.weight": weights["shared.weight"].clone(), "lm_head.weight": torch.ones(1)}
        weights |= {"decoder.block.0.layer.0.SelfAttention.q.weight": torch.ones(1)}
    elif extra:
        weights = {extra + key: value for key, value in weights.items()} | {"vae.x": torch.ones(1)}
    save_file(weights, tmp_path / "umt5_xxl_fp16.safetensors")
    loaded = load_text_encoder(tmp_path / "umt5_xxl_fp16.safetensors")  # the tokenizer is inside
    assert loaded.text_len == 512
    assert torch.equal(loaded.encode(PROMPTS)[:, : encoder.text_len], encoder.encode(PROMPTS))
    shutil.copy(BUNDLE / "tokenizer.json", tmp_path)
    shutil.copy(BUNDLE / "tokenizer_config.json", tmp_path)
    beside = load_text_encoder(tmp_path / "umt5_xxl_fp16.safetensors")
    assert torch.equal(beside.encode(PROMPTS), encoder.encode(PROMPTS))
    count = sum(parameter.numel() for parameter in encoder.model.parameters())
    assert encoder_bytes(tmp_path / "umt5_xxl_fp16.safetensors", torch.bfloat16) == 2 * count


def test_a_scaled_8_bit_file_is_the_encoder_that_it_stands_for(tmp_path: Path) -> None:
    stored, exact = {"scaled_fp8": torch.zeros(0)}, {}
    for key, value in transformers_file().items():
        stored[key] = exact[key] = value
        if "SelfAttention" in key and "bias" not in key:
            scale = value.float().abs().max() / 448
            stored[key] = (value.float() / scale).to(torch.float8_e4m3fn)
            stored[key.replace("weight", "scale_weight")] = scale.reshape(())
            exact[key] = stored[key].float() * scale
    for name, tensors in (("scaled", stored), ("exact", exact)):
        save_file(tensors, tmp_path / f"{name}.safetensors")
    scaled, wanted = (load_text_encoder(tmp_path / f"{name}.safetensors") for name in ("scaled", "exact"))
    assert torch.equal(scaled.encode(PROMPTS), wanted.encode(PROMPTS))


def test_a_tokenizer_inside_that_cannot_be_read_says_which_file_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = transformers_file()
    file = tmp_path / "umt5.safetensors"
    for data, word in ((b"{broken", "damaged tokenizer"), (b"\x0a\x05junk", "sentencepiece model")):
        save_file({**weights, "spiece_model": torch.frombuffer(bytearray(data), dtype=torch.uint8)}, file)
        monkeypatch.setattr(text_module, "_is_installed", lambda package: False)
        with pytest.raises(ValueError, match=word) as caught:
            load_text_encoder(file)
        assert "google/umt5-xxl/tokenizer.json" in str(caught.value)
    save_file({**weights, "spiece_model": torch.ones(3)}, file)
    with pytest.raises(ValueError, match="not bytes"):
        load_text_encoder(file)


def test_a_sentencepiece_model_inside_the_file_tokenises_as_sentencepiece(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece", reason="the package sentencepiece is not installed")
    lines = [
        " ".join(random.Random(seed).choices(["red", "blue", "square", "circle", "moving"], k=9)) for seed in range(300)
    ]
    (tmp_path / "lines.txt").write_text("\n".join(lines))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "lines.txt"),
        model_prefix=str(tmp_path / "m"),
        vocab_size=40,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    data = (tmp_path / "m.model").read_bytes()
    tokenizer = text_module._tokenizer_from_bytes(data, tmp_path)
    wanted = sentencepiece.SentencePieceProcessor(model_proto=data, add_eos=True)
    assert [tokenizer(line)["input_ids"] for line in lines] == [wanted.encode(line) for line in lines]


# ------------------------------------------------------------------- prompts --
def test_prompts_are_unescaped_twice_and_their_white_space_collapsed() -> None:
    assert clean_prompt("  a &amp;lt;red&amp;gt;\n\tsquare &amp; more ") == "a <red> square & more"


def reference_clean(prompt: str) -> str:
    """What wan/modules/tokenizers.py of the reference does before it tokenizes (basic_clean, whitespace_clean)."""
    unescaped = html.unescape(html.unescape(ftfy.fix_text(prompt))).strip()
    return re.sub(r"\s+", " ", unescaped).strip()


@pytest.mark.parametrize(
    ("typed", "cleaned"),
    [
        ("reads \u201cOpen\u201d, the cat\u2019s", 'reads "Open", the cat\'s'),
        ("\u4e00\u53ea\u732b\uff0c\u5954\u8dd1\uff01", "\u4e00\u53ea\u732b,\u5954\u8dd1!"),
        ("\ufb01reworks", "fireworks"),
        ("a caf\u00c3\u00a9", "a caf\u00e9"),
        ("\ufeffa\x07 b\x00", "a b"),
        ("Tom &amp;amp; Jerry", "Tom & Jerry"),
        ("a\u2028b\u2029c\x0cd\r\ne\u00a0f", "a b c d e f"),
        ("a,\x0bb", "a,b"),  # ftfy drops control characters, this separator among them
    ],
)
def test_prompts_reach_the_tokenizer_as_in_the_reference(typed: str, cleaned: str) -> None:
    assert clean_prompt(typed) == reference_clean(typed) == cleaned


@given(st.text())
def test_any_prompt_is_cleaned_as_in_the_reference(prompt: str) -> None:
    assert clean_prompt(prompt) == reference_clean(prompt)


def test_curly_and_straight_quotes_are_one_prompt(encoder: TextEncoder) -> None:
    # One by one: rows of one batch may differ in their last bits, by the threads that computed them.
    curly = encoder.encode(["the \u201cred\u201d one\u2019s"])
    straight = encoder.encode(['the "red" one\'s'])
    assert torch.equal(curly, straight)


def test_without_ftfy_a_prompt_is_refused_and_not_cleaned_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(ValueError, match="pip install ftfy"):
        clean_prompt("a")


def test_rows_past_the_prompt_are_zero_and_the_others_have_unit_scale(encoder: TextEncoder) -> None:
    rows = encoder.encode(PROMPTS)
    assert rows.shape == (3, 16, encoder.text_dim)
    for row, words in zip(rows, (0, 6, 10)):
        length = words + 1  # the end token
        assert not row[length:].any()
        torch.testing.assert_close(row[:length].pow(2).mean(-1), torch.ones(length), atol=2e-3, rtol=0)


def test_a_batch_of_prompts_equals_one_by_one(encoder: TextEncoder) -> None:
    alone = torch.cat([encoder.encode([prompt]) for prompt in PROMPTS])
    torch.testing.assert_close(encoder.encode(PROMPTS), alone, atol=1e-5, rtol=1e-5)


def test_case_and_punctuation_do_not_matter_to_the_tiny_encoder(encoder: TextEncoder) -> None:
    tidy, loud = encoder.encode(["a red square moving left slowly", " A  RED square, moving left; SLOWLY! "])
    assert torch.equal(tidy, loud)


def test_every_word_of_a_held_out_caption_is_known_and_every_caption_differs(encoder: TextEncoder) -> None:
    captions = [Scene(*words).caption() for words in heldout()]
    assert all(encoder.tokenizer.unk_token_id not in encoder.tokenizer(caption)["input_ids"] for caption in captions)
    flat = encoder.encode(captions).flatten(1)
    distance = torch.cdist(flat, flat) + 100 * torch.eye(len(captions))
    assert distance.min() > 1


def test_an_unknown_word_is_encoded_and_leaves_the_others_recognisable(encoder: TextEncoder) -> None:
    plain, strange = encoder.encode(["a red square", "a zebra red square"])
    red = torch.stack([plain[1], strange[2]])
    assert strange.isfinite().all()
    assert torch.cosine_similarity(red[:1], red[1:]).item() > 0.5


def test_a_prompt_too_long_is_cut_and_the_log_says_what_was_lost(
    encoder: TextEncoder, caplog: pytest.LogCaptureFixture
) -> None:
    long = " ".join(["red"] * 15 + ["blue", "circle"])
    with caplog.at_level(logging.WARNING, "selfforcing_core.codecs.text"):
        rows = encoder.encode([long, "a red square"])
    assert [record.getMessage() for record in caplog.records] == [
        "prompt of 18 tokens cut to 16; the model does not see: 'blue circle'"
    ]
    torch.testing.assert_close(rows[:1], encoder.encode([" ".join(["red"] * 15)]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("prompts", "message"), [([], "no prompts"), ("a red square", r"write \[prompt\]")])
def test_what_is_not_a_list_of_prompts_is_refused(encoder: TextEncoder, prompts: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encoder.encode(prompts)


# ------------------------------------------------------------------- loading --
def test_loading_needs_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert TextEncoder.from_folder(BUNDLE, dtype=torch.bfloat16).encode([""]).dtype == torch.bfloat16


def test_a_folder_without_an_encoder_is_refused_with_what_it_needs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"needs config\.json, model\.safetensors and tokenizer\.json"):
        TextEncoder.from_folder(tmp_path)


@pytest.mark.parametrize("missing", ["tokenizer.json", "model.safetensors"])
def test_an_incomplete_folder_is_refused_with_the_file_it_lacks(tmp_path: Path, missing: str) -> None:
    for file in BUNDLE.iterdir():
        if file.name != missing:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match=missing):
        TextEncoder.from_folder(tmp_path)


# ------------------------------------------------------- original Wan layout --
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_encoder_is_that_of_transformers(tmp_path: Path, dtype: torch.dtype) -> None:
    """In every number, from a folder that transformers wrote, with distances near and far and rows nobody reads."""
    import transformers
    from transformers import UMT5EncoderModel

    weights = random_wan_weights()
    assert wan_umt5_sizes({name: tuple(tensor.shape) for name, tensor in weights.items()}) == WAN_SIZES
    sizes = {name: size for name, size in WAN_SIZES.items() if name != "num_buckets"}
    network = UMT5EncoderModel(training.umt5_config(**sizes)).eval()
    parameters = dict(network.named_parameters())
    assert {umt5_key_from_wan(name) for name in weights} == set(parameters)
    with torch.no_grad():
        for name, tensor in weights.items():
            parameters[umt5_key_from_wan(name)].copy_(tensor)
    network.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUNDLE / name, tmp_path)
    wanted = UMT5EncoderModel.from_pretrained(tmp_path, torch_dtype=dtype).eval()
    encoder = TextEncoder.from_folder(tmp_path, dtype=dtype)
    assert encoder.text_dim == WAN_SIZES["dim"]
    ids = torch.arange(2 * 300).view(2, 300) * 7 % WAN_SIZES["vocab"]
    mask = torch.ones_like(ids)
    mask[1, 200:] = 0
    with torch.no_grad():
        rows, read = wanted(input_ids=ids, attention_mask=mask).last_hidden_state, mask.bool()
        ours = encoder.model(ids, mask)
        assert torch.equal(encoder.model.embed(ids, mask), ours.where(read[..., None], torch.zeros_like(ours)))
    if Version(transformers.__version__).major >= 5:
        assert torch.equal(ours, rows)
    elif dtype == torch.float32:
        torch.testing.assert_close(ours[read], rows[read], atol=1e-2, rtol=1e-2)
    else:
        pytest.skip("transformers 4 computes scores and sums one by one, which rounds in 16 bits on the way")


def test_a_folder_of_another_encoder_is_refused_by_what_it_computes(tmp_path: Path) -> None:
    shutil.copytree(BUNDLE, tmp_path, dirs_exist_ok=True)
    config = json.loads((BUNDLE / "config.json").read_text())
    for name, value, words in (
        ("model_type", "t5", "must be of type 'umt5'"),
        ("feed_forward_proj", "relu", "an encoder with feed_forward_proj 'relu'"),
        ("layer_norm_epsilon", 1e-5, "with layer_norm_epsilon 1e-05"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, name: value}))
        with pytest.raises(ValueError, match=words):
            TextEncoder.from_folder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"no usable config\.json"):
        TextEncoder.from_folder(tmp_path)


def test_incomplete_or_contradictory_wan_weights_are_refused() -> None:
    weights = random_wan_weights()
    with pytest.raises(ValueError, match="has 4 heads"):
        umt5_from_wan_state_dict(weights, num_heads=8)
    with pytest.raises(ValueError, match=r"blocks\.1\.attn\.o\.weight has shape \(24, 31\)"):
        umt5_from_wan_state_dict({**weights, "blocks.1.attn.o.weight": torch.zeros(24, 31)})
    with pytest.raises(ValueError, match=r"unexpected .'lora'"):
        umt5_from_wan_state_dict({**weights, "lora": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"missing .'blocks\.1\.norm2\.weight'"):
        umt5_from_wan_state_dict({name: t for name, t in weights.items() if name != "blocks.1.norm2.weight"})
    with pytest.raises(ValueError, match="not Wan's UMT5 encoder"):
        umt5_from_wan_state_dict({"blocks.0.self_attn.q.weight": torch.zeros(2, 2)})


# ------------------------------------------------------------------ training --
def test_training_never_draws_a_held_out_combination() -> None:
    unseen, rng = heldout(), random.Random(3)
    pool = sorted(set(combinations()) - set(unseen))
    said = {training.draw_caption(rng, pool, training.TextTraining())[1] for _ in range(3000)}
    assert not said & set(unseen)


def test_a_caption_can_leave_words_out_and_turn_them_around() -> None:
    words = ("red", "square", "left", "slowly", "navy")
    assert training.phrase_caption(words, [True] * 5, 0) == Scene(*words).caption()
    assert training.phrase_caption(words, [True] * 5, 3) == "on a navy background a red square moving slowly left"
    assert training.phrase_caption(words, [True, True, True, True, False], 0) == "a red square moving left slowly"
    assert training.phrase_caption(words, [False] * 5, 2) == ""


def test_the_training_command_writes_a_folder_that_loads_and_is_reproducible(tmp_path: Path) -> None:
    for name in ("one", "two"):
        training.main(["--out", str(tmp_path / name), "--steps", "2", "--seed", "5"])
    files = [sorted(file.name for file in (tmp_path / name).iterdir()) for name in ("one", "two")]
    assert files[0] == files[1] == sorted(file.name for file in BUNDLE.iterdir())
    assert all((tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in files[0])
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["one", "two"]
    assert TextEncoder.from_folder(tmp_path / "one").encode(["a red square"]).isfinite().all()


# -------------------------------------------------------- embeddings on disk --
def test_kept_embeddings_make_the_same_video_without_the_encoder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A known prompt loads no encoder; a damaged file is made anew."""
    folder, loads, load = tmp_path / "kept", [], run.build_text_encoder
    monkeypatch.setattr(run, "build_text_encoder", lambda *a, **k: loads.append(a) or load(*a, **k))

    def latents(name: str, *more: str) -> Tensor:
        out, kept = tmp_path / f"{name}.mp4", tmp_path / f"{name}.safetensors"
        command = ["generate", "--prompt", "a red square", "--frames", "9", "--out", str(out), "--latents", str(kept)]
        assert main([*command, *more]) == 0
        return next(iter(load_file(kept).values()))

    plain = latents("plain")
    assert torch.equal(latents("first", "--embeddings", str(folder)), plain)
    (file,) = folder.iterdir()
    assert len(loads) == 2
    assert torch.equal(latents("second", "--embeddings", str(folder)), plain)
    assert len(loads) == 2, "the embeddings were read"
    file.write_bytes(file.read_bytes()[:-7])
    assert torch.equal(latents("third", "--embeddings", str(folder)), plain)
    assert len(loads) == 3
    assert torch.equal(latents("fourth", "--embeddings", str(folder)), plain)
    assert len(loads) == 3
    capsys.readouterr()


def test_another_encoder_under_the_same_name_finds_nothing_of_the_first(tmp_path: Path) -> None:
    encoder = tmp_path / "encoder"
    shutil.copytree(BUNDLE, encoder)
    before = EmbeddingFolder(tmp_path / "kept", encoder, torch.float32, "used")
    assert before.path("a") == EmbeddingFolder(tmp_path / "kept", encoder, torch.float32, "used").path("a")
    assert before.path("a") != before.path("b")
    assert before.path("a") != EmbeddingFolder(tmp_path / "kept", encoder, torch.bfloat16, "used").path("a")
    assert before.path("a") != EmbeddingFolder(tmp_path / "kept", encoder, torch.float32, "all").path("a")
    weights = encoder / "model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    assert before.path("a") != EmbeddingFolder(tmp_path / "kept", encoder, torch.float32, "used").path("a")


def test_embeddings_are_kept_by_the_text_that_the_tokenizer_gets(tmp_path: Path) -> None:
    """What cleaning leaves alone is found where earlier versions kept it; what it changes is never one of theirs."""
    folder = EmbeddingFolder(tmp_path / "kept", BUNDLE, torch.float32, "used")

    def earlier(text: str) -> Path:
        content = f"{folder.encoder}\n{text}"
        return folder.folder / f"{hashlib.sha256(content.encode()).hexdigest()}.safetensors"

    assert folder.path("a red square") == folder.path(" a  red\nsquare") == earlier("a red square")
    curly = "a \u201cred\u201d square"
    assert folder.path(curly) == folder.path('a "red" square') != earlier(curly)
    nested = "<b> &amp;amp;amp;lt;"  # behind a <, ftfy leaves entities, and twice does not undo these
    assert clean_prompt(clean_prompt(nested)) != clean_prompt(nested)
    assert folder.path(nested) != earlier(clean_prompt(nested))
    assert folder.path(nested) != folder.path(clean_prompt(nested))
