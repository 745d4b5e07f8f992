"""The streaming sampler that writes its video to disk while it is made, however long it gets.

Letters: B batch, V video frames, R RGB, H W height and width in pixels.
"""

from __future__ import annotations

import logging
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from comfy_api.latest import io, ui
from torch import Tensor

from ..selfforcing_core.codecs.sound import Samples
from ..selfforcing_core.codecs.video import VideoStream, retag
from ..selfforcing_core.codecs.video_formats import AUTO_QUALITY, FORMATS, check_video
from ..selfforcing_core.geometry import PIXEL_STEP, SPATIAL_FACTOR
from .adapter import folders, page
from .adapter.autoencoder import graph_latent, space_of
from .adapter.stream_run import SCHEDULE_KEY, StreamInputs, sample
from .stream_sampler import SelfForcingStreamSampler

log = logging.getLogger(__name__)
NEEDS_TAEHV = "Stream to File decodes while it samples; connect taehv (Load TAEHV, or Load VAE with Wan's own VAE)"
# What the list offers: the file's ending and the format's name in the core.
CHOICES = {
    "mp4 (H.264)": (".mp4", "h264"),
    "mkv (lossless)": (".mkv", "ffv1"),
    "mp4 (H.265)": (".mp4", "h265"),
    "mp4 (AV1)": (".mp4", "av1"),
    "mov (ProRes)": (".mov", "prores"),
    "webp (loops)": (".webp", "webp"),
    "gif (loops)": (".gif", "gif"),
}


class _Files:
    """One growing file per video of the batch, made when the first frames are there."""

    def __init__(
        self,
        prefix: str,
        choice: str,
        fps: float,
        quality: int,
        metadata: dict[str, Any],
        size: tuple[int, int],
        sounds: list[Samples],
    ) -> None:
        self.prefix, self.fps, self.quality, self.metadata, self.size = prefix, fps, quality, metadata, size
        self.ending, self.codec = CHOICES[choice]
        self.sounds = sounds  # one for each video, one for all, or none
        self.streams: list[VideoStream] = []
        self.exit_stack = ExitStack()  # closes them all, whatever one of them says to that
        self.subfolder = ""

    def append(self, frames_BVRHW: Tensor) -> None:
        """Append a chunk's frames to the files."""
        # With the first frames and not before: a run that is refused leaves no empty file behind.
        while len(self.streams) < len(frames_BVRHW):
            path, self.subfolder = folders.output_file(self.prefix, self.ending, *self.size)
            sound = self.sounds[min(len(self.streams), len(self.sounds) - 1)] if self.sounds else None
            stream = VideoStream(path, self.fps, self.metadata, codec=self.codec, quality=self.quality, sound=sound)
            self.streams.append(self.exit_stack.enter_context(stream))
        for stream, frames_VRHW in zip(self.streams, frames_BVRHW):
            stream.write(frames_VRHW)

    def finish(self, schedule: str) -> list[dict[str, str]]:
        """Close all of them, with what was done by hand as a schedule, "" if nothing; what the page lists."""
        self.close()
        try:
            self.keep_schedule(schedule)
        except (ValueError, OSError) as error:  # the video is whole, and the schedule goes out as text
            page.show_text(f"the file has no entry {SCHEDULE_KEY}: {error}")
        return self.written()

    def written(self) -> list[dict[str, str]]:
        """Return what the page lists: every file that holds a frame, whole or as far as it was made."""
        return [
            dict(ui.SavedResult(stream.path.name, self.subfolder, io.FolderType.output))
            for stream in self.streams
            if stream.num_frames
        ]

    def close(self) -> None:
        """Close all files; those that are closed already stay so."""
        self.exit_stack.close()

    def keep_schedule(self, schedule: str) -> None:
        """Write the prompts of a run that was steered into its closed files; nothing for "", where none was."""
        for path in self._paths() if schedule else ():
            retag(path, {SCHEDULE_KEY: schedule})

    def say_kept(self) -> None:
        """Name in the log what a run that was stopped leaves."""
        for stream in self.streams:
            if stream.num_frames:
                log.warning("stopped: %s holds the %d frames made so far", stream.path, stream.num_frames)

    def say_sound(self) -> None:
        """Say on the node where a sound did not last as long as its video."""
        for sound, stream in zip(self.sounds, self.streams):
            end = stream.num_frames / self.fps
            if sound.seconds > end + 1 / self.fps:
                page.show_text(f"audio of {sound.seconds:.2f} s is cut at the video's end, {end:.2f} s")
            elif sound.seconds < end - 1 / self.fps:
                page.show_text(
                    f"audio of {sound.seconds:.2f} s is shorter than the video, {end:.2f} s: silence follows"
                )

    def _paths(self) -> list[Path]:
        return [stream.path for stream in self.streams if stream.num_frames]


def _sounds(audio: dict[str, Any] | None, batch: int) -> list[Samples]:
    """Return the rows of an AUDIO: one for each video, or one for all. Raises ValueError for other numbers."""
    if audio is None:
        return []
    sounds = [Samples(waveform, int(audio["sample_rate"])) for waveform in audio["waveform"]]
    if len(sounds) not in (1, batch):
        raise ValueError(f"audio has {len(sounds)} rows for {batch} videos; give one for all, or one for each")
    for sound in sounds:
        sound.check()
    return sounds


class SelfForcingStreamToFile(io.ComfyNode):
    """Noise to a video file with the Self Forcing rollout. No child of the sampler: ComfyUI keeps schemas by class."""

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
        # In the order in which they were added over time, which saved workflows rely on: pace came after fps.
        # How steps are read is left to the MODEL here: two widgets more, and the node is higher than a window.
        later = ("pace", "warp", "first_chunk_steps")
        pace = next(entry for entry in schema.inputs if entry.id == "pace")
        schema.inputs = [
            *(entry for entry in schema.inputs if entry.id not in ("keep_state", *later)),
            io.String.Input(
                "filename_prefix",
                default="video/SelfForcing",
                tooltip="Folder and beginning of the file's name below ComfyUI's output folder; a number follows.",
            ),
            io.Combo.Input(
                "format",
                options=[choice for choice, (_, name) in CHOICES.items() if FORMATS[name].is_here],
                tooltip="; ".join(f"{choice}: {FORMATS[name].note}" for choice, (_, name) in CHOICES.items()) + ".",
            ),
            io.Float.Input(
                "fps", default=16.0, min=1.0, max=240.0, step=0.5, tooltip="Frames per second; Wan is trained at 16."
            ),
            pace,
            io.Int.Input(
                "quality",
                default=AUTO_QUALITY,
                min=AUTO_QUALITY,
                max=100,
                optional=True,
                tooltip=f"The format's own number; {AUTO_QUALITY} is auto. "
                + ". ".join(f"{each.title}: {each.quality.in_words}" for each in FORMATS.values() if each.quality)
                + ". Lossless mkv and gif have none.",
            ),
            io.Audio.Input(
                "audio",
                optional=True,
                tooltip="Sound of the video from its first frame on, cut at the video's end; silence follows a shorter "
                "one. A batch of sounds gives each video its own. webp and gif have none.",
            ),
        ]
        schedule = schema.outputs[-1]
        schema.outputs = [
            io.Latent.Output(tooltip="The video's latents, for instance to continue it."),
            io.String.Output(display_name="path", tooltip="Full path of the file (of the batch's first)."),
            schedule,
        ]
        schema.hidden = [io.Hidden.prompt, io.Hidden.extra_pnginfo]
        schema.is_output_node = True
        return schema

    @classmethod
    def validate_inputs(  # type: ignore[override]
        cls, format: str | None = None, quality: int | None = None
    ) -> bool | str:
        """Check what format and quality allow; ComfyUI leaves the check of the inputs that are named here to us."""
        if format is not None:
            if format not in CHOICES:
                return f"format {format!r} is unknown; use {', '.join(CHOICES)}"
            ending, codec = CHOICES[format]
            try:
                check_video(f"video{ending}", codec, quality, fps=1)
            except ValueError as error:
                return str(error)
        return True

    @classmethod
    def execute(  # type: ignore[override]
        cls,
        filename_prefix: str,
        format: str,
        fps: float,
        quality: int = AUTO_QUALITY,
        audio: dict[str, Any] | None = None,
        taehv: Any = None,
        latent_image: dict[str, Any] | None = None,
        **inputs: Any,
    ) -> io.NodeOutput:
        if taehv is None:
            raise ValueError(NEEDS_TAEHV)
        ending, codec = CHOICES[format]
        check_video(f"video{ending}", codec, quality, fps, has_sound=audio is not None)
        size, batch = (inputs["width"], inputs["height"]), 1
        if latent_image is not None:
            batch, *_, height, width = latent_image["samples"].shape
            size = (width * SPATIAL_FACTOR, height * SPATIAL_FACTOR)
        # Of the video as it will be made, which is rounded down to whole tokens.
        FORMATS[codec].check_size(*(side // PIXEL_STEP * PIXEL_STEP for side in size))
        files = _Files(
            filename_prefix, format, fps, quality, page.graph_metadata(cls.hidden), size, _sounds(audio, batch)
        )
        try:
            run = StreamInputs(taehv=taehv, latent_image=latent_image, fps=fps, hidden=cls.hidden, **inputs)
            result = sample(run, on_frames=files.append, on_end=files.finish)
        except BaseException:  # the stop button's too: what is written so far is closed and can be played
            files.close()
            files.say_kept()
            raise
        files.say_sound()
        saved = [ui.SavedResult(file["filename"], file["subfolder"], io.FolderType.output) for file in files.written()]
        # ComfyUI plays a video and shows a picture; webp and gif are pictures that move.
        preview = (
            ui.PreviewVideo(saved) if ending not in (".webp", ".gif") else ui.SavedImages(saved, ending == ".webp")
        )
        latent = graph_latent(result.samples, space_of(result.samples))
        return io.NodeOutput(latent, str(files.streams[0].path), result.schedule, ui=preview)
