"""The parts of a graph with ComfyUI's SamplerCustomAdvanced: samplers, sigmas, guider."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io
from torch import Tensor

from .adapter import host
from .adapter.chunk_sampler import ChunkGuider, ChunkSampler, Run, SnapshotHolder
from .adapter.model_settings import AUTO, settings_of, sigmas_of
from .adapter.stream_run import NO_STATE
from .stream_sampler import State, step_widgets

# What users of ComfyUI's own causal nodes, and of other packs, search for.
ALIASES = ["self forcing", "autoregressive causal video"]


class SelfForcingSampler(io.ComfyNode):
    """SAMPLER, chunk by chunk."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="SelfForcingSampler",
            display_name="Sampler (Self Forcing)",
            category="SelfForcing/custom sampling",
            search_aliases=[*ALIASES, "autoregressive sampler", "SamplerARVideo"],
            description="For Sampler Custom (Advanced): generates a video chunk by chunk with a KV cache. Chunks, "
            "window and cache are the model's settings; change them with Cache Options (Self Forcing).",
            inputs=[
                State.Input("state", optional=True, tooltip="Where another run ended: the video goes on from there."),
                io.Boolean.Input(
                    "keep_state",
                    default=False,
                    optional=True,
                    tooltip="Keep the final state for the state output; it takes as much memory as the KV cache.",
                ),
                io.Sigmas.Input(
                    "first_chunk_sigmas",
                    optional=True,
                    tooltip="Noise levels of the video's first chunk. Not connected: the model's own, if it has some, "
                    "else those of every chunk.",
                ),
            ],
            outputs=[
                io.Sampler.Output(tooltip="For Sampler Custom (Advanced)."),
                State.Output(
                    display_name="state",
                    tooltip="Where the run ended, for Snapshot (Self Forcing). Needs keep_state; filled by sampling.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls, state: SnapshotHolder | None = None, keep_state: bool = False, first_chunk_sigmas: Tensor | None = None
    ) -> io.NodeOutput:
        # Sampling fills the holder later: a node behind this one has to wait for the sampled LATENT.
        run = Run(resume=state, keep=SnapshotHolder() if keep_state else None, first_sigmas=first_chunk_sigmas)
        return io.NodeOutput(ChunkSampler(run), host.blocker(NO_STATE) if run.keep is None else run.keep)


class SelfForcingFewStepSampler(io.ComfyNode):
    """SAMPLER, all frames at once."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="SelfForcingFewStepSampler",
            display_name="Few-Step Sampler (Self Forcing)",
            category="SelfForcing/custom sampling",
            search_aliases=["self forcing plus", "lightx2v", "4 steps", "distilled wan 14b"],
            description="For Sampler Custom (Advanced): all frames at once in a few steps, as the distilled 14B models "
            "of Self-Forcing-Plus are sampled. Not causal: nothing streams.",
            inputs=[],
            outputs=[io.Sampler.Output(tooltip="For Sampler Custom (Advanced).")],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(ChunkSampler(Run(is_whole=True)))


class SelfForcingSigmas(io.ComfyNode):
    """SIGMAS of the model's own list."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="SelfForcingSigmas",
            display_name="Sigmas (Self Forcing)",
            category="SelfForcing/custom sampling",
            search_aliases=["self forcing schedule", "denoising step list"],
            description="The noise levels that a few-step model was trained on. BasicScheduler 'simple' with 4 steps "
            "and shift 5 gives the same four.",
            inputs=[
                io.Model.Input("model", tooltip="From Load Model (Self Forcing) or Patch Model (Self Forcing)."),
                io.Int.Input(
                    "steps", default=AUTO, min=0, max=100, tooltip="Denoising steps (a count). 0 is auto: as trained."
                ),
                io.Float.Input(
                    "shift",
                    default=0.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="Timestep shift (a ratio, 5 for Self Forcing). 0 is auto: the model's own, or what a "
                    "ModelSamplingSD3 node set.",
                ),
                *step_widgets(),
            ],
            outputs=[
                io.Sigmas.Output(
                    tooltip="For Sampler Custom (Advanced); falls from 1 to 0. Two zeros at the end are a pass at "
                    "timestep 0, which only Sampler (Self Forcing) knows."
                ),
                io.Sigmas.Output(
                    display_name="first_chunk_sigmas",
                    tooltip="Those of the video's first chunk, for Sampler (Self Forcing).",
                ),
            ],
        )

    @classmethod
    def execute(
        cls, model: Any, steps: int, shift: float, warp: str = "auto", first_chunk_steps: int = AUTO
    ) -> io.NodeOutput:
        sigmas, first_sigmas = sigmas_of(model, steps, shift, warp=warp, first_chunk_steps=first_chunk_steps)
        return io.NodeOutput(sigmas, sigmas if first_sigmas is None else first_sigmas)


class SelfForcingGuider(io.ComfyNode):
    """GUIDER with any cfg."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="SelfForcingGuider",
            display_name="Guider (Self Forcing)",
            category="SelfForcing/custom sampling",
            search_aliases=[*ALIASES, "cfg guider"],
            description="Prompt and guidance for Sampler Custom (Advanced). With cfg other than 1 both prompts have a "
            "KV cache of their own. ComfyUI's BasicGuider and CFGGuider work as well.",
            inputs=[
                io.Model.Input("model", tooltip="From Load Model (Self Forcing) or Patch Model (Self Forcing)."),
                io.Conditioning.Input("positive", tooltip="The prompt."),
                io.Float.Input(
                    "cfg",
                    default=1.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="Classifier-free guidance scale (a ratio). 1 is none, as distilled models expect.",
                ),
                io.Conditioning.Input("negative", optional=True, tooltip="What to avoid; needed unless cfg is 1."),
            ],
            outputs=[io.Guider.Output(tooltip="For Sampler Custom (Advanced).")],
        )

    @classmethod
    def execute(cls, model: Any, positive: list[Any], cfg: float, negative: list[Any] | None = None) -> io.NodeOutput:
        settings_of(model)  # raises for a MODEL that no node of ours has prepared
        guider = ChunkGuider(model)
        guider.set_prompts(positive, negative, cfg)
        return io.NodeOutput(guider)
