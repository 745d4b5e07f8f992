"""Embeddings of prompts kept on disk under names that say what was encoded, and by which encoder.

A file is named by a hash of the prompt as the tokenizer gets it, the number type, and what the encoder's files hold
(names, sizes and samples of their bytes). So another encoder under the same name finds nothing of the one before. Nor
does another way of cleaning prompts (a newer ftfy, say): what it changes is another prompt.

Letters: P text tokens, E text width.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..atomic import make_folder, replacing
from .text import clean_prompt

log = logging.getLogger(__name__)
KEY = "prompt_embeds"  # the one tensor of a file, [P, E]
# How many places of each of an encoder's files are read, and how many bytes there. All of 11 GB would take longer to
# read than a prompt to encode.
NUM_SAMPLES, SAMPLE_BYTES = 16, 2**16


class EmbeddingFolder:
    """The kept embeddings of one encoder in one number type. Several processes may share a folder.

    rows: which a prompt's embeddings have, "used" by its tokens or "all" with the padding; part of a file's name.
    """

    def __init__(self, folder: str | Path, encoder: Path, dtype: torch.dtype, rows: str) -> None:
        self.folder, self.encoder = Path(folder), f"{_identity(encoder)} {dtype} {rows}"

    def path(self, prompt: str) -> Path:
        """Return the file of a prompt's embeddings, whether it exists or not."""
        cleaned = clean_prompt(prompt)
        # Older files are named by the prompt as it was typed, and that was encoded. Where cleaning a cleaned prompt
        # changes it once more, one of them could have this prompt's name and embeddings of another text: the mark keeps
        # them apart.
        mark = "" if clean_prompt(cleaned) == cleaned else " cleaned"
        content = f"{self.encoder}{mark}\n{cleaned}"
        return self.folder / f"{hashlib.sha256(content.encode()).hexdigest()}.safetensors"

    def get(self, prompt: str, encode: Callable[[str], Tensor]) -> Tensor:
        """Return the embeddings [P, E] of a prompt on the CPU: read, or encoded and kept.

        A file that cannot be read is written anew, with a warning. Raises NotWritten where it cannot be written.
        """
        path = self.path(prompt)
        if path.is_file():
            try:
                return load_file(path)[KEY]
            except (SafetensorError, KeyError, OSError) as error:
                log.warning("%s cannot be read (%s); the prompt is encoded again", path, error)
        embeddings_PE = encode(prompt).contiguous()
        make_folder(path.parent)
        # Two processes that encode the same prompt both write the same bytes; the last one to rename its file stays.
        with replacing(path, overwrite=True) as temporary:
            save_file({KEY: embeddings_PE}, temporary)
        return embeddings_PE


def _identity(encoder: Path) -> str:
    """Return a hash of a file, or of a folder's files: names, sizes, and bytes at even distances from end to end."""
    digest = hashlib.sha256()
    files = [encoder] if encoder.is_file() else sorted(path for path in encoder.rglob("*") if path.is_file())
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as content:
            for place in range(NUM_SAMPLES):
                # The first sample lies at the beginning, the last one ends where the file does.
                content.seek(max(size - SAMPLE_BYTES, 0) * place // (NUM_SAMPLES - 1))
                digest.update(content.read(SAMPLE_BYTES))
    return digest.hexdigest()
