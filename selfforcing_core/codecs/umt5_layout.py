"""Wan's own UMT5 files for transformers: names, shapes and sizes of their parameters, and the network with them.

Wan's repositories keep the encoder of google/umt5-xxl under names of their own (github.com/Wan-Video/Wan2.1,
wan/modules/t5.py); transformers computes the same function under others.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..weights.scaled import weight_shapes

if TYPE_CHECKING:
    from transformers import UMT5Config, UMT5EncoderModel

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


def umt5_config(
    *, vocab: int, dim: int, dim_attn: int, dim_ffn: int, num_heads: int, num_layers: int, num_buckets: int = 32
) -> UMT5Config:
    """Return transformers' configuration of a Wan UMT5 encoder, from sizes under Wan's names.

    Raises ValueError where the heads do not divide the width of the attention.
    """
    from transformers import UMT5Config

    if dim_attn % num_heads:
        raise ValueError(f"dim_attn {dim_attn} is not a multiple of num_heads {num_heads}; Wan's encoder has 64 heads")
    return UMT5Config(
        vocab_size=vocab,
        d_model=dim,
        d_kv=dim_attn // num_heads,
        d_ff=dim_ffn,
        num_layers=num_layers,
        num_heads=num_heads,
        relative_attention_num_buckets=num_buckets,
        relative_attention_max_distance=128,  # of every T5; the shapes do not show it
        feed_forward_proj="gated-gelu",  # the tanh approximation, as in Wan's t5.py
        layer_norm_epsilon=1e-6,  # of Wan's T5LayerNorm
        pad_token_id=0,  # as in google/umt5-xxl's tokenizer
        eos_token_id=1,
    )


def wan_umt5_shapes(
    *, vocab: int, dim: int, dim_attn: int, dim_ffn: int, num_heads: int, num_layers: int, num_buckets: int = 32
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


def umt5_from_wan_state_dict(
    state_dict: Mapping[str, Tensor],
    *,
    num_heads: int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> UMT5EncoderModel:
    """Build transformers' encoder from weights under Wan's names (those of models_t5_umt5-xxl-enc-*.pth).

    All sizes come from the shapes; `num_heads`, when given, must agree. dtype and device default to the tensors' own.
    Call it as `model(input_ids=..., attention_mask=...).last_hidden_state`, or through `text.embed_tokens`.
    Raises ValueError for missing, unexpected or misshapen parameters.
    """
    from transformers import UMT5EncoderModel

    shapes = weight_shapes(state_dict)
    sizes = wan_umt5_sizes(shapes)
    if num_heads is not None and num_heads != sizes["num_heads"]:
        raise ValueError(
            f"num_heads {num_heads} was given, but the position table has {sizes['num_heads']} heads; leave it out"
        )
    _check_shapes(shapes, wan_umt5_shapes(**sizes))
    with torch.device("meta"):  # else 5.7 billion numbers would get initial values in vain
        model = UMT5EncoderModel(umt5_config(**sizes))
    renamed: dict[str, Any] = {
        umt5_key_from_wan(key): tensor.to(device=device, dtype=dtype) for key, tensor in state_dict.items()
    }
    # transformers' module has its one embedding table under two names.
    renamed["encoder.embed_tokens.weight"] = renamed["shared.weight"]
    model.load_state_dict(renamed, assign=True)
    # Assigned twice, they would be two parameters of one tensor, and `to` would make two copies of it.
    model.encoder.embed_tokens.weight = model.shared.weight
    return model.eval().requires_grad_(False)


def _check_shapes(shapes: Mapping[str, Sequence[int]], expected: Mapping[str, Sequence[int]]) -> None:
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
