"""The Wan 2.1 transformer, with and without a KV cache. Parameter names are those of the original Wan checkpoints.

With a cache it evaluates one chunk of frames against all frames the cache holds (causal); with none it is the plain
bidirectional network, or, given a frame mask, the network in the form that training uses.

Letters: B batch, T latent frames, C channels, H W latent size, F frames of the sequence (2T with a clean half),
G = B*F frames of all rows, P tokens per frame, L = F*P tokens, D model width, N heads, K head width, X text tokens,
E text width, I image tokens, Y image-feature width.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from . import layers
from .attention import attend, attend_segments, expand_frames
from .config import CLIP_DIM, WanConfig
from .geometry import tokens_per_frame
from .kv_cache import KVCache, Past
from .rope import PLAIN, Axes, apply_rotary, rotary_table

WITHOUT_FLOAT64 = ("mps",)  # types of device


def timestep_embedding(timesteps: Tensor, width: int) -> Tensor:
    """Sinusoids [..., width] of timesteps on the 0-1000 scale, [cos | sin], float64; float32 where there is none."""
    wide = torch.float32 if timesteps.device.type in WITHOUT_FLOAT64 else torch.float64
    angles = timesteps.to(wide)[..., None] * _frequencies(width // 2, timesteps.device, wide)
    return torch.cat([angles.cos(), angles.sin()], -1)


@functools.lru_cache(maxsize=4)
def _frequencies(count: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):  # a later pass may need gradients
        return 10000.0 ** (-torch.arange(count, dtype=dtype, device=device) / count)


def _modulation(count: int, dim: int, *, device: torch.device | None, dtype: torch.dtype | None) -> nn.Parameter:
    """Random start [1, count, D]; drawn in float32, since no random numbers exist in float8."""
    # On the meta device nothing is drawn, and torch would import its compiler to do so: a second before every video.
    if device is not None and torch.device(device).type == "meta":
        return nn.Parameter(torch.empty(1, count, dim, device=device, dtype=dtype))
    return nn.Parameter((torch.randn(1, count, dim, device=device) / dim**0.5).to(dtype=dtype))


class _SelfAttention(nn.Module):
    """Attention's parameters and what is computed before it, in plain methods: a module's own call costs more."""

    def __init__(self, config: WanConfig, operations: Any, **factory: Any) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.q = operations.Linear(config.dim, config.dim, **factory)
        self.k = operations.Linear(config.dim, config.dim, **factory)
        self.v = operations.Linear(config.dim, config.dim, **factory)
        self.o = operations.Linear(config.dim, config.dim, **factory)
        self.norm_q = operations.RMSNorm(config.dim, eps=config.eps, **factory)
        self.norm_k = operations.RMSNorm(config.dim, eps=config.eps, **factory)

    def heads(self, x: Tensor, length: int) -> Tensor:
        """[..., D] to [B, length, N, K]."""
        return x.view(-1, length, self.num_heads, x.shape[-1] // self.num_heads)

    def queries_keys_values(self, x_GPD: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys (both turned by their position) and values [B, L, N, K]; `o` takes what attention makes."""
        length = rotary.shape[0]
        q = apply_rotary(self.heads(self.norm_q(self.q(x_GPD)), length), rotary)
        k = apply_rotary(self.heads(self.norm_k(self.k(x_GPD)), length), rotary)
        return q, k, self.heads(self.v(x_GPD), length)


KeysValues = tuple[tuple[Tensor, Tensor], ...]


class _CrossAttention(_SelfAttention):
    """Attention to the text and, in image-to-video networks, with the same queries to the image; the two are added."""

    def __init__(self, config: WanConfig, operations: Any, **factory: Any) -> None:
        super().__init__(config, operations, **factory)
        if config.model_type == "i2v":
            self.k_img = operations.Linear(config.dim, config.dim, **factory)
            self.v_img = operations.Linear(config.dim, config.dim, **factory)
            self.norm_k_img = operations.RMSNorm(config.dim, eps=config.eps, **factory)

    def keys_values(self, text_BXD: Tensor, image_BID: Tensor | None) -> KeysValues:
        """Keys and values [B, X, N, K] of the text, then of the image if there is one."""
        text = self._by_head(self.norm_k(self.k(text_BXD))), self._by_head(self.v(text_BXD))
        if image_BID is None:
            return (text,)
        return text, (self._by_head(self.norm_k_img(self.k_img(image_BID))), self._by_head(self.v_img(image_BID)))

    def _by_head(self, x_BXD: Tensor) -> Tensor:
        """[B, X, N, K] with each head's tokens together in memory, as in the cache."""
        return self.heads(x_BXD, x_BXD.shape[1]).transpose(1, 2).contiguous().transpose(1, 2)

    def attend_to(self, x_GPD: Tensor, length: int, keys_values: KeysValues) -> Tensor:
        q_BLNK = self.heads(self.norm_q(self.q(x_GPD)), length)
        attended = attend(q_BLNK, *keys_values[0])
        for keys, values in keys_values[1:]:
            attended = attended + attend(q_BLNK, keys, values)
        return self.o(attended.reshape(x_GPD.shape))


_Context = tuple[Tensor, Tensor | None]  # embedded text [B, X, D], embedded image [B, I, D]
_Modulation = tuple[Tensor, ...]  # each [G, 1, D]


def _modulated(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Layer norm without parameters of its own, then each frame's scale and shift."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=eps), 1 + scale)


class _Block(nn.Module):
    """Rows and frames are one axis, since hosts multiply in 8 bits only what has three."""

    recompute: Any = None  # torch's checkpoint function, when activations are not kept

    def __init__(self, config: WanConfig, operations: Any, **factory: Any) -> None:
        super().__init__()
        self.eps = config.eps
        self.self_attn = _SelfAttention(config, operations, **factory)
        self.norm3 = operations.LayerNorm(config.dim, eps=config.eps, **factory)
        self.cross_attn = _CrossAttention(config, operations, **factory)
        self.ffn = nn.ModuleDict(  # in the checkpoints' numbers, where the activation between them is 1
            {
                "0": operations.Linear(config.dim, config.ffn_dim, **factory),
                "2": operations.Linear(config.ffn_dim, config.dim, **factory),
            }
        )
        self.modulation = _modulation(6, config.dim, **factory)

    def forward(
        self,
        x_GPD: Tensor,
        e_G61D: Tensor,
        context: _Context | None,
        rotary: Tensor,
        cache: KVCache | None,
        layer: int,
        mask_LS: Tensor | None,
    ) -> Tensor:
        recompute = self.recompute if torch.is_grad_enabled() else None
        if recompute is not None and (cache is None or cache.keeps_all):
            past = None if cache is None else cache.past(layer)
            return recompute(self._whole, x_GPD, e_G61D, context, rotary, past, mask_LS)
        before, after = self.before_attention, self.after_attention
        if recompute is not None:
            before, after = functools.partial(recompute, before), functools.partial(recompute, after)
        q, k, v, later = before(x_GPD, e_G61D, rotary)
        # only where torch's kernel says what merging segments needs; elsewhere `update` widens one layer at a time
        if cache is not None and cache.converts(k) and k.device.type == "cpu" and not torch.is_grad_enabled():
            cache.write(layer, k, v)
            attended_BLNK = attend_segments(q, cache.past(layer).segments(k, v))
        else:
            if cache is not None:
                k, v = cache.update(layer, k, v)
            attended_BLNK = attend(q, k, v, mask_LS)
        return after(x_GPD, later, attended_BLNK, self._keys_values(context, cache, layer))

    def _whole(
        self,
        x_GPD: Tensor,
        e_G61D: Tensor,
        context: _Context,
        rotary: Tensor,
        past: Past | None,
        mask_LS: Tensor | None,
    ) -> Tensor:
        """All of the block from tensors that are kept anyway, so that it can be computed again."""
        q, k, v, later = self.before_attention(x_GPD, e_G61D, rotary)
        attended_BLNK = attend(q, *((k, v) if past is None else past(k, v)), mask_LS)
        return self.after_attention(x_GPD, later, attended_BLNK, self.cross_attn.keys_values(*context))

    def before_attention(
        self, x_GPD: Tensor, e_G61D: Tensor, rotary: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, _Modulation]:
        """Queries, keys and values of the frames' own tokens, and the modulation that `after_attention` needs.

        Tensors in, tensors out: what can be compiled.
        """
        shift, scale, *later = (e_G61D + self.modulation.unsqueeze(2).to(e_G61D)).unbind(1)
        q, k, v = self.self_attn.queries_keys_values(_modulated(x_GPD, shift, scale, self.eps), rotary)
        return q, k, v, tuple(later)

    def after_attention(
        self, x_GPD: Tensor, later: _Modulation, attended_BLNK: Tensor, keys_values: KeysValues
    ) -> Tensor:
        """The rest of the block, from what self-attention made. Tensors in, tensors out: what can be compiled."""
        gate1, shift, scale, gate2 = later
        x_GPD = torch.addcmul(x_GPD, self.self_attn.o(attended_BLNK.reshape(x_GPD.shape)), gate1)
        x_GPD = x_GPD + self.cross_attn.attend_to(self.norm3(x_GPD), attended_BLNK.shape[1], keys_values)
        return torch.addcmul(x_GPD, self.feed(_modulated(x_GPD, shift, scale, self.eps)), gate2)

    def feed(self, x_GPD: Tensor) -> Tensor:
        """The feed-forward network, of each token alone."""
        return self.ffn["2"](F.gelu(self.ffn["0"](x_GPD), approximate="tanh"))

    def _keys_values(self, context: _Context | None, cache: KVCache | None, layer: int) -> KeysValues:
        def compute() -> KeysValues:
            assert context is not None
            return self.cross_attn.keys_values(*context)

        return compute() if cache is None else cache.cross_kv(layer, compute)


class _Head(nn.Module):
    def __init__(self, config: WanConfig, operations: Any, **factory: Any) -> None:
        super().__init__()
        self.eps = config.eps
        patch = config.patch_size[0] * config.patch_size[1] * config.patch_size[2]
        self.head = operations.Linear(config.dim, patch * config.out_dim, **factory)
        self.modulation = _modulation(2, config.dim, **factory)

    def forward(self, x_BFPD: Tensor, e_BFD: Tensor) -> Tensor:
        shift, scale = (e_BFD.unsqueeze(2) + self.modulation.to(e_BFD)).unsqueeze(3).unbind(2)
        return self.head(_modulated(x_BFPD, shift, scale, self.eps))


class _ImageEmbedding(nn.Module):
    """CLIP features [B, I, 1280] to the model's width."""

    def __init__(self, config: WanConfig, operations: Any, **factory: Any) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            operations.LayerNorm(CLIP_DIM, **factory),
            operations.Linear(CLIP_DIM, CLIP_DIM, **factory),
            nn.GELU(),
            operations.Linear(CLIP_DIM, config.dim, **factory),
            operations.LayerNorm(config.dim, **factory),
        )

    def forward(self, clip_BIY: Tensor) -> Tensor:
        return self.proj(clip_BIY)


class CausalWan(nn.Module):
    """Wan 2.1 transformer, text-to-video or image-to-video. `operations` supplies Linear, Conv3d and norms."""

    def __init__(
        self, config: WanConfig, *, operations: Any = layers, device: torch.device | None = None, dtype: Any = None
    ) -> None:
        super().__init__()
        self.config = config
        self.cache_dtype: torch.dtype | None = None  # of new caches; None: the type that the model computes in
        self.axes: Axes = PLAIN  # scale and shift of positions, for hosts that have such an option
        factory = {"device": device, "dtype": dtype}
        dim, patch = config.dim, config.patch_size
        self.patch_embedding = operations.Conv3d(config.in_dim, dim, kernel_size=patch, stride=patch, **factory)
        self.text_embedding = nn.Sequential(
            operations.Linear(config.text_dim, dim, **factory),
            nn.GELU(approximate="tanh"),
            operations.Linear(dim, dim, **factory),
        )
        self.time_embedding = nn.Sequential(
            operations.Linear(config.freq_dim, dim, **factory), nn.SiLU(), operations.Linear(dim, dim, **factory)
        )
        self.time_projection = nn.Sequential(nn.SiLU(), operations.Linear(dim, 6 * dim, **factory))
        if config.model_type == "i2v":
            self.img_emb = _ImageEmbedding(config, operations, **factory)
        self.blocks = nn.ModuleList(_Block(config, operations, **factory) for _ in range(config.num_layers))
        self.head = _Head(config, operations, **factory)

    def compile_blocks(self, **options: Any) -> CausalWan:
        """Compile every block but its way into the cache and out of it; returns self.

        All blocks share the compiled code, and since only the frames of one chunk enter it, neither the length of the
        video nor the fill of the cache compiles anything again. options: of torch.compile, such as backend.
        """
        options = {**options, "dynamic": False}
        for block in self.blocks:
            assert isinstance(block, _Block)
            block.before_attention = torch.compile(block.before_attention, **options)
            block.after_attention = torch.compile(block.after_attention, **options)
        return self

    def checkpoint_blocks(self, **options: Any) -> CausalWan:
        """Compute every block's activations again in the backward pass instead of keeping them; returns self.

        With a cache that evicts frames, attention is not part of it: what it needs is kept. options: of
        torch.utils.checkpoint, such as context_fn.
        """
        for block in self.blocks:
            assert isinstance(block, _Block)
            block.recompute = functools.partial(checkpoint, **{**options, "use_reentrant": False})
        return self

    def new_cache(
        self, *, batch: int, latent_height: int, latent_width: int, capacity: int, sink: int = 0, like: Tensor
    ) -> KVCache:
        """An empty cache for latents of this size on the device of `like`; its type too unless `cache_dtype` is set."""
        per_frame = tokens_per_frame(latent_height, latent_width)
        return KVCache(
            self.config, batch=batch, tokens_per_frame=per_frame, capacity=capacity, sink=sink,
            device=like.device, dtype=self.cache_dtype or like.dtype,
        )  # fmt: skip

    def forward(
        self,
        noisy_BTCHW: Tensor,
        timesteps_BT: Tensor,
        prompt_embeds_BXE: Tensor,
        *,
        cache: KVCache | None = None,
        start_frame: int = 0,
        mask_FF: Tensor | None = None,
        clean_BTCHW: Tensor | None = None,
        clean_timesteps_BT: Tensor | None = None,
        image_BTCHW: Tensor | None = None,
        clip_BIY: Tensor | None = None,
    ) -> Tensor:
        """Predict flow = noise - x0, [B, T, C, H, W], in the dtype of `prompt_embeds_BXE`.

        timesteps_BT: float32 on the 0-1000 scale, one per frame. prompt_embeds_BXE: up to text_len rows.
        cache: evaluate frames [start_frame, start_frame + T) against it; they must follow what it holds.
        mask_FF: bool, which frame sees which (uncached only). clean_BTCHW: a clean copy of the same frames put in
        front of the noisy ones (teacher forcing), with its own timesteps (default 0); the mask then covers 2T frames.
        image_BTCHW, clip_BIY: condition channels of the same frames and CLIP features, for image-to-video networks.
        """
        dtype = prompt_embeds_BXE.dtype
        num_frames, (height, width) = noisy_BTCHW.shape[1], noisy_BTCHW.shape[-2:]
        rows, columns = height // self.config.patch_size[1], width // self.config.patch_size[2]
        device = noisy_BTCHW.device
        rotary = rotary_table(self.config.head_dim, start_frame, num_frames, rows, columns, device, axes=self.axes)
        if image_BTCHW is not None:
            noisy_BTCHW = torch.cat([noisy_BTCHW, image_BTCHW.to(noisy_BTCHW)], 2)
            clean_BTCHW = None if clean_BTCHW is None else torch.cat([clean_BTCHW, image_BTCHW.to(clean_BTCHW)], 2)
        if clean_BTCHW is not None:
            noisy_BTCHW = torch.cat([clean_BTCHW, noisy_BTCHW], 1)
            clean_timesteps_BT = torch.zeros_like(timesteps_BT) if clean_timesteps_BT is None else clean_timesteps_BT
            timesteps_BT = torch.cat([clean_timesteps_BT, timesteps_BT], 1)
            rotary = torch.cat([rotary, rotary])
        if cache is not None:
            cache.stage(start_frame, num_frames)

        x = rearrange(self.patch_embedding(noisy_BTCHW.to(dtype).transpose(1, 2)), "b d f h w -> (b f) (h w) d")
        x = x.contiguous()  # else every block computes on the convolution's strides
        e_BFD = self.time_embedding(timestep_embedding(timesteps_BT, self.config.freq_dim).to(dtype))
        e_G61D = self.time_projection(e_BFD).flatten(0, 1).unflatten(-1, (6, 1, -1))
        is_known = cache is not None and cache.has_cross()
        context = None if is_known else self._embed_context(prompt_embeds_BXE, clip_BIY)
        mask = None if mask_FF is None else expand_frames(mask_FF.to(x.device), rows * columns)
        for layer, block in enumerate(self.blocks):
            x = block(x, e_G61D, context, rotary, cache, layer, mask)
        x = self.head(x.unflatten(0, e_BFD.shape[:2])[:, -num_frames:], e_BFD[:, -num_frames:])
        p, q = self.config.patch_size[1:]
        return rearrange(x, "b t (h w) (p q c) -> b t c (h p) (w q)", h=rows, w=columns, p=p, q=q)

    def _embed_context(self, prompt_embeds_BXE: Tensor, clip_BIY: Tensor | None) -> _Context:
        missing = self.config.text_len - prompt_embeds_BXE.shape[1]
        padded_BXE = F.pad(prompt_embeds_BXE, (0, 0, 0, missing)) if missing else prompt_embeds_BXE
        image_BID = None if clip_BIY is None else self.img_emb(clip_BIY.to(padded_BXE.dtype))
        return self.text_embedding(padded_BXE), image_BID
