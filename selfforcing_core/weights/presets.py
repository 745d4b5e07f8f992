"""Settings of the released checkpoints of the Self Forcing family, one record a release, as data.

Every number was read in the release's own configuration or code, and `Preset.sources` says where. What nobody has read
is None, and `open_questions` says why: it is asked for, never guessed. Releases that cannot run here are listed too, so
that their files are refused by name. Which of them a file is, `recognise.py` says.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from .latent_space import WAN

APACHE = "Apache-2.0"


# ----------------------------------------------------------------- records --
@dataclass(frozen=True)
class Sizes:
    """Sizes of a released transformer; None where the release was not read for it."""

    dim: int
    ffn_dim: int | None
    num_heads: int
    num_layers: int
    in_dim: int = 16  # noisy latents, and what an image-to-video network is conditioned on
    out_dim: int = 16
    has_image_features: bool | None = False  # the projection of CLIP's features, `img_emb`


@dataclass(frozen=True)
class LoraFile:
    """The LoRA without which a base is another model than the paper's."""

    file: str | None  # in the same repository; None where its name was not read
    rank: int
    alpha: int


@dataclass(frozen=True)
class Twin:
    """The network for low noise beside the one for high noise."""

    file: str  # in the same repository
    boundary: float | None = None  # share of the schedule above which the network for high noise is called
    boundary_step: int | None = None  # or the index of the first step of the network for low noise


@dataclass(frozen=True)
class Preset:
    """How one released checkpoint is run. Defaults are those of the family, as Self Forcing's own configuration has.

    Lengths are in latent frames, sizes in pixels.
    """

    name: str
    title: str
    repository: str | None  # on huggingface.co
    files: tuple[str, ...]  # in the repository; may hold wildcards
    read_in: str  # where every number was read that `read_elsewhere` does not name
    # What is cached, and how a chunk is denoised; the names are those of CausalConfig and StepConfig.
    chunk: int | None = 3
    window: int | None = 21
    sink: int | None = 0
    policy: str | None = "self-forcing"  # what the cache keeps, where, and what a prompt change does to it
    steps: tuple[float, ...] | None = (1000.0, 750.0, 500.0, 250.0)
    first_chunk_steps: tuple[float, ...] | None = None  # None: as every chunk
    shift: float | None = 5.0
    warp: bool | None = True  # the list goes through the shift before use; else it is written as the network sees it
    solver: str | None = "renoise"
    is_whole: bool | None = None  # the network is told whole timesteps; None: as they are
    cache_source: str | None = "clean"  # the pass at t = 0; else "last_step"
    independent_first_frame: bool = False
    guidance: float | None = None  # None: nothing was read, and distilled networks are called once a step
    policy_options: Mapping[str, Any] = field(default_factory=dict, hash=False)  # numbers that only this policy has
    # Which weights, and what belongs to them.
    weights: str | None = "as stored"  # "ema" or "raw" where the release holds or may hold both
    containers: tuple[str, ...] = ()  # those of the released file; () for names without one
    has_fsdp_infix: bool = False
    lora: LoraFile | None = None
    twin: Twin | None = None
    # What comes out.
    task: str = "t2v"
    is_causal: bool = True
    fps: float | None = 16.0
    native_size: tuple[int, int] | None = (480, 832)  # height, width
    latent_space: str | None = WAN
    # What a file of it looks like.
    sizes: Sizes | None = Sizes(1536, 8960, 12, 30)  # of Wan 2.1 1.3B
    signs: tuple[str, ...] = ()  # parts of parameter names that only such networks have
    licence: str | None = None  # None where it was not read
    unsupported: str | None = None  # why it cannot run here, whatever the cache learns
    # By field: where it was read if not in `read_in`; why it is None, unknown or without use for this release.
    read_elsewhere: Mapping[str, str] = field(default_factory=dict, hash=False)
    open_questions: Mapping[str, str] = field(default_factory=dict, hash=False)
    not_used: Mapping[str, str] = field(default_factory=dict, hash=False)

    @property
    def sources(self) -> dict[str, str]:
        """Return where each number was read, by field; fields that say nothing are left out."""
        numbers = {name: getattr(self, name) for name in (*NUMBERS, *EXTRAS)}
        places = FAMILY | dict(self.read_elsewhere)
        return {name: places.get(name, self.read_in) for name, number in numbers.items() if number not in (None, {})}

    @property
    def partner_files(self) -> tuple[str, ...]:
        """Return the files that have to lie beside the first ones."""
        return tuple(partner.file for partner in (self.lora, self.twin) if partner is not None and partner.file)


# What a run needs of a release: each is read or an open question.
NUMBERS = (
    *("repository", "chunk", "window", "sink", "policy", "steps", "shift", "warp", "solver", "cache_source"),
    *("weights", "fps", "native_size", "latent_space", "sizes"),
)
# What only some releases have.
EXTRAS = ("first_chunk_steps", "is_whole", "guidance", "policy_options", "lora", "twin", "licence")
# Written into the code of Self Forcing and not into its configurations; its descendants kept them.
FAMILY = {
    "fps": "guandeh17/Self-Forcing inference.py",
    "native_size": "guandeh17/Self-Forcing inference.py",
    "latent_space": "the base model, Wan 2.1",
}
SIZES_1_3B = Sizes(1536, 8960, 12, 30)
SIZES_14B = Sizes(5120, 13824, 40, 40)
SIZES_I2V_14B = replace(SIZES_14B, in_dim=36, has_image_features=True)
SIZES_WAN22_I2V = replace(SIZES_14B, in_dim=36)  # Wan 2.2 reads its first frame in channels alone
SIZES_5B = Sizes(3072, 14336, 24, 30, 48, 48)
SIZES_HUNYUAN = Sizes(2048, None, 16, 54, 32, 32, None)
# Where numbers come from that a row takes from the repository's code and not from its configuration.
SCOPE, FASTVIDEO, LIGHTX2V = "daydreamlive/scope", "hao-ai-lab/FastVideo fastvideo", "ModelTC/LightX2V configs"
CF, SDV2 = "thu-ml/Causal-Forcing", "chenfengxu714/StreamDiffusionV2"
# Why a file cannot run here.
NO_WEIGHTS = "its weights were not released"
FIVE_B = "Wan 2.2 5B networks with 48 latent channels are not supported"
CAMERA = "networks that are steered by a camera are not supported"
KEYS = "networks that are steered by keyboard and mouse are not supported"
NVFP4 = "weights in NVFP4 are not read"
RAW, EMA = ("generator",), ("generator_ema",)  # containers
QUARTERS = (1000.0, 750.0, 500.0, 250.0)
EIGHTS = (1000.0, 850.0, 700.0, 550.0, 350.0, 275.0, 200.0, 125.0)
# Causal Forcing's earlier stages: what stands in the name, folder, words, chunk.
PACES = (("", "chunkwise", "chunk by chunk", 3), ("framewise-", "framewise", "frame by frame", 1))
CAMERA_SIGNS = ("patch_embedding_wancamctrl", "cam_injector_layer")


def _open(reason: str, *names: str) -> dict[str, str]:
    return dict.fromkeys(names, reason)


def _not_read(*names: str) -> dict[str, str]:
    return _open("not in the configuration that was read", *names)


def _row(name: str, title: str, repository: str | None, files: tuple[str, ...], read_in: str, **fields: Any) -> Preset:
    """Return a row of the table; the numbers that it asks for, or has no use for, are None."""
    open_questions = dict(fields.pop("open_questions", {}))
    unused = fields.get("not_used", {})
    if repository is None and "repository" not in unused:
        open_questions |= _open("its place on the hub was not read", "repository")
    if not files and "files" not in unused:
        open_questions |= _open("the file's name was not read", "files")
    numbers: dict[str, Any] = {number: None for number in NUMBERS[1:] if number in open_questions or number in unused}
    return Preset(name, title, repository, files, read_in, open_questions=open_questions, **numbers, **fields)


# What whole groups of rows leave open, or have no use for.
UNRELEASED = _open(NO_WEIGHTS, "repository", "files", "weights")
PICTURE = _not_read("fps", "native_size")  # and the code is not Self Forcing's
STEPPING = ("steps", "warp", "solver")
ALL_BUT_SIZES = ("chunk", "window", "sink", "policy", *STEPPING, "shift", "cache_source", "weights")
NO_CACHE = _open("all frames are denoised together", "chunk", "window", "sink", "policy", "cache_source")
RING = _open(f"{SDV2} models/wan/causal_model.py:255-380", "policy_options", "cache_source")
INDICES = _open("given as indices 0, 179, 358, 679 of a table that was not read", "steps", "warp")
PHASED = _open(f"{FASTVIDEO}/pipelines/stages/causal_denoising.py:268-305", "solver")
SCHEDULER_CONFIG = _open("12 by its class, 5 by the examples; the folder's scheduler_config.json decides", "shift")
MANY_STEPS = _open("many steps with guidance; which was not read", *STEPPING, "shift", "guidance")


# ------------------------------------------------------------------- table --
# One release a row, kept from the formatter so that it reads as one: name, title, repository, files, where it was read;
# then what differs from the family.
# fmt: off
ROWS = (
    # Self Forcing
    _row("self-forcing-dmd", "Self Forcing 1.3B, distribution matching", "gdhe17/Self-Forcing",
         ("checkpoints/self_forcing_dmd.pt",), "guandeh17/Self-Forcing configs/self_forcing_dmd.yaml",
         weights="ema", containers=RAW + EMA),
    _row("self-forcing-sid", "Self Forcing 1.3B, score identity distillation", "gdhe17/Self-Forcing",
         ("checkpoints/self_forcing_sid.pt",), "guandeh17/Self-Forcing configs/self_forcing_sid.yaml",
         weights="ema", containers=RAW + EMA),
    _row("self-forcing-10s", "Self Forcing 1.3B for 10 seconds", "gdhe17/Self-Forcing",
         ("checkpoints/self_forcing_10s.pt",), "guandeh17/Self-Forcing issue 60",
         open_questions=_open("its configuration is not public (guandeh17/Self-Forcing issue 60)", *ALL_BUT_SIZES)),
    _row("self-forcing-gan", "Self Forcing 1.3B, adversarial", None, (), "guandeh17/Self-Forcing issue 41",
         unsupported=NO_WEIGHTS, not_used=UNRELEASED, open_questions=_not_read(*ALL_BUT_SIZES[:-1])),
    _row("self-forcing-plus-plus", "Self-Forcing++ 1.3B", None, (), "arXiv 2510.02283",
         policy="sf++", unsupported=NO_WEIGHTS, not_used=UNRELEASED),
    # Causal Forcing; the chunk-wise files are the only ones of the family that are run without --use_ema
    _row("causal-forcing", "Causal Forcing 1.3B, chunk by chunk", "zhuhz22/Causal-Forcing",
         ("chunkwise/causal_forcing.pt",), f"{CF} configs/causal_forcing_dmd_chunkwise.yaml",
         weights="raw", containers=RAW, read_elsewhere={"weights": f"{CF} README:115"}),
    _row("causal-forcing-framewise", "Causal Forcing 1.3B, frame by frame", "zhuhz22/Causal-Forcing",
         ("framewise/causal_forcing.pt",), f"{CF} configs/causal_forcing_dmd_framewise.yaml",
         chunk=1, weights="ema", containers=EMA, has_fsdp_infix=True, read_elsewhere={"weights": f"{CF} README:144"}),
    _row("causal-forcing-pp-2step", "Causal Forcing++ 1.3B, frame by frame in 2 steps", "zhuhz22/Causal-Forcing",
         ("causal-forcing++/framewise-2step.pt",), f"{CF} configs/causal_forcing_dmd_framewise_2step.yaml:7-14",
         chunk=1, steps=(1000.0, 500.0), first_chunk_steps=QUARTERS,
         weights="ema", containers=EMA, read_elsewhere={"weights": f"{CF} README:127"}),
    _row("causal-forcing-pp-1step", "Causal Forcing++ 1.3B, frame by frame in 1 step", "zhuhz22/Causal-Forcing",
         ("causal-forcing++/framewise-1step.pt",), f"{CF} configs/causal_forcing_dmd_framewise_1step.yaml:7-13",
         chunk=1, steps=(1000.0,), first_chunk_steps=QUARTERS,
         weights="ema", containers=EMA, read_elsewhere={"weights": f"{CF} README:135"}),
    _row("causal-forcing-longvideo", "Causal Forcing 1.3B for long videos, a joint window", "zhuhz22/Causal-Forcing",
         ("chunkwise/longvideo.pt",), f"{CF} long_video/configs/rolling_forcing_dmd.yaml",
         policy="rolling-forcing", policy_options={"joint_frames": 12}, weights="ema", containers=EMA,
         open_questions=_open("of its cache only the joint window of 12 frames was read", "window", "sink")
         | _open("4 steps as in Rolling Forcing; which was not read", "steps")),
    *(_row(f"causal-forcing-{prefix}ar-diffusion", f"Causal Forcing 1.3B, autoregressive diffusion, {pace}",
           "zhuhz22/Causal-Forcing", (f"{folder}/ar_diffusion.pt",), f"{CF} configs/ar_diffusion_tf_*.yaml",
           chunk=chunk, weights="raw", containers=RAW, read_elsewhere={"weights": f"{CF} README:212"},
           open_questions=MANY_STEPS) for prefix, folder, pace, chunk in PACES),
    *(_row(f"causal-forcing-{prefix}causal-ode", f"Causal Forcing 1.3B, regression on trajectories, {pace}",
           "zhuhz22/Causal-Forcing", (f"{folder}/causal_ode.pt",), f"{CF} README:212",
           chunk=chunk, weights="raw", containers=RAW) for prefix, folder, pace, chunk in PACES),
    *(_row(f"causal-forcing-{prefix}causal-cd", f"Causal Forcing 1.3B, consistency distillation, {pace}",
           "zhuhz22/Causal-Forcing", (f"{folder}/causal_cd.pt",), f"{CF} configs/causal_cd_*.yaml",
           chunk=chunk, weights="raw", containers=RAW, read_elsewhere={"weights": f"{CF} README:212"})
      for prefix, folder, pace, chunk in PACES),
    # Long videos
    _row("rolling-forcing", "Rolling Forcing 1.3B, a joint window of 5 chunks", "TencentARC/RollingForcing",
         ("checkpoints/rolling_forcing_dmd.pt",), "TencentARC/RollingForcing configs/rolling_forcing_dmd.yaml",
         window=21, sink=3, policy="rolling-forcing", policy_options={"joint_frames": 15, "cache_frames": 24},
         steps=(1000.0, 800.0, 600.0, 400.0, 200.0), weights="ema", containers=EMA,
         read_elsewhere={"window": "TencentARC/RollingForcing wan/modules/causal_model.py:195-305"}),
    _row("reward-forcing", "Reward Forcing 1.3B, a sink that averages what leaves",
         "JaydenLu666/Reward-Forcing-T2V-1.3B", ("rewardforcing.pt",),
         "JaydenLyh/Reward-Forcing configs/reward_forcing.yaml:55-57",
         window=9, sink=3, policy="reward", policy_options={"sink_decay": 0.999}),
    _row("infinite-forcing", "Infinite-Forcing 1.3B, positions counted in the cache", "SOTAMak1r/Infinite-Forcing",
         ("ema_model.pt",), "SOTAMak1r/Infinite-Forcing configs/self_forcing_dmd_vsink1.yaml:53-55",
         window=6, sink=1, policy="infinite",
         open_questions=_open("which containers the file has was not read", "weights")),
    _row("longlive", "LongLive 1.3B, base and LoRA", "Efficient-Large-Model/LongLive-1.3B",
         ("models/longlive_base.pt",), "ALJainProjects/LongLive-Optimized configs/longlive_inference.yaml",
         window=12, sink=3, policy="longlive", policy_options={"global_sink": True}, weights="raw", containers=RAW,
         lora=LoraFile("models/lora.pt", 256, 256)),
    _row("longlive-interactive", "LongLive 1.3B, base and LoRA, a sink that follows prompts",
         "Efficient-Large-Model/LongLive-1.3B", ("models/longlive_base.pt",),
         "ALJainProjects/LongLive-Optimized configs/longlive_interactive_inference.yaml",
         window=12, sink=3, policy="longlive-interactive", policy_options={"global_sink": False},
         weights="raw", containers=RAW,
         lora=LoraFile("models/lora.pt", 256, 256)),
    _row("memflow", "MemFlow 1.3B, base and LoRA, a bank of frames", "KlingTeam/MemFlow",
         ("base.pt",), f"{SCOPE} pipelines/memflow/model.yaml",
         window=12, sink=3, policy="memflow", policy_options={"bank": 3, "record_every": 3}, weights="raw",
         containers=RAW, lora=LoraFile("lora.pt", 256, 256)),
    _row("krea", "Krea Realtime 14B, a cache made anew for every chunk", "krea/krea-realtime-video",
         ("krea-realtime-video-14b.safetensors",), "krea-ai/realtime-video configs/self_forcing_server_14b.yaml",
         window=6, policy="krea", policy_options={"context_frames": 3}, sizes=SIZES_14B,
         steps=(1000.0, 937.0, 833.0, 625.0, 0.0), warp=False,  # the last is a pass at t = 0
         read_elsewhere={"shift": "krea-ai/realtime-video release_server.py"}, open_questions=PICTURE,
         not_used=_open("the cache is computed from clean latents before every chunk", "sink", "cache_source")),
    # LongLive 2: UniPC's own steps for 4 of them, from 0.999 down; cut to integers behind the shift, as its code does
    *(_row(name, title, None, files, f"NVlabs/LongLive configs/{config}", chunk=8, window=32, sink=8,
           policy="longlive2", policy_options={"multi_shot_sink": True, "multi_shot_rope_offset": 8},
           steps=(999.0, 749.25, 499.5, 249.75), is_whole=True, solver="unipc", guidance=1.0, fps=24.0,
           native_size=(704, 1280), latent_space="wan2.2", sizes=SIZES_5B, weights="raw",
           read_elsewhere=_open("NVlabs/LongLive pipeline/causal_diffusion_inference.py", *STEPPING, "is_whole",
                                "cache_source")
           | _open("NVlabs/LongLive configs/inference.yaml", "fps", "native_size", "latent_space"), **more)
      for name, title, files, config, more in (
          ("longlive2", "LongLive 2 5B, shots", ("model_bf16.pt",), "inference.yaml:2-43",
           {"containers": RAW, "unsupported": FIVE_B}),
          ("longlive2-i2v", "LongLive 2 5B, image to video", ("model_bf16.pt",), "inference_i2v.yaml:24-72",
           {"containers": RAW, "unsupported": FIVE_B, "task": "i2v", "independent_first_frame": True}),
          ("longlive2-lora", "LongLive 2 5B, base and LoRA", (), "inference.yaml:2-43",
           {"containers": RAW, "unsupported": FIVE_B, "lora": LoraFile(None, 128, 128)}),
          ("longlive2-nvfp4", "LongLive 2 5B in NVFP4", ("model_te.pt", "model_4o6.pt"), "inference.yaml:2-43",
           {"unsupported": f"{FIVE_B}, and {NVFP4}"}))),
    # CausVid and StreamDiffusionV2: lists as the network sees them
    _row("causvid", "CausVid 1.3B in 3 steps", "tianweiy/CausVid",
         ("autoregressive_checkpoint/model.pt",), "tianweiy/CausVid configs/wan_causal_dmd.yaml",
         steps=(1000.0, 757.0, 522.0), shift=8.0, warp=False, containers=RAW, open_questions=PICTURE),
    _row("causvid-4step", "CausVid 1.3B in 4 steps", "tianweiy/CausVid",
         (), "tianweiy/CausVid configs/wan_causal_dmd_warp_4step_cfg2.yaml", containers=RAW,
         shift=8.0, open_questions=PICTURE,
         read_elsewhere={"shift": "the same file in its forks yitongdeng2/CausVid and ai4imaging/InstantViR"}),
    _row("streamdiffusionv2", "StreamDiffusionV2 1.3B, video to video", "jerryfeng/StreamDiffusionV2",
         ("wan_causal_dmd_v2v/model.pt",), f"{SDV2} configs/wan_causal_dmd_v2v.yaml",
         chunk=1, window=6, sink=3, policy="sdv2", policy_options={"adapt_sink_threshold": 0.2, "first_chunk": 2},
         steps=(700.0, 500.0, 400.0, 200.0), shift=8.0, warp=False, cache_source="last_step", task="v2v",
         containers=RAW, open_questions=PICTURE, read_elsewhere=RING),
    _row("streamdiffusionv2-fast", "StreamDiffusionV2 1.3B, video to video, the smaller window",
         "jerryfeng/StreamDiffusionV2", ("wan_causal_dmd_v2v/model.pt",),
         f"{SDV2} configs/wan_causal_dmd_v2v_fast.yaml",
         chunk=1, window=5, sink=2, policy="sdv2", policy_options={"adapt_sink_threshold": 0.2, "first_chunk": 2},
         steps=(700.0, 500.0, 400.0, 200.0), shift=8.0, warp=False, cache_source="last_step", task="v2v",
         containers=RAW, open_questions=PICTURE, read_elsewhere=RING),
    _row("streamdiffusionv2-14b", "StreamDiffusionV2 14B, video to video", "jerryfeng/StreamDiffusionV2",
         ("wan_causal_dmd_v2v_14b/*",), f"{SDV2} configs/wan_causal_dmd_v2v_14b.yaml", sizes=SIZES_14B,
         chunk=1, window=6, sink=3, policy="sdv2", policy_options={"adapt_sink_threshold": 0.2, "first_chunk": 2},
         steps=(700.0, 500.0, 400.0, 200.0), shift=8.0, warp=False, cache_source="last_step", task="v2v",
         containers=RAW, open_questions=PICTURE, read_elsewhere=RING),
    _row("streamdiffusionv2-t2v", "StreamDiffusionV2 1.3B, text to video", "jerryfeng/StreamDiffusionV2",
         (), f"{SDV2} configs/wan_causal_dmd_t2v.yaml",
         steps=(*QUARTERS, 0.0), shift=8.0, warp=False, cache_source="last_step", containers=RAW,
         open_questions=PICTURE,  # the pass at t = 0 is taken for text alone, and what it writes stays
         read_elsewhere=_open(f"{SDV2} models/wan/causal_stream_inference.py:76-92,172-208", "steps", "cache_source")),
    # FastVideo, folders of diffusers
    _row("causalwan2.2-i2v", "CausalWan 2.2 A14B, image to video, two experts",
         "FastVideo/CausalWan2.2-I2V-A14B-Preview-Diffusers", ("transformer/*",),
         f"{FASTVIDEO}/configs/pipelines/wan.py:316-320", steps=EIGHTS, task="i2v", independent_first_frame=True,
         policy_options={"caches": 2}, twin=Twin("transformer_2/*", boundary=0.875), sizes=SIZES_WAN22_I2V,
         solver="phased", read_elsewhere=PHASED, open_questions=PICTURE | SCHEDULER_CONFIG),
    _row("causalwan2.2-t2v", "CausalWan 2.2 A14B, text to video, two experts", "rand0nmr/SFWan2.2-T2V-A14B",
         ("transformer/*",), f"{FASTVIDEO}/configs/pipelines/wan.py:316-320", steps=EIGHTS,
         independent_first_frame=True, policy_options={"caches": 2}, twin=Twin("transformer_2/*"), sizes=SIZES_14B,
         solver="phased", read_elsewhere=PHASED,
         open_questions=PICTURE | SCHEDULER_CONFIG
         | _open("3 by the pipeline's class, 7 in the example for text to video", "chunk")
         | _open("0.875 by the class for both, elsewhere 0.9 for text to video: read the folder", "twin.boundary")),
    _row("sfwan2.1", "SFWan 2.1 1.3B", "wlsaidhi/SFWan2.1-T2V-1.3B-Diffusers",
         ("transformer/*",), f"{FASTVIDEO}/configs/pipelines/wan.py:306-312", open_questions=PICTURE),
    # LightX2V
    _row("lightx2v-t2v-14b", "Wan 2.1 14B text to video, distilled to 4 steps",
         "lightx2v/Wan2.1-T2V-14B-StepDistill-CfgDistill-Lightx2v", ("distill_models/distill_model.safetensors",),
         f"{LIGHTX2V}/distill/wan21", is_causal=False, sizes=SIZES_14B,
         licence=APACHE, read_elsewhere={"licence": "the repository's page on the hub"},
         open_questions=PICTURE, not_used=NO_CACHE),
    _row("lightx2v-i2v-14b", "Wan 2.1 14B image to video, distilled to 4 steps", None,
         (), f"{LIGHTX2V}/distill/wan21", is_causal=False, task="i2v", sizes=SIZES_I2V_14B,
         open_questions=PICTURE, not_used=NO_CACHE),
    _row("lightx2v-wan2.2-i2v", "Wan 2.2 A14B image to video, distilled to 4 steps, two experts",
         "lightx2v/Wan2.2-Distill-Models", ("wan2.2_i2v_A14b_high_noise_lightx2v_4step*.safetensors",),
         f"{LIGHTX2V}/distill/wan22/*.json", is_causal=False, task="i2v", sizes=SIZES_WAN22_I2V,
         twin=Twin("wan2.2_i2v_A14b_low_noise_lightx2v_4step*.safetensors", boundary_step=2), solver="euler",
         read_elsewhere={"solver": "ModelTC/LightX2V lightx2v/models/schedulers/wan/step_distill/scheduler.py"},
         open_questions=PICTURE, not_used=NO_CACHE),
    _row("lightx2v-self-forcing-fp8", "Self Forcing 1.3B in 8 bits with scales", "lightx2v/Self-Forcing-FP8",
         (), f"{LIGHTX2V}/self_forcing/*.json", open_questions=INDICES),
    _row("lightx2v-self-forcing-nvfp4", "Self Forcing 1.3B in NVFP4", "lightx2v/Self-Forcing-NVFP4",
         (), f"{LIGHTX2V}/self_forcing/*.json", unsupported=NVFP4, open_questions=INDICES),
    _row("lightx2v-self-forcing-14b", "Self Forcing 14B", None,
         (), f"{LIGHTX2V}/self_forcing/*.json", sizes=SIZES_14B, open_questions=INDICES | PICTURE),
    # Worlds: none of them runs here; what was read is kept so that their files are named
    _row("matrix-game-2", "Matrix-Game 2 1.3B, keyboard and mouse", "Skywork/Matrix-Game-2.0",
         ("base_distill.safetensors",), f"{LIGHTX2V}/matrix_game2/matrix_game2_universal.json",
         window=6, steps=(1000.0, 908.84, 713.98), task="i2v", native_size=(352, 640),
         sizes=replace(SIZES_1_3B, in_dim=36, has_image_features=None), signs=("action_model.",), unsupported=KEYS,
         read_elsewhere={"native_size": f"{LIGHTX2V}/matrix_game2/matrix_game2_universal.json"},
         open_questions=_not_read("fps") | _open("it looks warped already; not read", "warp")
         | _open("FastVideo counts its positions in the cache, which needs a sink, and it has none", "policy")),
    _row("matrix-game-3", "Matrix-Game 3 5B, distilled", None,
         (), f"{LIGHTX2V}/matrix_game3/matrix_game3_distilled.json", task="i2v", guidance=1.0, native_size=(704, 1280),
         chunk=56, policy_options={"past_frames": 16}, sizes=SIZES_5B, unsupported=f"{FIVE_B}, and {KEYS}",
         read_elsewhere={"native_size": f"{LIGHTX2V}/matrix_game3/matrix_game3_distilled.json"},
         open_questions=_not_read("fps", "policy", "warp", "solver", "cache_source", "weights")
         | _open("3 steps; which was not read", "steps")
         | _open("clips of 56 see the past 16, which is no rolling window", "window", "sink")
         | _open("it is decoded by mg_lightvae_v2, of which nothing was read", "latent_space")),
    _row("matrix-game-3.5", "Matrix-Game 3.5 5B, distilled", None,
         (), "Riemann-Dynamics/Matrix-Game-3.5 configs/infer_distilled.yaml", task="i2v", guidance=3.0,
         policy_options={"context_chunks_by_pose": 7}, steps=(1000.0, 667.0, 333.0), native_size=(704, 1280),
         sizes=SIZES_5B, unsupported=f"{FIVE_B}, and {KEYS}",
         read_elsewhere={"native_size": "Riemann-Dynamics/Matrix-Game-3.5 configs/infer_distilled.yaml"},
         open_questions=_not_read("fps", "policy", "sink", "shift", "warp", "solver", "cache_source", "weights",
                                  "latent_space")),
    *(_row(f"lingbot-world-2-{size}", f"LingBot-World 2 {size.upper()}, camera", None, (),
           "2002yy/lingbot-world-v2 wan/modules/model_fast.py", chunk=4, window=18, sink=6, policy="lingbot2",
           task="i2v", sizes=replace(sizes, in_dim=36), signs=CAMERA_SIGNS, licence="CC BY-NC-SA", unsupported=CAMERA,
           read_elsewhere=_open("2002yy/lingbot-world-v2 README", "fps", "licence"),  # 16 frames are a second
           open_questions=_not_read("native_size") | _open("4 steps; which was not read", "steps", "warp"))
      for size, sizes in (("1.3b", SIZES_1_3B), ("14b", SIZES_14B))),
    _row("lingbot-world-1-fast", "LingBot-World 1, camera", None,
         (), f"{LIGHTX2V}/lingbot_fast/lingbot_fast_i2v.json", window=21, sink=3, shift=10.0, task="i2v",
         signs=CAMERA_SIGNS, unsupported=CAMERA,
         open_questions=_not_read("policy", *STEPPING, "cache_source", "weights", "sizes", "fps", "native_size")),
    _row("minwm-camera", "minWM, Wan with a camera in its attention (ProPE)", None,
         (), "hhhjyz/minWM Wan21/configs/causal_forcing_dmd_camera.yaml", chunk=4, window=20, task="i2v",
         unsupported=CAMERA,
         open_questions=_not_read("sink", "policy", *STEPPING, "shift", "cache_source", "weights", "sizes", "fps",
                                  "native_size", "latent_space")),
    _row("hy-worldplay", "HY-WorldPlay, distilled from HunyuanVideo 1.5, camera (ProPE)", None,
         (), f"{LIGHTX2V}/worldplay/worldplay_distill_i2v_480p.json", chunk=4, shift=1.0, task="i2v",
         latent_space="hunyuanvideo1.5", sizes=SIZES_HUNYUAN,
         unsupported=f"HunyuanVideo's transformer is another family, and {CAMERA}",
         read_elsewhere={"latent_space": f"{LIGHTX2V}/worldplay/worldplay_distill_i2v_480p.json"},
         open_questions=_not_read("window", "sink", "policy", "warp", "solver", "cache_source", "weights", "fps",
                                  "native_size") | _open("4 steps; which was not read", "steps")),
)
# fmt: on
PRESETS: dict[str, Preset] = {preset.name: preset for preset in ROWS}


# ----------------------------------------------------------------- answers --
def find_preset(name: str) -> Preset:
    """Return the preset of that name. Raises ValueError naming those with nearly that name, or all of them."""
    if name in PRESETS:
        return PRESETS[name]
    near = difflib.get_close_matches(name.lower(), PRESETS, n=4, cutoff=0.5)
    near = near or [preset for preset in PRESETS if name and name.lower() in preset] or list(PRESETS)
    raise ValueError(f"there is no preset {name!r}; did you mean {' or '.join(near)}?")


def missing_policies(available: Collection[str]) -> dict[str, str]:
    """Return the presets whose policy the cache does not have, and that policy, by name.

    available: names of policies. Presets whose policy was not read, or that have none, are not among them.
    """
    policies = {name: preset.policy for name, preset in PRESETS.items()}
    return {name: policy for name, policy in policies.items() if policy is not None and policy not in available}
