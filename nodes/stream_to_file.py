"""The streaming sampler that writes its video to disk while it is made, however long it gets."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from comfy_api.latest import io, ui
from torch import Tensor

from ..selfforcing_core.geometry import SPATIAL_FACTOR
from ..selfforcing_core.video import VideoStream
from . import host
from .sampler import SelfForcingStreamSampler, sample

NEEDS_TAEHV = "Stream to File decodes while it samples; connect taehv (Load TAEHV, or Load VAE with Wan's own VAE)"
FORMATS = {"mp4 (H.264)": ".mp4", "mkv (lossless)": ".mkv"}


class _Files:
    """One growing file per video of the batch, made when the first frames are there."""

    def __init__(self, prefix: str, ending: str, fps: float, metadata: dict[str, Any], size: tuple[int, int]) -> None:
        self.prefix, self.ending, self.fps, self.metadata, self.size = prefix, ending, fps, metadata, size
        self.streams: list[VideoStream] = []
        self.open = ExitStack()
        self.subfolder = ""

    def take(self, frames_BVRHW: Tensor) -> None:
        while len(self.streams) < len(frames_BVRHW):
            path, self.subfolder = host.output_file(self.prefix, self.ending, *self.size)
            self.streams.append(self.open.enter_context(VideoStream(path, self.fps, self.metadata)))
        for stream, frames_VRHW in zip(self.streams, frames_BVRHW):
            stream.write(frames_VRHW)

    def close(self) -> None:
        """All of them, whatever one of them says to that."""
        self.open.close()


class SelfForcingStreamToFile(io.ComfyNode):
    """Noise to a video file with the Self Forcing rollout. No child of the sampler: the host keeps schemas by class."""

    validate_inputs = classmethod(SelfForcingStreamSampler.validate_inputs.__func__)  # type: ignore[attr-defined]
    fingerprint_inputs = classmethod(SelfForcingStreamSampler.fingerprint_inputs.__func__)  # type: ignore[attr-defined]

    @classmethod
    def define_schema(cls) -> io.Schema:
        schema = SelfForcingStreamSampler.define_schema()
        schema.node_id = "SelfForcingStreamToFile"
        schema.display_name = "Stream to File (Self Forcing)"
        # None begins as the sampler's do: a search for those words lists the sampler first.
        schema.search_aliases = ["stream to disk", "write streaming video", "write endless video", "very long video"]
        schema.description = (
            "Generates a video chunk by chunk and writes every chunk to disk as soon as it is decoded, so memory does "
            "not grow with the length. The file can be played after a stop or a crash as far as it was made."
        )
        schema.inputs = [
            *(entry for entry in schema.inputs if entry.id != "keep_state"),
            io.String.Input(
                "filename_prefix",
                default="video/SelfForcing",
                tooltip="Folder and beginning of the file's name below ComfyUI's output folder; a number follows.",
            ),
            io.Combo.Input(
                "format",
                options=list(FORMATS),
                tooltip="mp4: H.264, small, plays everywhere. mkv: lossless (FFV1), large.",
            ),
            io.Float.Input(
                "fps", default=16.0, min=1.0, max=240.0, step=0.5, tooltip="Frames per second; Wan is trained at 16."
            ),
        ]
        schema.outputs = [
            io.Latent.Output(tooltip="The video's latents, for instance to continue it."),
            io.String.Output(display_name="path", tooltip="Full path of the file (of the batch's first)."),
        ]
        schema.hidden = [io.Hidden.prompt, io.Hidden.extra_pnginfo]
        schema.is_output_node = True
        return schema

    @classmethod
    def execute(  # type: ignore[override]
        cls,
        filename_prefix: str,
        format: str,
        fps: float,
        taehv: Any = None,
        latent_image: dict[str, Any] | None = None,
        **inputs: Any,
    ) -> io.NodeOutput:
        if taehv is None:
            raise ValueError(NEEDS_TAEHV)
        size = (inputs["width"], inputs["height"])
        if latent_image is not None:
            size = tuple(side * SPATIAL_FACTOR for side in latent_image["samples"].shape[:2:-1])  # type: ignore[assignment]
        files = _Files(filename_prefix, FORMATS[format], fps, host.graph_metadata(cls.hidden), size)
        try:
            samples, _ = sample(
                take=files.take, taehv=taehv, latent_image=latent_image, fps=fps, hidden=cls.hidden, **inputs
            )
        finally:
            files.close()
        shown = [ui.SavedResult(s.path.name, files.subfolder, io.FolderType.output) for s in files.streams]
        return io.NodeOutput({"samples": samples}, str(files.streams[0].path), ui=ui.PreviewVideo(shown))
