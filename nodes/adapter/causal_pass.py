"""One rollout as ComfyUI's wrappers meet it: which cache belongs to which prompt, and the evaluation of a chunk.

Letters: B batch, C latent channels, T latent frames, H W latent size, P text tokens, E text width, I image tokens,
Y image-feature width, L query tokens, S cached tokens, N heads, K head width.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import comfy.ldm.modules.attention as attentions
import torch
import torch.nn as nn
from einops import rearrange
from torch import Tensor

from ...selfforcing_core.attention import Attend, attention_by
from ...selfforcing_core.kv_cache import KVCache
from ...selfforcing_core.model import CausalWan
from ...selfforcing_core.rope import PLAIN
from .patches import OVERRIDE, attention_note, check_module, check_transformer_options, comfyui_attention, rope_axes
from .shared_network import ForeignCrossAttention, SharedNetwork

log = logging.getLogger(__name__)
COMPILE_OPTIONS = "torch_compile_kwargs"  # where ComfyUI's TorchCompileModel leaves its choices


class CausalPass:
    """What sampler and network share during one rollout. ComfyUI copies dictionaries and lists, but not this.

    is_watched: others stand around each evaluation, so that prompts may differ from one to the next.
    """

    def __init__(
        self,
        caches: Sequence[KVCache],
        index_of: dict[Any, int],
        compile_options: dict[str, Any] | None,
        patcher: Any,
        *,
        is_watched: bool = False,
    ) -> None:
        self.caches, self.index_of, self.compile_options, self.patcher = caches, index_of, compile_options, patcher
        self.is_watched = is_watched
        self.start_frame: int | None = None  # of the chunk being evaluated; None: ComfyUI's own forward pass
        self.num_frames = 0  # latent frames of that chunk
        self.writes = True  # whether that evaluation goes into the caches
        # Of the call's frames, where ComfyUI's timesteps, which it makes of sigma, are others.
        self.timesteps_BT: Tensor | None = None
        # Every conditioning has a cache: from the second block on, keys and values of the video depend on the text.
        self.evaluated: set[int] = set()  # caches of the conditionings that the latest call came to
        self._prompts: dict[int, tuple[Tensor, Tensor | None]] = {}  # from which a cache's text was made
        self._shared: SharedNetwork | None = None  # made when it is first asked for, and then kept
        self._is_compiled = False

    def begin_call(self, start_frame: int, num_frames: int, *, writes: bool) -> None:
        """Note that the guider is about to be asked for these frames."""
        self.start_frame, self.num_frames, self.evaluated = start_frame, num_frames, set()
        self.writes, self.timesteps_BT = writes, None

    def share(self, native: nn.Module, options: dict[str, Any]) -> SharedNetwork:
        """Return our network over ComfyUI's modules. Raises ValueError where they carry what ours would ignore."""
        if self._shared is None or self._shared.native is not native:
            self._shared = SharedNetwork(native, self.patcher)
            if self._shared.cross_attentions and len(self.index_of) > 1:
                raise ValueError(
                    "this model carries another cross-attention (as WanVideoNAG of KJNodes sets one), which "
                    f"ComfyUI's sampling shows {len(self.index_of)} prompts at once, and generating chunk by chunk one "
                    "at a time; set cfg to 1 and use a single prompt, or remove it"
                )
            log.info("%s", attention_note(options))
            self._compile(options)
        return self._shared

    def _compile(self, options: dict[str, Any]) -> None:
        """Compile the blocks if the MODEL is to be compiled and nothing in them is another pack's."""
        assert self._shared is not None
        if self.compile_options is None:
            return
        if OVERRIDE in options or self._shared.follows:
            part = "attention" if OVERRIDE in options else "cross-attention or feed-forward network"
            log.warning("blocks are not compiled: another %s is set on the model, which runs outside them", part)
            return
        if comfyui_attention(options) is not None:  # it is called between the compiled parts, for a block's own tokens
            log.info("cross-attention is inside the compiled blocks, and stays torch's")
        self._shared.network.compile_blocks(**self.compile_options)
        self._is_compiled = True

    # Caches grow and change their cursors from call to call, at which torch.compile would compile anew; blocks are
    # compiled one by one instead, each a function of tensors alone.
    @torch.compiler.disable
    def evaluate(
        self,
        native: nn.Module,
        x_BCTHW: Tensor,
        t_B: Tensor,
        context_BPE: Tensor,
        clip_BIY: Tensor | None,
        options: dict[str, Any],
    ) -> Tensor:
        """Return the flow [B, C, T, H, W] of one chunk for one or more conditionings, each with a cache of its own."""
        assert self.start_frame is not None
        check_transformer_options(options)  # again at every evaluation: some nodes put theirs there only then
        check_module("", native)  # some nodes replace its methods for the time of an evaluation
        shared = self.share(native, options)
        shared.network.axes = rope_axes(options) or PLAIN
        ids, flows = options["uuids"], []  # ComfyUI names the conditioning of each part of its batch
        # A batch holds the chunk once for each conditioning, in ComfyUI's order. Those that do not fit the memory, or
        # whose text has another length, come in a call of their own.
        count = len(ids)
        # As in ComfyUI, features that come with a prompt are not read by networks without layers for them.
        reads_clip = clip_BIY is not None and shared.network.config.reads_clip
        clips = clip_BIY.chunk(count) if reads_clip else [None] * count
        # one timestep for all frames of a chunk, as ComfyUI makes it, or those of chunks at different noise
        timesteps = (
            [t.float()[:, None].expand(-1, x_BCTHW.shape[2]) for t in t_B.chunk(count)]
            if self.timesteps_BT is None
            else [self.timesteps_BT] * count
        )
        rows = zip(ids, x_BCTHW.chunk(count), timesteps, context_BPE.chunk(count), clips)
        for row, (identity, x, t, context, clip) in enumerate(rows):
            cache = self._cache_for(identity, x)
            if self.is_watched:
                self._renew_text(identity, context, clip)
            with self._foreign_layers(shared, options, row, x, clip is not None):
                flows.append(
                    shared(
                        rearrange(x, "b c t h w -> b t c h w"),
                        t,
                        context[:, : shared.network.config.text_len],
                        clip_BIY=clip,
                        cache=cache,
                        start_frame=self.start_frame,
                        writes=self.writes,
                    )
                )
        return rearrange(torch.cat(flows), "b t c h w -> b c t h w")

    def _cache_for(self, identity: Any, x_BCTHW: Tensor) -> KVCache:
        """Return the cache of a conditioning. Raises ValueError for an evaluation that the rollout did not ask for."""
        index = self.index_of.get(identity)  # ComfyUI gives each conditioning a UUID, and keeps it all through a run
        if index is None:
            # Its keys and values would have to go somewhere, and every cache is another prompt's.
            raise _not_followed("evaluates a prompt that is not the sampler's, as PerpNeg and others do")
        if index in self.evaluated:
            raise _not_followed("evaluates a prompt twice in one step, as perturbed and self-attention guidance do")
        if x_BCTHW.shape[2] != self.num_frames or x_BCTHW.shape[0] != self.caches[index].batch:
            raise _not_followed(
                f"evaluates {x_BCTHW.shape[0]} x {x_BCTHW.shape[2]} frames where {self.caches[index].batch} x "
                f"{self.num_frames} are to be made"
            )
        self.evaluated.add(index)
        return self.caches[index]

    def _renew_text(self, identity: Any, context_BPE: Tensor, clip_BIY: Tensor | None) -> None:
        """Forget the text in a cache where a wrapper gives the network another one than before."""
        index, prompt = self.index_of[identity], (context_BPE, clip_BIY)
        before = self._prompts.get(index)
        if before is not None and not all(a is b or _is_equal(a, b) for a, b in zip(before, prompt)):
            self.caches[index].cross.clear()  # keys and values of the text; those of the video stay
        self._prompts[index] = prompt  # compared by identity first: nearly always it is the same tensor

    @contextmanager
    def _foreign_layers(
        self, shared: SharedNetwork, options: dict[str, Any], row: int, x_BCTHW: Tensor, has_image: bool
    ) -> Iterator[None]:
        """Put modules and attention of ComfyUI in the places of ours meanwhile, and tell them where they stand.

        That is: which conditioning this is, the block, and the size of the grid.
        """
        function = comfyui_attention(options)
        if function is None and not shared.follows:
            yield
            return
        network = shared.network
        # What ComfyUI's Wan tells attention and patches; total_blocks, block_index and grid_sizes in later versions.
        layer_options = {
            **options,
            "total_blocks": len(network.blocks),
            "block_type": "double",
            "grid_sizes": torch.Size(size // side for size, side in zip(x_BCTHW.shape[2:], network.config.patch_size)),
            "uuids": options["uuids"][row : row + 1],
            "cond_or_uncond": options["cond_or_uncond"][row : row + 1],
        }
        for module in shared.cross_attentions:
            module.options = layer_options
        for feed in shared.feed_forwards:
            feed.batch = x_BCTHW.shape[0]
        places = _places(network, has_image=has_image, is_compiled=self._is_compiled)
        with nullcontext() if function is None else attention_by(_attend_by(function, layer_options, places)):
            yield


def _not_followed(action: str) -> ValueError:
    return ValueError(
        f"a node on this model {action}, which the cache of a video made chunk by chunk cannot follow; remove it, or "
        "sample the whole video with ComfyUI's own sampler"
    )


def _is_equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and torch.equal(a, b)


def _places(network: CausalWan, *, has_image: bool, is_compiled: bool) -> Iterator[tuple[int, bool]]:
    """Yield block, and whether it is to the image, of each call of attention in an evaluation, in their order."""
    # A stream in step with the evaluation, since attention itself does not know in which block it is asked.
    for index, block in enumerate(network.blocks):
        yield index, False  # a block's own tokens
        if not is_compiled and not isinstance(block.cross_attn, ForeignCrossAttention):
            yield index, False  # text
            if has_image:
                yield index, True


def _attend_by(
    function: Callable[..., Tensor], layer_options: dict[str, Any], places: Iterator[tuple[int, bool]]
) -> Attend:
    """Return `attend` by a function of ComfyUI, called as ComfyUI's Wan calls it.

    Its own functions take heads apart as they lie in a cache, which saves copying all that is visible; what a node or
    another pack has set need not.
    """
    takes_heads = OVERRIDE not in layer_options and function.__module__ == attentions.__name__

    def attend(q_BLNK: Tensor, k_BSNK: Tensor, v_BSNK: Tensor, mask_LS: Tensor | None) -> Tensor:
        layer_options["block_index"], is_image = next(places)
        # 0.33's Wan asks so for the image: a package such as SageAttention may make NaN of it.
        exact = {"low_precision_attention": False} if is_image else {}
        if takes_heads:
            return function(
                *(x.transpose(1, 2) for x in (q_BLNK, k_BSNK, v_BSNK)),
                heads=q_BLNK.shape[2],
                mask=mask_LS,
                skip_reshape=True,
                skip_output_reshape=True,
                transformer_options=layer_options,
                **exact,
            ).transpose(1, 2)
        attended = function(
            *(x.flatten(2) for x in (q_BLNK, k_BSNK, v_BSNK)),
            heads=q_BLNK.shape[2],
            mask=mask_LS,
            transformer_options=layer_options,
            **exact,
        )
        # ComfyUI's functions join the heads again, [B, L, N times K].
        return attended.unflatten(2, q_BLNK.shape[2:])

    return attend
