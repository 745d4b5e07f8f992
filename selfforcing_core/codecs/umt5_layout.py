"""What the parameters of Wan's text encoder are called in its own files and elsewhere, their shapes and sizes.

Wan's repositories keep the encoder of google/umt5-xxl under names of their own (github.com/Wan-Video/Wan2.1,
wan/modules/t5.py); transformers and llama.cpp have others.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

NUM_BUCKETS = 32  # of distances between tokens; of every T5

# Patterns of Wan's names, and what transformers has in their place. In a block, layer 0 is attention, layer 1 the gated
# feed-forward network.
_WAN_TO_TRANSFORMERS = (
    (r"^token_embedding\.", "shared."),
    (r"^norm\.", "encoder.final_layer_norm."),
    (r"^blocks\.(\d+)\.norm1\.", r"encoder.block.\1.layer.0.layer_norm."),
    (r"^blocks\.(\d+)\.norm2\.", r"encoder.block.\1.layer.1.layer_norm."),
    (r"^blocks\.(\d+)\.attn\.([qkvo])\.", r"encoder.block.\1.layer.0.SelfAttention.\2."),
    (r"^blocks\.(\d+)\.pos_embedding\.embedding\.", r"encoder.block.\1.layer.0.SelfAttention.relative_attention_bias."),
    (r"^blocks\.(\d+)\.ffn\.gate\.0\.", r"encoder.block.\1.layer.1.DenseReluDense.wi_0."),
    (r"^blocks\.(\d+)\.ffn\.fc1\.", r"encoder.block.\1.layer.1.DenseReluDense.wi_1."),
    (r"^blocks\.(\d+)\.ffn\.fc2\.", r"encoder.block.\1.layer.1.DenseReluDense.wo."),
)
# What llama.cpp's converter, and so a GGUF file, calls them (gguf's constants.py, architecture t5encoder).
_WAN_TO_GGUF = (
    (r"^token_embedding\.", "token_embd."),
    (r"^norm\.", "enc.output_norm."),
    (r"^blocks\.(\d+)\.norm1\.", r"enc.blk.\1.attn_norm."),
    (r"^blocks\.(\d+)\.norm2\.", r"enc.blk.\1.ffn_norm."),
    (r"^blocks\.(\d+)\.attn\.([qkvo])\.", r"enc.blk.\1.attn_\2."),
    (r"^blocks\.(\d+)\.pos_embedding\.embedding\.", r"enc.blk.\1.attn_rel_b."),
    (r"^blocks\.(\d+)\.ffn\.gate\.0\.", r"enc.blk.\1.ffn_gate."),
    (r"^blocks\.(\d+)\.ffn\.fc1\.", r"enc.blk.\1.ffn_up."),
    (r"^blocks\.(\d+)\.ffn\.fc2\.", r"enc.blk.\1.ffn_down."),
)


def umt5_key_from_wan(key: str, *, is_gguf: bool = False) -> str:
    """Return transformers' name, or that of a GGUF file, of an original Wan UMT5 parameter.

    Raises ValueError for any other name.
    """
    for pattern, replacement in _WAN_TO_GGUF if is_gguf else _WAN_TO_TRANSFORMERS:
        renamed, count = re.subn(pattern, replacement, key)
        if count:
            return renamed
    raise ValueError(f"{key!r} is not a parameter of Wan's UMT5 encoder (expected names like blocks.0.attn.q.weight)")


def wan_umt5_shapes(
    *,
    vocab: int,
    dim: int,
    dim_attn: int,
    dim_ffn: int,
    num_heads: int,
    num_layers: int,
    num_buckets: int = NUM_BUCKETS,
) -> dict[str, tuple[int, ...]]:
    """Map every parameter of an original Wan UMT5 encoder to its shape."""
    # T5 has no biases, and norms without a shift.
    block = {
        "norm1.weight": (dim,),
        "attn.q.weight": (dim_attn, dim),
        "attn.k.weight": (dim_attn, dim),
        "attn.v.weight": (dim_attn, dim),
        "attn.o.weight": (dim, dim_attn),
        "norm2.weight": (dim,),
        "ffn.gate.0.weight": (dim_ffn, dim),
        "ffn.fc1.weight": (dim_ffn, dim),
        "ffn.fc2.weight": (dim, dim_ffn),
        "pos_embedding.embedding.weight": (num_buckets, num_heads),  # every layer has its own, unlike plain T5
    }
    shapes: dict[str, tuple[int, ...]] = {"token_embedding.weight": (vocab, dim), "norm.weight": (dim,)}
    for index in range(num_layers):
        shapes |= {f"blocks.{index}.{name}": shape for name, shape in block.items()}
    return shapes


def wan_umt5_sizes(shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """Return the sizes of an original Wan UMT5 encoder, keywords of `umt5_config`, from its parameters' shapes.

    Raises ValueError where these are the parameters of something else.
    """
    needed = ("token_embedding.weight", "blocks.0.attn.q.weight", "blocks.0.ffn.fc1.weight")
    bias = "blocks.0.pos_embedding.embedding.weight"
    missing = [key for key in (*needed, bias) if len(shapes.get(key, ())) != 2]
    if missing:
        raise ValueError(f"this is not Wan's UMT5 encoder: it has no {missing[0]!r}; look for models_t5_umt5-xxl-enc")
    embedding, query, ffn = (shapes[key] for key in needed)
    blocks = {int(match.group(1)) for key in shapes if (match := re.match(r"blocks\.(\d+)\.", key))}
    return {
        "vocab": embedding[0],
        "dim": embedding[1],
        "dim_attn": query[0],
        "dim_ffn": ffn[0],
        "num_heads": shapes[bias][1],
        "num_layers": max(blocks) + 1,
        "num_buckets": shapes[bias][0],
    }


def check_umt5_shapes(shapes: Mapping[str, Sequence[int]], sizes: Mapping[str, int]) -> None:
    """Raise ValueError unless these are the shapes of all parameters of an encoder of these sizes, and of no others."""
    expected = wan_umt5_shapes(**sizes)
    missing = sorted(set(expected) - set(shapes))
    unexpected = sorted(set(shapes) - set(expected))
    if missing or unexpected:
        raise ValueError(
            f"this is not a complete Wan UMT5 encoder: missing {missing[:3]} ({len(missing)}), "
            f"unexpected {unexpected[:3]} ({len(unexpected)})"
        )
    for key, shape in expected.items():
        if tuple(shapes[key]) != tuple(shape):
            raise ValueError(f"{key} has shape {tuple(shapes[key])}, but the other layers ask for {tuple(shape)}")
