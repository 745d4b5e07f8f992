"""Prompts to embeddings by a UMT5 encoder, read from folders of transformers, Wan's files and ComfyUI's.

Tokenizers are those of transformers, which is imported inside the functions that need it, so that importing this module
stays cheap.

Letters: B batch, P text tokens (at most 512 for Wan), E text width (4096 for Wan).
"""

from __future__ import annotations

import html
import importlib.util
import json
import logging
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..weights.checkpoint_header import json_object
from ..weights.scaled import chosen_tensors, count_numbers, stored_tensors
from ..weights.tensor_files import below_prefix, read_tensors
from .umt5 import EPSILON, MAX_DISTANCE, UMT5Encoder, umt5_from_wan_state_dict
from .umt5_layout import umt5_key_from_wan, wan_umt5_shapes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

WAN_TEXT_LEN = 512  # github.com/Wan-Video/Wan2.1, wan/configs/shared_config.py
# A tokenizer without a limit of its own reports a number around 1e30, as Wan's does.
_LARGEST_BELIEVABLE_LENGTH = 8192


# ------------------------------------------------------------------ prompts --
def clean_prompt(prompt: str) -> str:
    """Return a prompt as the reference hands it to its tokenizer, in training too (wan/modules/tokenizers.py).

    ftfy mends wrongly decoded text, makes curly quotes straight and full-width letters ordinary ones, and drops control
    characters; HTML entities are undone (twice, as crawled captions need); white space becomes single spaces.
    Raises ValueError where ftfy is not installed.
    """
    try:
        import ftfy
    except ImportError as error:
        raise ValueError("prompts are cleaned with the package ftfy, which is missing; pip install ftfy") from error
    unescaped = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return re.sub(r"\s+", " ", unescaped).strip()


class TextEncoder:
    """A tokenizer and a UMT5 encoder that turn prompts into the embeddings that a video model reads.

    tokenizer: appends the end token itself. text_len: the rows P that the video model was trained with.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, model: UMT5Encoder, *, text_len: int) -> None:
        if text_len < 1:
            raise ValueError(f"text_len {text_len} must be at least 1; Wan models use {WAN_TEXT_LEN}")
        self.tokenizer = tokenizer
        self.model = model.eval().requires_grad_(False)
        self.text_len = text_len

    @classmethod
    def from_folder(
        cls,
        path: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        text_len: int | None = None,
    ) -> TextEncoder:
        """Load a folder as transformers saves it (config, safetensors weights, tokenizer), from local files only.

        `text_len` defaults to the tokenizer's own limit, or 512 where it has none, as Wan's.
        Raises ValueError where the folder does not hold a UMT5 encoder and its tokenizer.
        """
        folder = Path(path)
        weights = _folder_weights(folder)
        tokenizer = _load_tokenizer(folder)
        model = _built(weights, folder, dtype, device)
        return cls(tokenizer, model, text_len=text_len or _own_text_len(tokenizer))

    @classmethod
    def from_file(
        cls, path: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
    ) -> TextEncoder:
        """Load a UMT5 encoder from one file, under the names of Wan, transformers or GGUF, in 8 bits or fewer too.

        Wan's is models_t5_umt5-xxl-enc-bf16.pth, ComfyUI's umt5_xxl_fp16.safetensors and its fp8 forms. The tokenizer
        is looked for in `google/umt5-xxl`, where Wan's repositories have it, in `tokenizer`, in the file's own folder,
        and last in the file itself (`spiece_model`). Raises ValueError where the file is no UMT5 encoder or has no
        tokenizer.
        """
        path = Path(path)
        places = [path.parent / name for name in ("google/umt5-xxl", "tokenizer", ".")]
        folder = next((place for place in places if (place / "tokenizer.json").is_file()), None)
        tensors, stored_tokenizer = _read_encoder(path)
        if folder is not None:
            tokenizer = _load_tokenizer(folder)
        elif stored_tokenizer is not None:
            tokenizer = _tokenizer_from_bytes(stored_tokenizer, path)
        else:
            raise ValueError(f"{path} has no tokenizer beside it; put google/umt5-xxl/tokenizer.json into its folder")
        model = _built(tensors, path, dtype, device)
        return cls(tokenizer, model, text_len=_own_text_len(tokenizer))

    @property
    def text_dim(self) -> int:
        """Return the width E of the embeddings."""
        return self.model.text_dim

    def to(self, device: torch.device | str) -> TextEncoder:
        """Move the network to a device and return self."""
        self.model.to(device)
        return self

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Return the embeddings [B, P, E] of prompts, in the model's dtype on its device.

        Rows past a prompt's end token are zero.
        An empty prompt is one end token. A prompt of more than P tokens is cut to P, the end token kept, as in the
        reference, and a warning says what was cut.
        """
        if isinstance(prompts, str):
            raise ValueError(f"prompts must be a list of strings, got the string {prompts!r}; write [prompt]")
        if not prompts:
            raise ValueError("there are no prompts to encode; give at least one (an empty string is allowed)")
        ids, mask = self._tokens([clean_prompt(prompt) for prompt in prompts])
        embeddings_BPE = self.model.embed(ids, mask)
        # The reference computes P rows of every prompt and zeroes those past its end. The mask keeps those rows out of
        # the others, so only as many as the longest prompt has are computed.
        return torch.nn.functional.pad(embeddings_BPE, (0, 0, 0, self.text_len - embeddings_BPE.shape[1]))

    def _tokens(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Return token ids and mask [B, P] with P the longest prompt's, at most text_len."""
        for prompt in prompts:
            self._warn_if_cut(prompt)
        batch = self.tokenizer(
            prompts, padding="longest", truncation=True, max_length=self.text_len, return_tensors="pt"
        )
        device = self.model.token_embedding.weight.device
        return batch["input_ids"].to(device), batch["attention_mask"].to(device)

    def _warn_if_cut(self, prompt: str) -> None:
        ids = self.tokenizer(prompt, verbose=False)["input_ids"]
        if len(ids) <= self.text_len:
            return
        # The last of the text_len places is the end token's.
        lost = self.tokenizer.decode(ids[self.text_len - 1 :], skip_special_tokens=True)
        log.warning("prompt of %d tokens cut to %d; the model does not see: %a", len(ids), self.text_len, lost)


def _own_text_len(tokenizer: PreTrainedTokenizerBase) -> int:
    limit = tokenizer.model_max_length
    return int(limit) if limit <= _LARGEST_BELIEVABLE_LENGTH else WAN_TEXT_LEN


def _load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in ("tokenizer.json", "spiece.model")):
        raise ValueError(f"{folder} has no tokenizer; put tokenizer.json beside the weights")
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder} has no usable tokenizer: {_first_line(error)}") from error


_SENTENCEPIECE = {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"}  # what transformers imports


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(_SENTENCEPIECE[package]) is not None
    except ModuleNotFoundError:  # find_spec imports the parent of a dotted name, here google
        return False


def _tokenizer_from_bytes(data: bytes, path: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer that a file of weights holds: a sentencepiece model, or the text of a tokenizer.json."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    is_json = data.lstrip().startswith(b"{")
    remedy = "put google/umt5-xxl/tokenizer.json into its folder"
    missing = [name for name in _SENTENCEPIECE if not is_json and not _is_installed(name)]
    if missing:
        raise ValueError(
            f"{path} holds its tokenizer as a sentencepiece model; {remedy}, or install {' and '.join(missing)}"
        )
    with tempfile.TemporaryDirectory() as folder:  # transformers reads tokenizers from files only
        file = Path(folder) / ("tokenizer.json" if is_json else "spiece.model")
        file.write_bytes(data)
        # UMT5 has no class of its own; without one AutoTokenizer would want the model's config.
        (Path(folder) / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer"}))
        try:
            if not is_json:
                return AutoTokenizer.from_pretrained(folder, local_files_only=True)
            special_tokens = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
            return PreTrainedTokenizerFast(tokenizer_file=str(file), **special_tokens)
        except Exception as error:  # sentencepiece and tokenizers raise errors of their own for damaged bytes
            raise ValueError(f"{path} holds a damaged tokenizer ({_first_line(error)[:200]}); {remedy}") from error


# What the computation of `umt5` takes for granted; a config.json that leaves an entry out means the same.
_COMPUTED = {
    "layer_norm_epsilon": EPSILON,
    "relative_attention_max_distance": MAX_DISTANCE,
    "feed_forward_proj": "gated-gelu",
}


def _folder_weights(folder: Path) -> Mapping[str, Tensor]:
    """Return the weights of a folder as transformers saves it, under Wan's names, if they are a UMT5 encoder's."""
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} is not a text encoder folder: it needs config.json, model.safetensors and tokenizer.json"
        )
    try:
        config = json_object((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} has no usable config.json: {_first_line(error)}") from error
    if config.get("model_type") != "umt5":
        raise ValueError(f"{folder} holds a {config.get('model_type')!r} model; a text encoder must be of type 'umt5'")
    for name, value in _COMPUTED.items():
        if config.get(name, value) != value:
            raise ValueError(f"{folder} is an encoder with {name} {config[name]!r}; use one with {value!r}, as Wan's")
    files = [folder / name for name in ("model.safetensors", "model.safetensors.index.json")]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise ValueError(f"{folder} has no usable UMT5 weights: it needs model.safetensors, or that of an index")
    weights, _ = _read_encoder(file)
    return weights


def encoder_bytes(path: Path, dtype: torch.dtype) -> int:
    """Return the bytes that a text encoder's weights take in this number type, of a folder or a file; load nothing.

    Raises ValueError where `path` holds no text encoder.
    """
    tensors = _read_encoder(path, is_quiet=True)[0] if path.is_file() else _folder_weights(path)
    return dtype.itemsize * count_numbers(tensors)


def _built(
    weights: Mapping[str, Tensor], place: Path, dtype: torch.dtype, device: torch.device | str | None
) -> UMT5Encoder:
    try:
        return umt5_from_wan_state_dict(weights, dtype=dtype, device=device)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


# ---------------------------------------------------------- files of weights --
TOKENIZER_KEY = "spiece_model"  # of the tensor of bytes in ComfyUI's files
# The names of the table of token embeddings: Wan's, transformers', and transformers' second one for the same tensor.
# Every encoder has one of them.
_WAN_TABLE, _TABLE, _TABLE_AGAIN = "token_embedding.weight", "shared.weight", "encoder.embed_tokens.weight"
_OTHER_HALF = ("decoder.", "lm_head.")  # of a whole UMT5, which no video model reads


def _read_encoder(path: Path, *, is_quiet: bool = False) -> tuple[Mapping[str, Tensor], bytes | None]:
    """Return the weights of an encoder under Wan's names, and the tokenizer's bytes if the file holds it."""
    try:
        tensors = read_tensors(path, is_quiet=is_quiet)
        tensors = below_prefix(tensors, (_WAN_TABLE, _TABLE, _TABLE_AGAIN), path, is_quiet=is_quiet)
    except ValueError as error:
        message = str(error)  # read_tensors names the file, below_prefix does not
        raise ValueError(message if message.startswith(str(path)) else f"{path}: {message}") from error
    stored = stored_tensors(tensors)
    tokenizer = stored.get(TOKENIZER_KEY)
    if tokenizer is not None and tokenizer.dtype not in (torch.uint8, torch.int8):
        raise ValueError(f"{path}: {TOKENIZER_KEY} is {tokenizer.dtype}, not bytes; the file is damaged")
    if _WAN_TABLE in stored:
        names = {key: key for key in stored if key != TOKENIZER_KEY}
    else:
        names = _wan_names(key for key in stored if key != TOKENIZER_KEY)
    data = None if tokenizer is None else tokenizer.contiguous().numpy().tobytes()
    return chosen_tensors(tensors, names), data


def _wan_names(keys: Iterable[str]) -> dict[str, str]:
    """Map Wan's names to a file's names of transformers or llama.cpp; others stay, so that a refusal can name them."""
    keys = [key for key in keys if not key.startswith(_OTHER_HALF)]
    if _TABLE in keys and _TABLE_AGAIN in keys:  # two names of one table
        keys.remove(_TABLE_AGAIN)
    layers = {int(match[1]) for key in keys if (match := re.match(r"(?:encoder\.block|enc\.blk)\.(\d+)\.", key))}
    # umt5_key_from_wan goes from Wan to transformers; the way back is looked up among the names of as many layers.
    # Names do not depend on the sizes.
    any_sizes = dict.fromkeys(("vocab", "dim", "dim_attn", "dim_ffn", "num_heads"), 1)
    wan_names = list(wan_umt5_shapes(**any_sizes, num_layers=len(layers)))
    names = {umt5_key_from_wan(name, is_gguf=is_gguf): name for name in wan_names for is_gguf in (False, True)}
    names[_TABLE_AGAIN] = _WAN_TABLE
    return {names.get(key, key): key for key in keys}
