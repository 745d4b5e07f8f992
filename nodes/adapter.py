"""Our networks in the host's clothes: CausalWan as a MODEL, TAEHV as a VAE, and the two latent conventions.

The weights keep their Wan names below `diffusion_model.`, so the host's LoRA loaders, model patches and offloading
work unchanged. Letters: B batch, T latent frames, C channels, V video frames, R RGB, H W size, P text tokens, E width.
"""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any

import comfy.latent_formats
import comfy.model_base
import comfy.model_management as memory
import comfy.ops
import comfy.supported_models
import torch
from einops import rearrange
from torch import Tensor

from ..selfforcing_core.checkpoint import Checkpoint
from ..selfforcing_core.conditioning import Conditioning
from ..selfforcing_core.config import CausalConfig, StepConfig, WanConfig
from ..selfforcing_core.geometry import PATCH, PIXEL_STEP, SPATIAL_FACTOR
from ..selfforcing_core.model import CausalWan
from ..selfforcing_core.taehv import TAEHV, StreamingDecoder
from . import host

WAN_LATENTS = comfy.latent_formats.Wan21()


# ---------------------------------------------------------------- latents --
#
# A LATENT in the graph is in the raw space of Wan's VAE. The network and every TAEHV, the bundled one included, speak
# normalised latents. These two functions are the only crossing, so the host's VAE Decode and VAE Encode work with our
# VAE as they are. The host's own Load VAE does not: it takes a float16 TAEHV for HunyuanVideo's and scales it so.


def network_latents(samples_BCTHW: Tensor) -> Tensor:
    """LATENT of the graph (raw VAE space) to what network and TAEHV speak: normalised, [B, T, C, H, W].

    Raises ValueError for latents that are not of a Wan 2.1 video.
    """
    shape = tuple(samples_BCTHW.shape)
    if len(shape) != 5 or shape[1] != WAN_LATENTS.latent_channels:
        raise ValueError(
            f"latents of shape {shape} are not a Wan 2.1 video's [batch, {WAN_LATENTS.latent_channels}, frames, "
            "height, width]; take them from a sampler of a Wan 2.1 model"
        )
    return rearrange(WAN_LATENTS.process_in(samples_BCTHW), "b c t h w -> b t c h w")


def graph_latents(latents_BTCHW: Tensor) -> Tensor:
    """Inverse of `network_latents`: raw VAE space [B, C, T, H, W]."""
    return WAN_LATENTS.process_out(rearrange(latents_BTCHW, "b t c h w -> b c t h w"))


def graph_images(frames_BVRHW: Tensor) -> Tensor:
    """Frames in [0, 1] to the graph's IMAGE [B*V, H, W, R]; the videos of a batch follow one another."""
    return rearrange(frames_BVRHW, "b v r h w -> (b v) h w r")


def _check_channels(channels: int, what: str) -> None:
    if channels != WAN_LATENTS.latent_channels:
        raise ValueError(
            f"this {what} is made for latents of {channels} channels, but Wan 2.1's have "
            f"{WAN_LATENTS.latent_channels}; choose a {what} for Wan 2.1"
        )


# ------------------------------------------------------------------ model --
class HostCausalWan(CausalWan):
    """CausalWan that also answers the call of a ComfyUI sampler: the whole video at once, bidirectionally."""

    def __init__(self, *, operations: Any, device: Any = None, dtype: Any = None, **settings: Any) -> None:
        known = {field.name for field in fields(WanConfig)}
        config = WanConfig(**{key: value for key, value in settings.items() if key in known})
        super().__init__(config, operations=operations, device=device, dtype=dtype)
        self.dtype = dtype  # the host asks for it

    def forward(self, x: Tensor, *args: Any, transformer_options: dict[str, Any] | None = None, **options: Any) -> Any:
        """With transformer_options this is the host's call, without it the core's own (see CausalWan.forward)."""
        if transformer_options is None:
            return super().forward(x, *args, **options)
        return self._forward_host(x, *args, **options)

    def _forward_host(
        self, x_BCTHW: Tensor, t_B: Tensor, context: Tensor, clip_fea: Tensor | None = None, **_: Any
    ) -> Tensor:
        if x_BCTHW.shape[-2] % PATCH or x_BCTHW.shape[-1] % PATCH:
            size = f"{x_BCTHW.shape[-1] * SPATIAL_FACTOR}x{x_BCTHW.shape[-2] * SPATIAL_FACTOR}"
            raise ValueError(f"a video of {size} pixels has an odd latent size; use multiples of {PIXEL_STEP}")
        timesteps_BT = t_B.float().reshape(len(t_B), -1).expand(-1, x_BCTHW.shape[2])
        # image-to-video models get their condition channels from the host within x
        flow = super().forward(
            rearrange(x_BCTHW, "b c t h w -> b t c h w"), timesteps_BT, context, clip_BIX=clip_fea
        )  # fmt: skip
        return rearrange(flow, "b t c h w -> b c t h w")


class SelfForcingWan(comfy.model_base.WAN21):
    """ComfyUI's Wan 2.1 with our network inside. `causal` and `steps` are what the checkpoint was trained with."""

    def __init__(self, model_config: Any, causal: CausalConfig, steps: StepConfig) -> None:
        # WAN21's own constructor would build the host's network.
        comfy.model_base.BaseModel.__init__(
            self, model_config, comfy.model_base.ModelType.FLOW, unet_model=HostCausalWan
        )
        self.image_to_video = model_config.unet_config["model_type"] == "i2v"
        self.causal = causal
        self.steps = steps


def model_from_checkpoint(checkpoint: Checkpoint, *, dtype: torch.dtype | None = None) -> Any:
    """A MODEL of the graph from a checkpoint of kind "wan"; dtype None lets the host choose what the device likes."""
    assert isinstance(checkpoint.config, WanConfig)
    _check_channels(checkpoint.config.out_dim, "model")
    steps = checkpoint.steps or StepConfig()
    model_config = comfy.supported_models.WAN21_T2V({"image_model": "wan2.1", **asdict(checkpoint.config)})
    model_config.sampling_settings = {"shift": steps.shift}
    _choose_dtype(model_config, checkpoint, dtype)
    model = SelfForcingWan(model_config, checkpoint.causal or CausalConfig(), steps)
    patcher = host.patcher_of(model, memory.get_torch_device(), memory.unet_offload_device(), dynamic=True)
    is_dynamic = getattr(patcher, "is_dynamic", lambda: False)()
    model.diffusion_model.load_state_dict(checkpoint.state_dict, assign=is_dynamic)
    model.diffusion_model.eval().requires_grad_(False)
    return patcher


def _choose_dtype(model_config: Any, checkpoint: Checkpoint, dtype: torch.dtype | None) -> None:
    """The host's own rule: weights as stored where the device computes in that type, else cast at use."""
    supported = model_config.supported_inference_dtypes
    num_parameters = sum(weight.numel() for weight in checkpoint.state_dict.values())
    stored = getattr(torch, checkpoint.dtype)
    weights = dtype or memory.unet_dtype(
        model_params=num_parameters, supported_dtypes=list(supported), weight_dtype=stored
    )
    model_config.set_inference_dtype(weights, memory.unet_manual_cast(weights, memory.get_torch_device(), supported))


def self_forcing_model(patcher: Any) -> SelfForcingWan:
    """Our model inside a MODEL. Raises ValueError for a MODEL of another loader."""
    model = patcher.model
    if isinstance(model, SelfForcingWan):
        return model
    raise ValueError(
        f"this model is a {type(model).__name__}, which cannot generate chunk by chunk; "
        "load a Self Forcing checkpoint with the node Load Model (Self Forcing)"
    )


def compute_dtype(model: SelfForcingWan) -> torch.dtype:
    """The type that activations have."""
    return model.manual_cast_dtype or model.get_dtype()


def conditioning_from_graph(
    positive: list[Any], config: WanConfig, *, batch: int, device: torch.device, dtype: torch.dtype
) -> Conditioning:
    """CONDITIONING to the core's, repeated to the batch; rows of zeros past the model's text length are cut.

    Raises ValueError if several prompts were combined, or if the embeddings are not of the model's text encoder.
    """
    if len(positive) != 1:
        raise ValueError(f"{len(positive)} combined prompts were given, but one is used; remove Conditioning (Combine)")
    embeds_BPE = positive[0][0]
    rows, width = embeds_BPE.shape[1:]
    if width != config.text_dim:
        raise ValueError(
            f"the prompt's embeddings are {width} wide, but this model reads {config.text_dim}; "
            "encode the prompt with the text encoder that belongs to the model"
        )
    if rows > config.text_len and bool(embeds_BPE[:, config.text_len :].any()):
        raise ValueError(f"the prompt has {rows} rows of text, but this model reads {config.text_len}; shorten it")
    if embeds_BPE.shape[0] not in (1, batch):
        raise ValueError(f"{embeds_BPE.shape[0]} prompts were given for {batch} videos; give one, or one per video")
    embeds_BPE = embeds_BPE[:, : config.text_len].to(device=device, dtype=dtype)
    return Conditioning(embeds_BPE.expand(batch, -1, -1))


# -------------------------------------------------------------------- VAE --
class TAEHVAutoencoder:
    """TAEHV with the methods of a ComfyUI VAE, so that it fits wherever a graph asks for one.

    Takes and returns the graph's conventions: LATENT in raw VAE space, IMAGE [.., H, W, R] in [0, 1].
    """

    latent_dim = 3
    output_channels = 3
    not_video = False

    def __init__(self, checkpoint: Checkpoint) -> None:
        _check_channels(checkpoint.config.latent_channels, "TAEHV")
        self.device = memory.vae_device()
        self.vae_dtype = memory.vae_dtype(self.device, [torch.float16, torch.bfloat16, torch.float32])
        operations = comfy.ops.manual_cast
        self.first_stage_model = TAEHV(checkpoint.config, operations=operations, dtype=self.vae_dtype)
        self.first_stage_model.load_state_dict(checkpoint.state_dict)
        self.first_stage_model.eval().requires_grad_(False)
        self.latent_channels = checkpoint.config.latent_channels
        self.patcher = host.patcher_of(self.first_stage_model, self.device, memory.vae_offload_device(), dynamic=False)

    def working_bytes(self, latent_height: int, latent_width: int) -> float:
        """Memory that decoding one latent frame takes at most: its frames at full size in a few copies."""
        widest = max(self.first_stage_model.config.decoder_widths)
        pixels = 64 * latent_height * latent_width * self.first_stage_model.frames_per_latent
        return 3.0 * pixels * widest * self.vae_dtype.itemsize

    def stream(self) -> FrameStream:
        """A new stream of frames; the network must have been loaded (host.load)."""
        return FrameStream(self)

    def decode(self, samples_BCTHW: Tensor, **_: Any) -> Tensor:
        """LATENT samples to frames [B, V, H, W, R]; checks for interruption before every latent frame."""
        latents_BTCHW = network_latents(samples_BCTHW)
        host.load([self.patcher], working_bytes=self.working_bytes(*samples_BCTHW.shape[-2:]))
        stream = self.stream()
        progress = host.Progress(latents_BTCHW.shape[1])
        frames = []
        for latent_BCHW in latents_BTCHW.unbind(1):
            host.check_interrupted()
            progress.step()
            frames.append(stream.decode(latent_BCHW[:, None]))
        progress.finish()
        return rearrange(torch.cat(frames, 1), "b v r h w -> b v h w r")

    def decode_tiled(self, samples: Tensor, **_: Any) -> Tensor:
        """As `decode`, whose memory does not grow with the video's length."""
        return self.decode(samples)

    def encode(self, pixels_VHWR: Tensor) -> Tensor:
        """IMAGE frames [V, H, W, R] of one video (or [B, V, H, W, R]) to LATENT samples."""
        frames = pixels_VHWR[None] if pixels_VHWR.ndim == 4 else pixels_VHWR
        host.load(
            [self.patcher], working_bytes=frames.shape[1] * self.working_bytes(*(s // 8 for s in frames.shape[2:4]))
        )
        frames_BVRHW = rearrange(frames[..., :3], "b v h w r -> b v r h w").to(self.device, self.vae_dtype)
        return host.to_graph(graph_latents(self.first_stage_model.encode(frames_BVRHW)))

    def encode_tiled(self, pixels: Tensor, **_: Any) -> Tensor:
        return self.encode(pixels)

    def spacial_compression_decode(self) -> int:
        return 8

    def spacial_compression_encode(self) -> int:
        return 8

    def temporal_compression_decode(self) -> int:
        return self.first_stage_model.frames_per_latent

    def get_sd(self) -> dict[str, Tensor]:
        return self.first_stage_model.state_dict()


class FrameStream:
    """Latents in, frames out, piece by piece; owns the decoder's memory of one video."""

    def __init__(self, autoencoder: TAEHVAutoencoder) -> None:
        self.autoencoder = autoencoder
        self.decoder = StreamingDecoder(autoencoder.first_stage_model)

    def decode(self, latents_BTCHW: Tensor) -> Tensor:
        """The next normalised latents to frames [B, V, R, H, W] in [0, 1], float32, where the graph keeps tensors."""
        latents = latents_BTCHW.to(self.autoencoder.device, self.autoencoder.vae_dtype)
        return host.to_graph(self.decoder.decode(latents))


def taehv_autoencoder(vae: Any) -> TAEHVAutoencoder:
    """Our autoencoder inside a VAE. Raises ValueError for a VAE of another loader."""
    if isinstance(vae, TAEHVAutoencoder):
        return vae
    raise ValueError(
        f"this VAE ({type(getattr(vae, 'first_stage_model', vae)).__name__}) cannot decode a stream; "
        "use the node Load TAEHV (Self Forcing), or leave the input open and decode with VAE Decode"
    )
