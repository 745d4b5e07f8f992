"""A Wan MODEL of the host made causal: its own modules, run in the order of our network, with our cache.

Nothing in the MODEL is replaced. Two wrappers on it look for a rollout's state in transformer_options; without one the
host's own forward pass runs, as for any MODEL. Since its own layers are called, whatever the host or another pack does
to those that have weights (LoRA, offloading, quantised layers, casting) holds in the causal pass too.

Letters: B batch, C channels, T latent frames, H W latent size, X text tokens, E text width, I image tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import comfy.ldm.modules.attention as attentions
import comfy.model_management as memory
import comfy.supported_models
import torch
import torch.nn as nn
from comfy.patcher_extension import WrappersMP
from einops import rearrange
from torch import Tensor

from ..selfforcing_core.attention import Attend, attention_by
from ..selfforcing_core.checkpoint import Checkpoint
from ..selfforcing_core.config import CausalConfig, StepConfig, WanConfig
from ..selfforcing_core.geometry import pixel_frames
from ..selfforcing_core.kv_cache import KVCache
from ..selfforcing_core.model import CausalWan
from ..selfforcing_core.rope import PLAIN
from ..selfforcing_core.scaled import ScaledWeights, stored_tensors
from ..selfforcing_core.schedule import FlowSchedule
from ..selfforcing_core.taehv_releases import WAN
from ..selfforcing_core.variants import FIRST_LAST, not_supported, variant_among, variant_of_channels
from . import host
from .autoencoder import check_channels, marked
from .patches import (
    FOLLOWED,
    OVERRIDE,
    attention_note,
    check_module,
    check_transformer_options,
    hosts_attention,
    is_changed,
    rope_axes,
    unapplied_weights,
)

log = logging.getLogger(__name__)
KEY = "selfforcing"  # of our settings in model_options, and of a rollout's state in transformer_options
CAUSAL, FEW_STEP, BASE, UNKNOWN = "causal", "few-step bidirectional", "base", "unknown"
UMT5_TO_WAN = (4096, 16)  # width of Wan's text encoder and channels of its latents: only Wan's own models have both
HOSTS_CAUSAL_SAMPLER = "sample_ar_video"  # SamplerARVideo's, which has a cache of its own
HOST_COMPILE = "torch_compile_kwargs"  # where the host's TorchCompileModel leaves its choices


@dataclass(frozen=True)
class Settings:
    """What a MODEL is and how it is sampled; travels in its model_options.

    kind: CAUSAL, FEW_STEP, BASE or UNKNOWN. cache_dtype, cache_device: None are those that the model computes in.
    guidance: scale that the file says it is sampled with. latent_space: whose latents it makes; None is not known.
    """

    kind: str = UNKNOWN
    causal: CausalConfig = field(default_factory=CausalConfig)
    steps: StepConfig = field(default_factory=StepConfig)
    cache_dtype: torch.dtype | None = None
    cache_device: str | None = None
    guidance: float | None = None
    latent_space: str | None = None


def settings_of(patcher: Any) -> Settings:
    """Raises ValueError for a MODEL that neither our loader nor our patch node has seen."""
    settings = patcher.model_options.get(KEY)
    if isinstance(settings, Settings):
        return settings
    raise ValueError(
        f"this model ({type(patcher.model).__name__}) is not prepared to generate chunk by chunk; load it with the "
        "node Load Model (Self Forcing), or put Patch Model (Self Forcing) behind its loader"
    )


def with_settings(patcher: Any, settings: Settings) -> Any:
    """A clone of the MODEL that our samplers can run. Raises ValueError for networks other than Wan 2.1's."""
    config = config_of(patcher.model.diffusion_model)
    if settings.latent_space is None and (config.text_dim, config.out_dim) == UMT5_TO_WAN:
        settings = replace(settings, latent_space=WAN)
    if settings.kind == CAUSAL:
        check_causal(patcher.model.diffusion_model)
    clone = patcher.clone()
    clone.model_options[KEY] = settings
    wrappers = (
        (WrappersMP.APPLY_MODEL, _slice_condition_channels),
        (WrappersMP.DIFFUSION_MODEL, _run_causally),
        (WrappersMP.OUTER_SAMPLE, _check_and_mark),  # in this order: the first is the outermost
        (WrappersMP.OUTER_SAMPLE, _count_extra_bytes),
    )
    for kind in dict.fromkeys(kind for kind, _ in wrappers):
        clone.remove_wrappers_with_key(kind, KEY)
    for kind, wrapper in wrappers:
        clone.add_wrapper_with_key(kind, KEY, wrapper)
    return clone


def model_from_checkpoint(
    checkpoint: Checkpoint, *, kind: str = "auto", dtype: torch.dtype | None = None, is_fast_fp8: bool = False,
    is_dynamic: bool = True,
) -> Any:  # fmt: skip
    """A MODEL of the host from a checkpoint of kind "wan", prepared for our samplers.

    kind: CAUSAL, FEW_STEP, BASE, or "auto": what the file says, UNKNOWN (which is shown) where it says nothing. Another
    kind than the file's is used, and that is shown.
    dtype: None lets the host choose what the device likes. is_fast_fp8: the host's own float8 products.
    is_dynamic: let the host bring weights in by pieces, where it can.
    """
    assert isinstance(checkpoint.config, WanConfig)
    _check_variant(checkpoint.config)
    check_channels(checkpoint.config.out_dim, "model")
    steps = checkpoint.steps or StepConfig()
    said = kind_in(checkpoint)
    if kind == "auto":
        kind = said
    elif said not in (kind, UNKNOWN):
        host.show_text(f"the file says that its model is of kind '{said}'; it is loaded as '{kind}'")
    model_config = _host_config(checkpoint.config, is_causal=kind == CAUSAL)
    if checkpoint.steps is not None or kind != BASE:  # an undistilled model keeps the host's shift for Wan
        model_config.sampling_settings = {"shift": steps.shift}
    _choose_dtype(model_config, checkpoint, dtype)
    if is_fast_fp8:
        model_config.optimizations["fp8"] = True
    model = model_config.get_model(checkpoint.state_dict, "")
    patcher = host.patcher_of(model, memory.get_torch_device(), memory.unet_offload_device(), dynamic=is_dynamic)
    assign = getattr(patcher, "is_dynamic", lambda: False)()
    if isinstance(checkpoint.state_dict, ScaledWeights):
        _fill_scaled(model.diffusion_model, checkpoint.state_dict, assign=assign)
    else:
        model.diffusion_model.load_state_dict(checkpoint.state_dict, assign=assign)
    for note in checkpoint.notes:
        log.warning("%s", note)
    model.diffusion_model.eval().requires_grad_(False)
    settings = Settings(
        kind, checkpoint.causal or CausalConfig(), steps, guidance=checkpoint.guidance,
        latent_space=checkpoint.latent_space,
    )  # fmt: skip
    note = kind_note(settings)
    if note is not None:
        host.show_text(note)
    return with_settings(patcher, settings)


def kind_note(settings: Settings) -> str | None:
    """What the user should know of how the MODEL was trained; None where it is what our samplers are for."""
    if settings.kind == UNKNOWN:
        return (
            "the file does not say how its model was trained; choose kind in Load Model to be sure (causal for Self "
            "Forcing and its kin). A plain Wan 2.1 model, which was not distilled, gives blurred or broken videos here"
        )
    steps = settings.steps
    if settings.kind == CAUSAL and steps.solver != "renoise":
        guidance = "" if settings.guidance is None else f" and cfg {settings.guidance:g}"
        return f"this model is not distilled: its file lists {len(steps.steps)} steps ({steps.solver}){guidance}"
    return None


def kind_in(checkpoint: Checkpoint) -> str:
    """The kind that a file says its model is of; UNKNOWN where it says nothing."""
    if checkpoint.causal is not None:
        return CAUSAL
    if checkpoint.bidirectional is None:
        return UNKNOWN
    return FEW_STEP if checkpoint.steps is None or checkpoint.steps.solver == "renoise" else BASE


def _fill_scaled(network: nn.Module, weights: ScaledWeights, *, assign: bool) -> None:
    """Multiply one weight at a time into its place: nothing but that one is held in float32."""
    log.warning(
        "%d weights in 8 bits are widened to the model's number type, which takes twice the memory or more; Load "
        "Diffusion Model with Patch Model (Self Forcing) keeps them in 8 bits", len(weights.scales),
    )  # fmt: skip
    places = dict(network.named_parameters())
    if places.keys() != weights.keys():  # as a checkpoint is complete, this is a network of another kind
        raise AssertionError(f"parameters differ: {sorted(places.keys() ^ weights.keys())[:3]}")
    if assign:
        made = {name: tensor.to(places[name].dtype) for name, tensor in weights.items()}
        network.load_state_dict(made, assign=True)
        return
    for name, tensor in weights.items():
        places[name].data.copy_(tensor)


def _host_config(config: WanConfig, *, is_causal: bool) -> Any:
    """The host's own class for this network; with is_causal the one that its own causal nodes ask for, if it has it."""
    classes = comfy.supported_models
    found = classes.WAN21_I2V if config.model_type == "i2v" else classes.WAN21_T2V
    if is_causal and config.model_type == "t2v":
        found = getattr(classes, "WAN21_CausalAR_T2V", found)
    return found({"image_model": "wan2.1", **asdict(config)})


def _choose_dtype(model_config: Any, checkpoint: Checkpoint, dtype: torch.dtype | None) -> None:
    """The host's own rule: weights as stored where the device computes in that type, else cast at use."""
    supported = model_config.supported_inference_dtypes
    num_parameters = sum(weight.numel() for weight in stored_tensors(checkpoint.state_dict).values())
    stored = getattr(torch, checkpoint.dtype)
    weights = dtype or memory.unet_dtype(
        model_params=num_parameters, supported_dtypes=list(supported), weight_dtype=stored
    )
    model_config.set_inference_dtype(weights, memory.unet_manual_cast(weights, memory.get_torch_device(), supported))


# ---------------------------------------------------------------- network --
def config_of(native: nn.Module) -> WanConfig:
    """Sizes of the host's network. Raises ValueError unless it is a plain Wan 2.1 transformer."""
    kind = type(native).__name__
    if kind not in ("WanModel", "CausalWanModel") or getattr(native, "ref_conv", None) is not None:
        names = (name for name, _ in native.named_parameters() if FIRST_LAST not in name)
        variant = variant_among(names) if "Wan" in kind else None
        raise ValueError(not_supported(variant or f"a network of kind {kind}"))
    names = ("dim", "ffn_dim", "num_heads", "num_layers", "in_dim", "out_dim", "text_dim", "text_len", "freq_dim")
    sizes = {name: getattr(native, name) for name in names}
    config = WanConfig(**sizes, eps=native.eps, patch_size=tuple(native.patch_size), model_type=native.model_type)
    _check_variant(config)
    return config


def _check_variant(config: WanConfig) -> None:
    variant = variant_of_channels(config.in_dim, config.out_dim)
    if variant is not None:
        raise ValueError(not_supported(variant))


def check_at_once(settings: Settings, num_frames: int, sampler: Any) -> None:
    """Raise ValueError where a sampler of others would evaluate more frames together than the MODEL ever saw so."""
    name = getattr(getattr(sampler, "sampler_function", sampler), "__name__", type(sampler).__name__)
    wraps_ours = any(hasattr(option, "whole_frames") for option in getattr(sampler, "extra_options", {}).values())
    if settings.kind != CAUSAL or num_frames <= settings.causal.chunk or name == HOSTS_CAUSAL_SAMPLER or wraps_ours:
        return
    raise ValueError(
        f"this model generates chunk by chunk ({settings.causal.chunk} latent frames), but the sampler "
        f"{name.removeprefix('sample_')} would denoise all {num_frames} latent frames at once, which it never learnt; "
        "use Stream Sampler (Self Forcing), or Sampler (Self Forcing) in SamplerCustomAdvanced; if it was trained on "
        "whole videos, choose kind 'few-step bidirectional' in its loader"
    )


def check_causal(native: nn.Module) -> None:
    """Raise ValueError for a network that only makes sense with the whole video before it."""
    if getattr(getattr(native, "img_emb", None), "emb_pos", None) is not None:
        raise ValueError(
            "a first-and-last-frame model (img_emb.emb_pos) cannot generate chunk by chunk: its last frame is known "
            "from the start; choose kind 'few-step bidirectional', or use a model made for one first frame"
        )


class _InFloat32(nn.Module):
    """The host keeps the patch embedding in float32 whatever the rest is in."""

    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self.embedding = embedding

    def forward(self, x: Tensor) -> Tensor:
        return self.embedding(x.float()).to(x.dtype)


class _HostsCrossAttention(nn.Module):
    """A block's cross-attention that is not ComfyUI's own (NAG of other packs), called as ComfyUI's block calls it."""

    theirs: Callable[..., Tensor]

    def __init__(self, theirs: nn.Module, index: int) -> None:
        super().__init__()
        self.__dict__["theirs"] = theirs  # no child of ours
        self.index = index
        self.options: dict[str, Any] = {}  # what the network's layers are told of the present evaluation

    def keys_values(self, text_BXD: Tensor, image_BID: Tensor | None) -> tuple[Any, ...]:
        """Embedded text and image, from which it makes keys and values anew each time."""
        return text_BXD, image_BID

    def attend_to(self, x_GPD: Tensor, length: int, keys_values: tuple[Any, ...]) -> Tensor:
        text_BXD, image_BID = keys_values
        context_BXD = text_BXD if image_BID is None else torch.cat([image_BID, text_BXD], 1)
        self.options["block_index"] = self.index
        attended = self.theirs(
            x_GPD.reshape(-1, length, x_GPD.shape[-1]), context_BXD,
            context_img_len=None if image_BID is None else image_BID.shape[1], transformer_options=self.options,
        )  # fmt: skip
        return attended.reshape(x_GPD.shape)


class _HostsFeedForward:
    """A block's feed-forward network that is not ComfyUI's own; it is given whole rows, as there."""

    def __init__(self, theirs: nn.Module) -> None:
        self.theirs = theirs
        self.batch = 1

    def __call__(self, x_GPD: Tensor) -> Tensor:
        return self.theirs(x_GPD.reshape(self.batch, -1, x_GPD.shape[-1])).reshape(x_GPD.shape)


class SharedNetwork:
    """CausalWan over the modules of the host's network: the same layers, none of its own.

    patcher: the MODEL, whose LoRA may hold parameters that the host does not apply. Raises ValueError where a module
    whose place ours take has been changed.
    """

    def __init__(self, native: nn.Module, patcher: Any = None) -> None:
        self.native = native
        with torch.device("meta"):
            self.network = CausalWan(config_of(native)).eval()
        check_causal(native)
        self._modulated: dict[str, tuple[nn.Module, nn.Module]] = {}
        self.cross_attentions: list[_HostsCrossAttention] = []
        self.feed_forwards: list[_HostsFeedForward] = []
        self._share(self.network, native, "")
        self.network.patch_embedding = _InFloat32(native.patch_embedding)  # type: ignore[arg-type]
        names = (f"{path}modulation" for path in self._modulated)
        self._patched = {} if patcher is None else unapplied_weights(patcher, names)
        self._patched_from = {path: theirs.modulation for path, (_, theirs) in self._modulated.items()}

    def _share(self, ours: nn.Module, theirs: nn.Module, path: str) -> None:
        """Put their layers in the place of ours; only the modules that this project defines stay."""
        check_module(path.rstrip("."), theirs)
        if "modulation" in ours._parameters:
            del ours._parameters["modulation"]
            self._modulated[path] = ours, theirs
        for name, child in theirs.named_children():
            if name not in ours._modules:  # without weights: norms, activations, the host's table of positions
                check_module(path + name, child, is_hosts=name == "rope_embedder")
        for name, child in list(ours.named_children()):
            if name in FOLLOWED and is_changed(getattr(theirs, name)):
                self._follow(ours, f"{path}{name}", getattr(theirs, name))
            elif isinstance(child, (nn.ModuleList, nn.ModuleDict)) or type(child).__module__ == CausalWan.__module__:
                self._share(child, getattr(theirs, name), f"{path}{name}.")
            else:
                setattr(ours, name, getattr(theirs, name))

    def _follow(self, block: Any, path: str, theirs: nn.Module) -> None:
        """Call their module as a whole in this block."""
        _, index, name = path.split(".")  # blocks.3.ffn
        delattr(block, name)
        if name == "ffn":
            block.feed = _HostsFeedForward(theirs)
            self.feed_forwards.append(block.feed)
        else:
            block.cross_attn = _HostsCrossAttention(theirs, int(index))
            self.cross_attentions.append(block.cross_attn)
        log.info("%s is not ComfyUI's own; it is called as it is", path)

    @property
    def follows(self) -> bool:
        """Whether modules of others are called whole."""
        return bool(self.cross_attentions or self.feed_forwards)

    def __call__(self, *args: Any, **options: Any) -> Tensor:
        for path, (ours, theirs) in self._modulated.items():  # a hook or an offload may have put another tensor there
            is_left = theirs.modulation is self._patched_from[path]
            patched = self._patched.get(f"{path}modulation") if is_left else None
            ours.__dict__["modulation"] = theirs.modulation if patched is None else patched
        return self.network(*args, **options)


class RolloutState:
    """What sampler and network share during one rollout. The host copies dictionaries and lists, but not this.

    is_watched: others stand around each evaluation, so that prompts may differ from one to the next.
    """

    def __init__(
        self, caches: Sequence[KVCache], index_of: dict[Any, int], compile_options: dict[str, Any] | None, patcher: Any,
        *, is_watched: bool = False,
    ) -> None:  # fmt: skip
        self.caches, self.index_of, self.compile_options, self.patcher = caches, index_of, compile_options, patcher
        self.is_watched = is_watched
        self.start_frame: int | None = None  # of the chunk being evaluated; None: the host's own forward pass
        self.num_frames = 0
        self.evaluated: set[int] = set()  # caches of the conditions that the latest call came to
        self._prompts: dict[int, tuple[Tensor, Tensor | None]] = {}  # from which a cache's text was made
        self._shared: SharedNetwork | None = None
        self._is_compiled = False

    def begin_call(self, start_frame: int, num_frames: int) -> None:
        """The guider is about to be asked for these frames."""
        self.start_frame, self.num_frames, self.evaluated = start_frame, num_frames, set()

    def share(self, native: nn.Module, options: dict[str, Any]) -> SharedNetwork:
        """Our network over the host's modules. Raises ValueError where they carry what ours would ignore."""
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
            what = "attention" if OVERRIDE in options else "cross-attention or feed-forward network"
            log.warning("blocks are not compiled: another %s is set on the model, which runs outside them", what)
            return
        if hosts_attention(options) is not None:
            log.info("cross-attention is inside the compiled blocks, and stays torch's")
        self._shared.network.compile_blocks(**self.compile_options)
        self._is_compiled = True

    @torch.compiler.disable
    def evaluate(
        self, native: nn.Module, x_BCTHW: Tensor, t_B: Tensor, context_BXE: Tensor, clip_BIX: Tensor | None,
        options: dict[str, Any],
    ) -> Tensor:  # fmt: skip
        """Flow [B, C, T, H, W] of one chunk. The batch holds one or more conditions, each with a cache of its own."""
        assert self.start_frame is not None
        check_transformer_options(options)
        check_module("", native)  # some nodes replace its methods for the time of an evaluation
        shared = self.share(native, options)
        shared.network.axes = rope_axes(options) or PLAIN
        ids, flows = options["uuids"], []
        count = len(ids)
        clips = [None] * count if clip_BIX is None else clip_BIX.chunk(count)
        rows = zip(ids, x_BCTHW.chunk(count), t_B.chunk(count), context_BXE.chunk(count), clips)
        for row, (identity, x, t, context, clip) in enumerate(rows):
            cache = self._cache_for(identity, x)
            if self.is_watched:
                self._renew_text(identity, context, clip)
            with self._hosts_layers(shared, options, row, x, clip is not None):
                flows.append(
                    shared(
                        rearrange(x, "b c t h w -> b t c h w"), t.float()[:, None].expand(-1, x.shape[2]),
                        context[:, : shared.network.config.text_len], clip_BIX=clip,
                        cache=cache, start_frame=self.start_frame,
                    )
                )  # fmt: skip
        return rearrange(torch.cat(flows), "b t c h w -> b c t h w")

    def _cache_for(self, identity: Any, x_BCTHW: Tensor) -> KVCache:
        """The cache of a condition. Raises ValueError where an evaluation is not the one that the rollout asked for."""
        index = self.index_of.get(identity)
        if index is None:
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

    def _renew_text(self, identity: Any, context_BXE: Tensor, clip_BIX: Tensor | None) -> None:
        """Forget the text in a cache where a wrapper gives the network another one than before."""
        index, prompt = self.index_of[identity], (context_BXE, clip_BIX)
        before = self._prompts.get(index)
        if before is not None and not all(a is b or _is_equal(a, b) for a, b in zip(before, prompt)):
            self.caches[index].cross.clear()
        self._prompts[index] = prompt

    @contextmanager
    def _hosts_layers(
        self, shared: SharedNetwork, options: dict[str, Any], row: int, x_BCTHW: Tensor, has_image: bool
    ) -> Iterator[None]:
        """Modules and attention of the host in the places of ours while the block runs, told what the host's Wan tells.

        That is: which condition this is, the block, and the size of the grid.
        """
        function = hosts_attention(options)
        if function is None and not shared.follows:
            yield
            return
        network = shared.network
        told = {
            **options, "total_blocks": len(network.blocks), "block_type": "double",
            "grid_sizes": torch.Size(size // side for size, side in zip(x_BCTHW.shape[2:], network.config.patch_size)),
            "uuids": options["uuids"][row : row + 1], "cond_or_uncond": options["cond_or_uncond"][row : row + 1],
        }  # fmt: skip
        for module in shared.cross_attentions:
            module.options = told
        for feed in shared.feed_forwards:
            feed.batch = x_BCTHW.shape[0]
        places = _places(network, has_image=has_image, is_compiled=self._is_compiled)
        with nullcontext() if function is None else attention_by(_attend_by(function, told, places)):
            yield


def _not_followed(what: str) -> ValueError:
    return ValueError(
        f"a node on this model {what}, which the cache of a video made chunk by chunk cannot follow; remove it, or "
        "sample the whole video with ComfyUI's own sampler"
    )


def _is_equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and torch.equal(a, b)


def _places(network: CausalWan, *, has_image: bool, is_compiled: bool) -> Iterator[tuple[int, bool]]:
    """Block, and whether it is to the image, of each call of attention in an evaluation, in their order."""
    for index, block in enumerate(network.blocks):
        yield index, False  # a block's own tokens
        if not is_compiled and not isinstance(block.cross_attn, _HostsCrossAttention):
            yield index, False  # text
            if has_image:
                yield index, True


def _attend_by(function: Callable[..., Tensor], told: dict[str, Any], places: Iterator[tuple[int, bool]]) -> Attend:
    """`attend` by a function of the host, called as the host's Wan calls it.

    Its own functions take heads apart as they lie in a cache, which saves copying all that is visible; what a node or
    another pack has set need not.
    """
    takes_heads = OVERRIDE not in told and function.__module__ == attentions.__name__

    def attend(q_BLNK: Tensor, k_BSNK: Tensor, v_BSNK: Tensor, mask_LS: Tensor | None) -> Tensor:
        told["block_index"], is_image = next(places)
        exact = {"low_precision_attention": False} if is_image else {}  # as newer hosts ask for
        if takes_heads:
            return function(
                *(x.transpose(1, 2) for x in (q_BLNK, k_BSNK, v_BSNK)), heads=q_BLNK.shape[2], mask=mask_LS,
                skip_reshape=True, skip_output_reshape=True, transformer_options=told, **exact,
            ).transpose(1, 2)  # fmt: skip
        attended = function(
            *(x.flatten(2) for x in (q_BLNK, k_BSNK, v_BSNK)), heads=q_BLNK.shape[2], mask=mask_LS,
            transformer_options=told, **exact,
        )  # fmt: skip
        return attended.unflatten(2, q_BLNK.shape[2:])

    return attend


# --------------------------------------------------------------- wrappers --
def _state_in(transformer_options: dict[str, Any] | None) -> RolloutState | None:
    state = (transformer_options or {}).get(KEY)
    return state if isinstance(state, RolloutState) and state.start_frame is not None else None


def _slice_condition_channels(
    executor: Any, x: Tensor, t: Tensor, c_concat: Any = None, *args: Any, **kwargs: Any
) -> Any:
    """Condition channels span the whole video; a chunk takes its own frames of them."""
    options = kwargs.get("transformer_options") or next((a for a in args if isinstance(a, dict) and KEY in a), None)
    state = _state_in(options)
    if state is not None and c_concat is not None:
        assert state.start_frame is not None
        c_concat = c_concat[:, :, state.start_frame : state.start_frame + state.num_frames]
    return executor(x, t, c_concat, *args, **kwargs)


def _run_causally(
    executor: Any,
    x: Tensor,
    timestep: Tensor,
    context: Tensor,
    clip_fea: Tensor | None = None,
    time_dim_concat: Tensor | None = None,
    transformer_options: dict[str, Any] | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Our forward pass where a rollout is under way, else the host's own; wrappers of others stay around either."""
    state = _state_in(transformer_options)
    if state is None:
        return executor(x, timestep, context, clip_fea, time_dim_concat, transformer_options or {}, *args, **kwargs)
    native = executor.class_obj

    def causal_pass(
        x: Tensor, timestep: Tensor, context: Tensor, clip_fea: Tensor | None, time_dim_concat: Tensor | None,
        transformer_options: dict[str, Any], *_: Any, **__: Any,
    ) -> Tensor:  # fmt: skip
        return state.evaluate(native, x, timestep, context, clip_fea, transformer_options)

    inner = type(executor)(causal_pass, native, executor.wrappers, executor.idx)
    return inner(x, timestep, context, clip_fea, time_dim_concat, transformer_options, *args, **kwargs)


def _check_and_mark(
    executor: Any, noise: Tensor, latent_image: Tensor, sampler: Any, sigmas: Tensor,
    denoise_mask: Tensor | None = None, *args: Any, **kwargs: Any,
) -> Any:  # fmt: skip
    """Before anything is loaded: refuse what would go wrong, leave out what is no whole chunk. After: mark the result.

    Samplers of ours have `check` and `whole_frames`; any other sees all frames at once.
    """
    guider = executor.class_obj
    settings = settings_of(guider.model_patcher)
    if not hasattr(sampler, "check"):
        check_at_once(settings, noise.shape[2] if noise.ndim == 5 else 1, sampler)
    else:
        sampler.check(guider)
        count = sampler.whole_frames(guider, noise.shape[2], denoise_mask) if noise.ndim == 5 else noise.shape[2]
        if count < noise.shape[2]:
            show_left_out(noise.shape[2], count)
            noise, latent_image = noise[:, :, :count], latent_image[:, :, :count]
            denoise_mask = None if denoise_mask is None else denoise_mask[:, :, :count]
            kwargs |= {"latent_shapes": [latent_image.shape]} if "latent_shapes" in kwargs else {}
    made = executor(noise, latent_image, sampler, sigmas, denoise_mask, *args, **kwargs)
    return marked(made.to(memory.intermediate_device()), settings.latent_space)


def show_left_out(given: int, count: int) -> None:
    host.show_text(
        f"length {pixel_frames(given)} is no whole number of chunks: the video has {pixel_frames(count)} frames"
    )


def _count_extra_bytes(
    executor: Any, noise: Tensor, latent_image: Tensor, sampler: Any, *args: Any, **kwargs: Any
) -> Any:
    """While the host decides how much of the model fits, its estimate is that of the coming rollout.

    One chunk is evaluated at a time, not the whole video; caches and decoder come on top.
    """
    guider = executor.class_obj
    if not hasattr(sampler, "extra_bytes"):
        return executor(noise, latent_image, sampler, *args, **kwargs)
    shape, model = tuple(noise.shape), guider.model_patcher.model
    frames, extra = sampler.frames_at_once(guider, shape), sampler.extra_bytes(guider, shape)
    estimate = type(model).memory_required

    def of_a_chunk(input_shape: Sequence[int], **options: Any) -> float:
        return estimate(model, [*input_shape[:2], frames, *input_shape[3:]], **options) + extra

    model.memory_required = of_a_chunk
    try:
        return executor(noise, latent_image, sampler, *args, **kwargs)
    finally:
        forget_extra_bytes(model)


def forget_extra_bytes(model: nn.Module) -> None:
    """The caches lie in memory now, or are gone: the estimate is again the host's own."""
    model.__dict__.pop("memory_required", None)


# --------------------------------------------------------------- settings --
AUTO, SINK_AUTO, NOISE_AUTO = 0, -1, -1.0  # widget values that stand for the MODEL's own setting


def causal_settings(trained: CausalConfig, chunk: int, window: int, sink: int) -> CausalConfig:
    """The widgets' values, the MODEL's own where they say auto; what they replace is said."""
    widgets = (("chunk", chunk, AUTO), ("window", window, AUTO), ("sink", sink, SINK_AUTO))
    chosen = {name: value for name, value, auto in widgets if value not in (auto, getattr(trained, name))}
    for name, value in chosen.items():
        log.info("the model's own %s is %d; %d is used", name, getattr(trained, name), value)
    return replace(trained, **chosen)


def sigmas_of(patcher: Any, num_steps: int, shift: float) -> Tensor:
    """SIGMAS of the graph, 0 at the end: the MODEL's own list at auto, else `num_steps` evenly spaced ones.

    shift: AUTO is the MODEL's own, or what a ModelSamplingSD3 node set.
    """
    trained = settings_of(patcher).steps
    keeps_list = num_steps in (AUTO, len(trained.steps))
    chosen = shift or getattr(patcher.get_model_object("model_sampling"), "shift", trained.shift)
    if keeps_list:
        schedule = FlowSchedule(replace(trained, shift=chosen))
        if not trained.warp and trained.sigma == "exact" and chosen != trained.shift:
            log.warning("the model gives its timesteps as they are, so that shift %g changes nothing", chosen)
    else:  # evenly spaced ones are warped, whatever the model's own list is
        log.info("the model's own steps are %d; %d even ones are used", len(trained.steps), num_steps)
        even = StepConfig.even(num_steps, shift=chosen)
        schedule = FlowSchedule(replace(trained, steps=even.steps, shift=chosen, warp=True))
    return torch.tensor([*schedule.sigmas, 0.0], dtype=torch.float32)
