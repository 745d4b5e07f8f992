"""ComfyUI's Wan network in the order of ours: the sizes of its modules, and a CausalWan that is made of them.

"Own" is a module of CausalWan, "native" the one of ComfyUI's network at the same path: both name modules as Wan's
release does.

Letters: B batch, P text tokens, D model width, I image tokens, G = B times T, Q tokens of one frame.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from ...selfforcing_core.config import WanConfig
from ...selfforcing_core.model import CausalWan
from ...selfforcing_core.weights.variants import FIRST_LAST, not_supported, variant_among, variant_of_channels
from .patches import FOLLOWED, check_module, is_changed, unapplied_weights

log = logging.getLogger(__name__)


def config_of(native: nn.Module) -> WanConfig:
    """Return the sizes of ComfyUI's network. Raises ValueError unless it is a plain Wan 2.1 transformer."""
    kind = type(native).__name__
    # By name, since older versions have no CausalWanModel. Wan Fun Control is a WanModel too, with a ref_conv.
    if kind not in ("WanModel", "CausalWanModel") or getattr(native, "ref_conv", None) is not None:
        names = (name for name, _ in native.named_parameters() if FIRST_LAST not in name)
        variant = variant_among(names) if "Wan" in kind else None
        raise ValueError(not_supported(variant or f"a network of kind {kind}"))
    # ComfyUI's network keeps what it was built with under the names of Wan's own configuration.
    names = ("dim", "ffn_dim", "num_heads", "num_layers", "in_dim", "out_dim", "text_dim", "text_len", "freq_dim")
    sizes = {name: getattr(native, name) for name in names}
    config = WanConfig(**sizes, eps=native.eps, patch_size=tuple(native.patch_size), model_type=native.model_type)
    check_variant(config)
    if config.model_type == "t2v" and config.in_dim > config.out_dim:  # ComfyUI's name for Wan 2.2's, without CLIP
        config = replace(config, model_type="i2v", image_features=False)
    return config


def check_variant(config: WanConfig) -> None:
    """Raise ValueError for a Wan model of another kind, as its channels tell."""
    variant = variant_of_channels(config.in_dim, config.out_dim)
    if variant is not None:
        raise ValueError(not_supported(variant))


def check_causal(native: nn.Module) -> None:
    """Raise ValueError for a network that only makes sense with the whole video before it."""
    if getattr(getattr(native, "img_emb", None), "emb_pos", None) is not None:
        raise ValueError(
            "a first-and-last-frame model (img_emb.emb_pos) cannot generate chunk by chunk: its last frame is known "
            "from the start; choose kind 'few-step bidirectional', or use a model made for one first frame"
        )


class _InFloat32(nn.Module):
    """ComfyUI's patch embedding, whose weights are float32 whatever the rest is in: input and output are cast."""

    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self.embedding = embedding

    def forward(self, x: Tensor) -> Tensor:
        return self.embedding(x.float()).to(x.dtype)


class ForeignCrossAttention(nn.Module):
    """A block's cross-attention that is not ComfyUI's own (NAG of other packs), called as ComfyUI's block calls it."""

    foreign: Callable[..., Tensor]

    def __init__(self, foreign: nn.Module, index: int) -> None:
        super().__init__()
        self.__dict__["foreign"] = foreign  # no child of ours, so that nothing walks from our network into it
        self.index = index  # of the block
        self.options: dict[str, Any] = {}  # what the network's layers are told of the present evaluation

    def keys_values(self, text_BPD: Tensor, image_BID: Tensor | None) -> tuple[Any, ...]:
        """Return embedded text and image, from which it makes keys and values anew each time."""
        return text_BPD, image_BID

    def attend_to(self, x_GQD: Tensor, length: int, keys_values: tuple[Any, ...]) -> Tensor:
        """Return what tokens x, rows of `length`, read of text and image, in the shape of x."""
        text_BPD, image_BID = keys_values
        # ComfyUI's Wan joins both, the image first, and says how many tokens of it there are.
        context_BPD = text_BPD if image_BID is None else torch.cat([image_BID, text_BPD], 1)
        self.options["block_index"] = self.index
        attended = self.foreign(
            x_GQD.reshape(-1, length, x_GQD.shape[-1]),
            context_BPD,
            context_img_len=None if image_BID is None else image_BID.shape[1],
            transformer_options=self.options,
        )
        return attended.reshape(x_GQD.shape)


class ForeignFeedForward:
    """A block's feed-forward network that is not ComfyUI's own; it is given whole rows, as there."""

    def __init__(self, foreign: nn.Module) -> None:
        self.foreign = foreign
        self.batch = 1  # set before each evaluation: G folds videos and frames together, and a row is a whole video

    def __call__(self, x_GQD: Tensor) -> Tensor:
        return self.foreign(x_GQD.reshape(self.batch, -1, x_GQD.shape[-1])).reshape(x_GQD.shape)


class SharedNetwork:
    """CausalWan over the modules of ComfyUI's network: the same layers, none of its own.

    patcher: the MODEL, whose LoRA may hold parameters that ComfyUI does not apply. Raises ValueError where a module
    whose place ours take has been changed.
    """

    def __init__(self, native: nn.Module, patcher: Any = None) -> None:
        self.native = native
        with torch.device("meta"):  # its own weights are never used, so they take no memory
            self.network = CausalWan(config_of(native)).eval()
        check_causal(native)
        self._modulated: dict[str, tuple[nn.Module, nn.Module]] = {}  # own and native module with one, by path
        self.cross_attentions: list[ForeignCrossAttention] = []
        self.feed_forwards: list[ForeignFeedForward] = []
        self._share(self.network, native, "")
        self.network.patch_embedding = _InFloat32(native.patch_embedding)  # type: ignore[arg-type]
        # ComfyUI patches modules that hold parameters and no modules. A block holds both, so it leaves modulation out.
        names = (f"{path}modulation" for path in self._modulated)
        self._patched = {} if patcher is None else unapplied_weights(patcher, names)
        self._patched_from = {path: native_module.modulation for path, (_, native_module) in self._modulated.items()}

    def _share(self, own: nn.Module, native: nn.Module, path: str) -> None:
        """Put ComfyUI's layers in the place of ours; only the modules that this project defines stay."""
        check_module(path.rstrip("."), native)
        if "modulation" in own._parameters:
            del own._parameters["modulation"]  # an attribute of each call: ComfyUI moves its own while it offloads
            self._modulated[path] = own, native
        for name, child in native.named_children():
            if name not in own._modules:  # without weights: norms, activations, ComfyUI's table of positions
                check_module(path + name, child, is_comfyuis=name == "rope_embedder")
        for name, child in list(own.named_children()):
            if name in FOLLOWED and is_changed(getattr(native, name)):
                self._follow(own, f"{path}{name}", getattr(native, name))
            elif isinstance(child, (nn.ModuleList, nn.ModuleDict)) or type(child).__module__ == CausalWan.__module__:
                self._share(child, getattr(native, name), f"{path}{name}.")
            else:
                # A layer with weights: calling it is what keeps LoRA, quantisation, casting and offloading in force.
                setattr(own, name, getattr(native, name))

    def _follow(self, block: Any, path: str, foreign: nn.Module) -> None:
        """Call another pack's module as a whole in this block."""
        _, index, name = path.split(".")  # blocks.3.ffn
        delattr(block, name)
        if name == "ffn":
            block.feed = ForeignFeedForward(foreign)
            self.feed_forwards.append(block.feed)
        else:
            block.cross_attn = ForeignCrossAttention(foreign, int(index))
            self.cross_attentions.append(block.cross_attn)
        log.info("%s is not ComfyUI's own; it is called as it is", path)

    @property
    def follows(self) -> bool:
        """Return whether modules of others are called whole."""
        return bool(self.cross_attentions or self.feed_forwards)

    def __call__(self, *args: Any, **options: Any) -> Tensor:
        for path, (own, native) in self._modulated.items():
            # A hook or an offload may have put another tensor there: then ComfyUI has taken care of the patch itself.
            is_left = native.modulation is self._patched_from[path]
            patched = self._patched.get(f"{path}modulation") if is_left else None
            own.__dict__["modulation"] = native.modulation if patched is None else patched
        return self.network(*args, **options)
