"""The Wan 2.1 transformer, with and without a KV cache. Parameter names are those of the original Wan checkpoints.

With a cache it evaluates one chunk of frames against all frames the cache holds (causal); with none it is the plain
bidirectional network, or, given a frame mask, the network in the form that training uses.

A token is a patch of 2 x 2 latent positions of one frame. Each frame has a noise level of its own, and what says so to
the network (the modulation) is the same for all tokens of a frame.

Letters: B batch, T latent frames (twice as many with a clean copy in front), C channels, H W latent size,
G = B times T, Q tokens of one frame, L query tokens, S cached tokens, D model width, N heads, K head width,
P text tokens, E text width, I image tokens, Y image-feature width.
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
from .attention import MERGING_DEVICES, attend, attend_segments
from .config import CLIP_DIM, WanConfig
from .geometry import tokens_per_frame
from .kv_cache import KVCache, Past
from .masks import expand_frames
from .rope import PLAIN, Axes, apply_rotary, rotary_table

WITHOUT_FLOAT64 = ("mps",)  # types of device


def timestep_embedding(timesteps: Tensor, width: int) -> Tensor:
    """Return sinusoids [..., width] of timesteps on the 0-1000 scale, [cos | sin], in float64 where there is such."""
    # the fastest of them turns by 1000 radians, of which bfloat16 would keep the first two digits
    wide = torch.float32 if timesteps.device.type in WITHOUT_FLOAT64 else torch.float64
    angles = timesteps.to(wide)[..., None] * _frequencies(width // 2, timesteps.device, wide)
    return torch.cat([angles.cos(), angles.sin()], -1)


@functools.lru_cache(maxsize=4)
def _frequencies(count: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    # they outlive this pass, and a tensor of inference mode could not be used in a pass with gradient
    with torch.inference_mode(False):
        # 10000 as for the positions of words (arXiv 1706.03762, section 3.5), half the width for either function
        return 10000.0 ** (-torch.arange(count, dtype=dtype, device=device) / count)


def _modulation(count: int, dim: int, *, device: torch.device | None, dtype: torch.dtype | None) -> nn.Parameter:
    """Return a random start [1, count, D]; drawn in float32, since no random numbers exist in float8."""
    # On the meta device nothing is drawn, and torch would import its compiler to do so: a second before every video.
    if device is not None and torch.device(device).type == "meta":
        return nn.Parameter(torch.empty(1, count, dim, device=device, dtype=dtype))
    # the spread of Wan's own start; whatever is loaded takes its place
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
        # over the whole width, before it is cut into heads: a norm of each head alone would be another network
        self.norm_q = operations.RMSNorm(config.dim, eps=config.eps, **factory)
        self.norm_k = operations.RMSNorm(config.dim, eps=config.eps, **factory)

    def heads(self, x: Tensor, length: int) -> Tensor:
        """Cut [..., D] into heads of rows of this length, [B, L, N, K]."""
        return x.view(-1, length, self.num_heads, x.shape[-1] // self.num_heads)

    def queries_keys_values(self, x_GQD: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys (both turned by their position) and values, [B, L, N, K]."""
        length = rotary.shape[0]
        # a key is turned once, by its absolute frame, before it is cached: what is read needs no work
        q = apply_rotary(self.heads(self.norm_q(self.q(x_GQD)), length), rotary)
        k = apply_rotary(self.heads(self.norm_k(self.k(x_GQD)), length), rotary)
        return q, k, self.heads(self.v(x_GQD), length)


KeysValues = tuple[tuple[Tensor, Tensor], ...]


class _CrossAttention(_SelfAttention):
    """Attention to the text and, in image-to-video networks, with the same queries to the image; the two are added.

    All text_len rows are attended to, the zeros behind a shorter text too: Wan was trained without a mask.
    """

    def __init__(self, config: WanConfig, operations: Any, *, reads_clip: bool, **factory: Any) -> None:
        super().__init__(config, operations, **factory)
        if reads_clip:
            self.k_img = operations.Linear(config.dim, config.dim, **factory)
            self.v_img = operations.Linear(config.dim, config.dim, **factory)
            self.norm_k_img = operations.RMSNorm(config.dim, eps=config.eps, **factory)

    def keys_values(self, text_BPD: Tensor, image_BID: Tensor | None) -> KeysValues:
        """Return keys and values [B, P, N, K] of the text, then of the image if there is one."""
        text = self._by_head(self.norm_k(self.k(text_BPD))), self._by_head(self.v(text_BPD))
        if image_BID is None:
            return (text,)
        return text, (self._by_head(self.norm_k_img(self.k_img(image_BID))), self._by_head(self.v_img(image_BID)))

    def _by_head(self, x_BPD: Tensor) -> Tensor:
        """Return [B, P, N, K] with each head's tokens together in memory, the order in which attention reads them."""
        return self.heads(x_BPD, x_BPD.shape[1]).transpose(1, 2).contiguous().transpose(1, 2)

    def attend_to(self, x_GQD: Tensor, length: int, keys_values: KeysValues) -> Tensor:
        """Return what tokens x, rows of `length`, read of text and image, in the shape of x."""
        q_BLNK = self.heads(self.norm_q(self.q(x_GQD)), length)
        attended = attend(q_BLNK, *keys_values[0])
        # two softmaxes, and not one over text and image together (Wan 2.1, WanI2VCrossAttention)
        for keys, values in keys_values[1:]:
            attended = attended + attend(q_BLNK, keys, values)
        return self.o(attended.reshape(x_GQD.shape))


_Context = tuple[Tensor, Tensor | None]  # embedded text [B, P, D], embedded image [B, I, D]
_Modulation = tuple[Tensor, ...]  # each [G, 1, D]


def _modulated(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Normalise without parameters of its own, then apply each frame's scale and shift (DiT, arXiv 2212.09748)."""
    # 1 + scale: a network starts with scales near 0, where the norm is what it was
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=eps), 1 + scale)


class _Block(nn.Module):
    """One layer: attention to the video, attention to the prompt, and a feed-forward network.

    Rows and frames are one axis, since ComfyUI multiplies in 8 bits only what has three.
    """

    recompute: Any = None  # torch's checkpoint function, where activations are not kept for the backward pass

    def __init__(self, config: WanConfig, operations: Any, *, reads_clip: bool, **factory: Any) -> None:
        super().__init__()
        self.eps = config.eps
        self.self_attn = _SelfAttention(config, operations, **factory)
        # the only norm of a block that has parameters, since the two others are modulated
        self.norm3 = operations.LayerNorm(config.dim, eps=config.eps, **factory)
        self.cross_attn = _CrossAttention(config, operations, reads_clip=reads_clip, **factory)
        self.ffn = nn.ModuleDict(  # in the checkpoints' numbers, where the activation between them is 1
            {
                "0": operations.Linear(config.dim, config.ffn_dim, **factory),
                "2": operations.Linear(config.ffn_dim, config.dim, **factory),
            }
        )
        self.modulation = _modulation(6, config.dim, **factory)

    def forward(
        self,
        x_GQD: Tensor,
        e_G61D: Tensor,
        context: _Context | None,
        rotary: Tensor,
        cache: KVCache | None,
        layer: int,
        mask_LS: Tensor | None,
    ) -> Tensor:
        # a pass that writes carries no gradient, so it keeps no activations to begin with
        recompute = None if cache is not None and cache.writes else self.recompute
        if recompute is not None and (cache is None or cache.keeps_all):
            past = None if cache is None else cache.past(layer)  # views of frames that stay where they are
            return recompute(self._whole, x_GQD, e_G61D, context, rotary, past, mask_LS)
        before, after = self.before_attention, self.after_attention
        if recompute is not None:  # not what attention sees: until the backward pass, other frames may lie there
            before, after = functools.partial(recompute, before), functools.partial(recompute, after)
        q, k, v, later = before(x_GQD, e_G61D, rotary)
        attended_BLNK = attend(q, k, v, mask_LS) if cache is None else _attend_cached(q, k, v, cache, layer, mask_LS)
        return after(x_GQD, later, attended_BLNK, self._keys_values(context, cache, layer))

    def _whole(
        self,
        x_GQD: Tensor,
        e_G61D: Tensor,
        context: _Context,
        rotary: Tensor,
        past: Past | None,
        mask_LS: Tensor | None,
    ) -> Tensor:
        """Compute all of the block from tensors that are kept anyway, so that it can be computed again."""
        q, k, v, later = self.before_attention(x_GQD, e_G61D, rotary)
        attended_BLNK = attend(q, *((k, v) if past is None else past(k, v)), mask_LS)
        return self.after_attention(x_GQD, later, attended_BLNK, self.cross_attn.keys_values(*context))

    def before_attention(
        self, x_GQD: Tensor, e_G61D: Tensor, rotary: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, _Modulation]:
        """Return queries, keys and values of the frames' own tokens, and the modulation for `after_attention`.

        Tensors in, tensors out: what can be compiled.
        """
        # in the order of the checkpoints: shift, scale and gate of attention, then those of the feed-forward network
        shift, scale, *later = (e_G61D + self.modulation.unsqueeze(2).to(e_G61D)).unbind(1)
        q, k, v = self.self_attn.queries_keys_values(_modulated(x_GQD, shift, scale, self.eps), rotary)
        return q, k, v, tuple(later)

    def after_attention(
        self, x_GQD: Tensor, later: _Modulation, attended_BLNK: Tensor, keys_values: KeysValues
    ) -> Tensor:
        """Compute the rest of the block from what attention read. Tensors in, tensors out: what can be compiled."""
        gate1, shift, scale, gate2 = later
        x_GQD = torch.addcmul(x_GQD, self.self_attn.o(attended_BLNK.reshape(x_GQD.shape)), gate1)
        # attention to the prompt has neither gate nor modulation (Wan 2.1, WanAttentionBlock)
        x_GQD = x_GQD + self.cross_attn.attend_to(self.norm3(x_GQD), attended_BLNK.shape[1], keys_values)
        return torch.addcmul(x_GQD, self.feed(_modulated(x_GQD, shift, scale, self.eps)), gate2)

    def feed(self, x_GQD: Tensor) -> Tensor:
        """Apply the feed-forward network, to each token alone."""
        return self.ffn["2"](F.gelu(self.ffn["0"](x_GQD), approximate="tanh"))

    def _keys_values(self, context: _Context | None, cache: KVCache | None, layer: int) -> KeysValues:
        def compute() -> KeysValues:
            assert context is not None
            return self.cross_attn.keys_values(*context)

        # the prompt is the same for all chunks and steps: made once, and then read
        return compute() if cache is None else cache.cross_kv(layer, compute)


def _attend_cached(
    q_BLNK: Tensor, k_BLNK: Tensor, v_BLNK: Tensor, cache: KVCache, layer: int, mask_LS: Tensor | None
) -> Tensor:
    """Attend to the staged chunk itself and to what the cache shows of the past; what is not seen is not there.

    mask_LS: added to the scores, where a policy wants some frames to weigh less.
    """
    k_BLNK = cache.own_keys(k_BLNK)
    if mask_LS is None and cache.writes and cache.by_segments and cache.converts(k_BLNK):
        cache.write(layer, k_BLNK, v_BLNK)
        return attend_segments(q_BLNK, cache.past(layer).segments(k_BLNK, v_BLNK))
    return attend(q_BLNK, *cache.update(layer, k_BLNK, v_BLNK), mask_LS)


class _Head(nn.Module):
    """Last norm, modulation and projection: from tokens to the latent positions of their patches."""

    def __init__(self, config: WanConfig, operations: Any, **factory: Any) -> None:
        super().__init__()
        self.eps = config.eps
        patch = config.patch_size[0] * config.patch_size[1] * config.patch_size[2]
        self.head = operations.Linear(config.dim, patch * config.out_dim, **factory)
        self.modulation = _modulation(2, config.dim, **factory)

    def forward(self, x_BTQD: Tensor, e_BTD: Tensor) -> Tensor:
        # of the embedded timestep itself, where a block takes six projections of it
        shift, scale = (e_BTD.unsqueeze(2) + self.modulation.to(e_BTD)).unsqueeze(3).unbind(2)
        return self.head(_modulated(x_BTQD, shift, scale, self.eps))


class _ImageEmbedding(nn.Module):
    """Projection of CLIP features, [B, I, Y], to the model's width."""

    def __init__(self, config: WanConfig, operations: Any, **factory: Any) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            operations.LayerNorm(CLIP_DIM, **factory),
            operations.Linear(CLIP_DIM, CLIP_DIM, **factory),
            nn.GELU(),  # exact, where the network's others are approximations by tanh: so it was trained
            operations.Linear(CLIP_DIM, config.dim, **factory),
            operations.LayerNorm(config.dim, **factory),
        )

    def forward(self, clip_BIY: Tensor) -> Tensor:
        return self.proj(clip_BIY)


class CausalWan(nn.Module):
    """The Wan 2.1 transformer, text-to-video or image-to-video.

    operations: supplies Linear, Conv3d and norms, where others than `layers` are wanted.
    """

    def __init__(
        self, config: WanConfig, *, operations: Any = layers, device: torch.device | None = None, dtype: Any = None
    ) -> None:
        super().__init__()
        self.config = config
        self.cache_dtype: torch.dtype | None = None  # of new caches; None: the type that the model computes in
        self.axes: Axes = PLAIN  # scale and shift of positions, which a node of ComfyUI may set
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
        # six vectors for all blocks, to each of which a block adds its own `modulation`
        self.time_projection = nn.Sequential(nn.SiLU(), operations.Linear(dim, 6 * dim, **factory))
        reads_clip = config.reads_clip
        if reads_clip:
            self.img_emb = _ImageEmbedding(config, operations, **factory)
        self.blocks = nn.ModuleList(
            _Block(config, operations, reads_clip=reads_clip, **factory) for _ in range(config.num_layers)
        )
        self.head = _Head(config, operations, **factory)

    def compile_blocks(self, **options: Any) -> CausalWan:
        """Compile every block but its way into the cache and out of it; returns self.

        All blocks share the compiled code, and since only the frames of one chunk enter it, neither the length of the
        video nor the fill of the cache compiles anything again. options: of torch.compile, such as backend.
        """
        # a video has one or two lengths of chunks: compiled for each, the code is faster than one for any length
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
            # the other kind gives no gradient to weights where nothing that enters a block carries any, as under LoRA
            block.recompute = functools.partial(checkpoint, **{**options, "use_reentrant": False})
        return self

    def new_cache(
        self, *, batch: int, latent_height: int, latent_width: int, capacity: int, sink: int = 0, like: Tensor
    ) -> KVCache:
        """Return an empty cache for latents of this size, on the device of `like`, in `cache_dtype` or its type."""
        return KVCache(
            self.config,
            batch=batch,
            tokens_per_frame=tokens_per_frame(latent_height, latent_width),
            capacity=capacity,
            sink=sink,
            device=like.device,
            dtype=self.cache_dtype or like.dtype,
            by_segments=like.device.type in MERGING_DEVICES,
        )

    def forward(
        self,
        noisy_BTCHW: Tensor,
        timesteps_BT: Tensor,
        prompt_embeds_BPE: Tensor,
        *,
        cache: KVCache | None = None,
        start_frame: int = 0,
        writes: bool = True,
        mask_TT: Tensor | None = None,
        clean_BTCHW: Tensor | None = None,
        clean_timesteps_BT: Tensor | None = None,
        image_BTCHW: Tensor | None = None,
        clip_BIY: Tensor | None = None,
    ) -> Tensor:
        """Predict flow = noise - x0, [B, T, C, H, W], in the dtype of `prompt_embeds_BPE`.

        timesteps_BT: float32 on the 0-1000 scale, one per frame. prompt_embeds_BPE: up to text_len rows.
        cache: evaluate frames [start_frame, start_frame + T) against it; they must follow what it holds. writes: put
        their keys and values into it; a pass that carries gradient must not.
        mask_TT: bool, which frame sees which (uncached only). clean_BTCHW: a clean copy of the same frames put in
        front of the noisy ones (teacher forcing), with its own timesteps (default 0); the mask then covers both.
        image_BTCHW, clip_BIY: condition channels of the same frames, for image-to-video networks, and CLIP features,
        for those of them that read such.
        """
        dtype = prompt_embeds_BPE.dtype
        num_frames, (height, width) = noisy_BTCHW.shape[1], noisy_BTCHW.shape[-2:]
        rows, columns = height // self.config.patch_size[1], width // self.config.patch_size[2]
        device = noisy_BTCHW.device
        position = start_frame
        if cache is not None:
            cache.axes = self.axes
            cache.stage(start_frame, num_frames, writes=writes)
            position = cache.position  # a policy may put a chunk elsewhere than at its own number
        rotary = rotary_table(self.config.head_dim, position, num_frames, rows, columns, device, axes=self.axes)
        if image_BTCHW is not None:  # behind the noisy channels, as Wan's image-to-video models were trained
            noisy_BTCHW = torch.cat([noisy_BTCHW, image_BTCHW.to(noisy_BTCHW)], 2)
            clean_BTCHW = None if clean_BTCHW is None else torch.cat([clean_BTCHW, image_BTCHW.to(clean_BTCHW)], 2)
        if clean_BTCHW is not None:
            noisy_BTCHW = torch.cat([clean_BTCHW, noisy_BTCHW], 1)
            clean_timesteps_BT = torch.zeros_like(timesteps_BT) if clean_timesteps_BT is None else clean_timesteps_BT
            timesteps_BT = torch.cat([clean_timesteps_BT, timesteps_BT], 1)
            rotary = torch.cat([rotary, rotary])  # a frame and its clean copy have the same position

        x = rearrange(self.patch_embedding(noisy_BTCHW.to(dtype).transpose(1, 2)), "b d f h w -> (b f) (h w) d")
        x = x.contiguous()  # else every block computes on the convolution's strides
        # timesteps are float32 up to here, since bfloat16 has 936 and 940 but no 937.5
        e_BTD = self.time_embedding(timestep_embedding(timesteps_BT, self.config.freq_dim).to(dtype))
        e_G61D = self.time_projection(e_BTD).flatten(0, 1).unflatten(-1, (6, 1, -1))
        is_known = cache is not None and cache.has_cross()
        context = None if is_known else self._embed_context(prompt_embeds_BPE, clip_BIY)
        mask_LS = None if mask_TT is None else expand_frames(mask_TT.to(x.device), rows * columns)
        if cache is not None:
            mask_LS = cache.mask(x)
        for layer, block in enumerate(self.blocks):
            x = block(x, e_G61D, context, rotary, cache, layer, mask_LS)
        # only the noisy copy is predicted
        x = self.head(x.unflatten(0, e_BTD.shape[:2])[:, -num_frames:], e_BTD[:, -num_frames:])
        # within a token the channel changes fastest, which is not the order of the convolution that made it
        p, q = self.config.patch_size[1:]
        return rearrange(x, "b t (h w) (p q c) -> b t c (h p) (w q)", h=rows, w=columns, p=p, q=q)

    def _embed_context(self, prompt_embeds_BPE: Tensor, clip_BIY: Tensor | None) -> _Context:
        # zeros up to text_len, as in training: they are attended to, so fewer would be another prompt
        missing = self.config.text_len - prompt_embeds_BPE.shape[1]
        padded_BPE = F.pad(prompt_embeds_BPE, (0, 0, 0, missing)) if missing else prompt_embeds_BPE
        image_BID = None if clip_BIY is None else self.img_emb(clip_BIY.to(padded_BPE.dtype))
        return self.text_embedding(padded_BPE), image_BID
