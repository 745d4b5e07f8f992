"""Wan's text encoder: the encoder half of UMT5 (arXiv 2304.09151, section 3), under Wan's names for its parameters.

Written here because importing a model of transformers takes longer than making a short video. The computation is that
of transformers' UMT5EncoderModel, operation by operation, so that both give the same bits.

Letters: B batch, P text tokens, E text width, N heads, K head width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from einops import rearrange
from torch import Tensor, nn

from ..weights.scaled import weight_shapes
from .umt5_layout import NUM_BUCKETS, check_umt5_shapes, wan_umt5_sizes

EPSILON = 1e-6  # of Wan's T5LayerNorm (wan/modules/t5.py)
MAX_DISTANCE = 128  # tokens, from which on all are equally far; of every T5, and the shapes do not show it


class UMT5Encoder(nn.Module):
    """Token ids to embeddings. Sizes are keywords under Wan's names, as `wan_umt5_sizes` returns them."""

    def __init__(
        self,
        *,
        vocab: int,
        dim: int,
        dim_attn: int,
        dim_ffn: int,
        num_heads: int,
        num_layers: int,
        num_buckets: int = NUM_BUCKETS,
    ) -> None:
        if dim_attn % num_heads:
            raise ValueError(f"dim_attn {dim_attn} is not a multiple of num_heads {num_heads}; Wan's encoder has 64")
        super().__init__()
        self.token_embedding = _table(vocab, dim)
        self.blocks = nn.ModuleList(
            _EncoderLayer(dim, dim_attn, dim_ffn, num_heads, num_buckets) for _ in range(num_layers)
        )
        self.norm = _Norm(dim)

    @property
    def text_dim(self) -> int:
        """Return the width E of the embeddings."""
        return self.token_embedding.embedding_dim

    def forward(self, ids_BP: Tensor, mask_BP: Tensor) -> Tensor:
        """Return the last layer's output [B, P, E], to which tokens where the mask is 0 contribute nothing."""
        hidden_BPE = self.token_embedding(ids_BP)
        is_read_B11P = mask_BP.bool()[:, None, None]
        for block in self.blocks:
            hidden_BPE = block(hidden_BPE, is_read_B11P)
        return self.norm(hidden_BPE)

    def embed(self, ids_BP: Tensor, mask_BP: Tensor) -> Tensor:
        """Return that output as video models read it: with zeros in the rows where the mask is 0."""
        # Wan's cross-attention has no mask: it attends to the padding too, and was trained with zeros there.
        return self(ids_BP, mask_BP).masked_fill(mask_BP.eq(0).unsqueeze(-1), 0.0)


def _table(rows: int, width: int) -> nn.Embedding:
    # Not drawn: on the meta device torch would import its compiler to do so, which takes a second.
    return nn.Embedding.from_pretrained(torch.empty(rows, width))


class _Norm(nn.Module):
    """Root mean square norm, in float32 whatever the number type."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, hidden_BPE: Tensor) -> Tensor:
        variance = hidden_BPE.float().pow(2).mean(-1, keepdim=True)
        scaled_BPE = hidden_BPE * torch.rsqrt(variance + EPSILON)
        if self.weight.dtype.itemsize == 2:
            scaled_BPE = scaled_BPE.to(self.weight.dtype)
        return self.weight * scaled_BPE


class _Distances(nn.Module):
    """What each head adds to a score for how far apart two tokens are; every layer has its own, unlike in T5."""

    def __init__(self, num_buckets: int, num_heads: int) -> None:
        super().__init__()
        self.embedding = _table(num_buckets, num_heads)

    def forward(self, tokens: int) -> Tensor:
        place_P = torch.arange(tokens, device=self.embedding.weight.device)
        buckets_PP = self._buckets(place_P[None, :] - place_P[:, None])
        return rearrange(self.embedding(buckets_PP), "q s n -> 1 n q s")

    def _buckets(self, offset: Tensor) -> Tensor:
        # Half of the buckets are for tokens behind. Of each half, one half is for single distances, the other for
        # ranges that grow with the logarithm.
        half = self.embedding.num_embeddings // 2
        exact = half // 2
        distance = offset.abs()
        growth = torch.log(distance.float() / exact) / math.log(MAX_DISTANCE / exact) * (half - exact)
        far = (exact + growth.to(torch.long)).clamp(max=half - 1)
        return (offset > 0).to(torch.long) * half + torch.where(distance < exact, distance, far)


class _Attention(nn.Module):
    def __init__(self, dim: int, dim_attn: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v = (nn.Linear(dim, dim_attn, bias=False) for _ in range(3))
        self.o = nn.Linear(dim_attn, dim, bias=False)

    def forward(self, hidden_BPE: Tensor, bias_BNPP: Tensor) -> Tensor:
        heads = [
            rearrange(project(hidden_BPE), "b p (n k) -> b n p k", n=self.num_heads)
            for project in (self.q, self.k, self.v)
        ]
        # T5 has no division by the root of K: its weights were drawn so small that none is needed.
        attended_BNPK = nn.functional.scaled_dot_product_attention(*heads, attn_mask=bias_BNPP, scale=1.0)
        return self.o(rearrange(attended_BNPK, "b n p k -> b p (n k)"))


class _FeedForward(nn.Module):
    def __init__(self, dim: int, dim_ffn: int) -> None:
        super().__init__()
        self.gate = nn.Sequential(nn.Linear(dim, dim_ffn, bias=False))
        self.fc1 = nn.Linear(dim, dim_ffn, bias=False)
        self.fc2 = nn.Linear(dim_ffn, dim, bias=False)

    def forward(self, hidden_BPE: Tensor) -> Tensor:
        inner = _gelu(self.gate(hidden_BPE)) * self.fc1(hidden_BPE)
        return self.fc2(inner.to(self.fc2.weight.dtype))


def _gelu(x: Tensor) -> Tensor:
    # The approximation by tanh as Wan's t5.py spells it; torch's own differs in the last bits.
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


class _EncoderLayer(nn.Module):
    def __init__(self, dim: int, dim_attn: int, dim_ffn: int, num_heads: int, num_buckets: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = _Norm(dim), _Norm(dim)
        self.attn = _Attention(dim, dim_attn, num_heads)
        self.pos_embedding = _Distances(num_buckets, num_heads)
        self.ffn = _FeedForward(dim, dim_ffn)

    def forward(self, hidden_BPE: Tensor, is_read_B11P: Tensor) -> Tensor:
        distances_1NPP = self.pos_embedding(hidden_BPE.shape[1])
        bias_BNPP = torch.where(is_read_B11P, distances_1NPP, torch.finfo(distances_1NPP.dtype).min)
        hidden_BPE = hidden_BPE + self.attn(self.norm1(hidden_BPE), bias_BNPP)
        return hidden_BPE + self.ffn(self.norm2(hidden_BPE))


def umt5_from_wan_state_dict(
    state_dict: Mapping[str, Tensor],
    *,
    num_heads: int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> UMT5Encoder:
    """Build the encoder from weights under Wan's names (those of models_t5_umt5-xxl-enc-*.pth), for inference.

    All sizes come from the shapes; `num_heads`, when given, must agree. dtype and device default to the tensors' own.
    In float16, the matrices behind the gates and all sums stay float32: they exceed float16 (transformers does so too).
    Raises ValueError for missing, unexpected or misshapen parameters.
    """
    shapes = weight_shapes(state_dict)
    sizes = wan_umt5_sizes(shapes)
    if num_heads is not None and num_heads != sizes["num_heads"]:
        raise ValueError(
            f"num_heads {num_heads} was given, but the position table has {sizes['num_heads']} heads; leave it out"
        )
    check_umt5_shapes(shapes, sizes)
    with torch.device("meta"):  # else 5.7 billion numbers would get initial values in vain
        model = UMT5Encoder(**sizes)

    def kept(key: str, tensor: Tensor) -> Tensor:
        is_wide = dtype == torch.float16 and key.endswith("ffn.fc2.weight")
        return tensor.to(device=device, dtype=torch.float32 if is_wide else dtype)

    model.load_state_dict({key: kept(key, tensor) for key, tensor in state_dict.items()}, assign=True)
    return model.eval().requires_grad_(False)
