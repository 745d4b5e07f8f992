"""Prompts in, video files out: everything is checked first, then each chunk is denoised, decoded and encoded in turn.

The loop itself is `rollout`; a `Run` loads what it needs, feeds it and measures it. Networks follow one another on the
device: the text encoder goes before the video model comes.
Letters: B batch, T latent frames, C latent channels, V video frames, R RGB, H W height and width in pixels, P text
tokens, E text width.
"""

from __future__ import annotations

import functools
import gc
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..attention import MeasuredKernels, attention_kernel
from ..blending import Blending, blend_conditionings, history_on_the_way
from ..codecs.embedding_folder import EmbeddingFolder
from ..codecs.first_picture import FirstPictures
from ..codecs.image import first_frame_condition, fit_image
from ..codecs.taehv import TAEHV, StreamingDecoder, StreamingEncoder
from ..codecs.text import TextEncoder, encoder_bytes
from ..codecs.video import to_integers
from ..codecs.wan_vae import StreamingWanDecoder, WanVAE, load_wan_vae
from ..conditioning import Conditioning
from ..experts import Experts, TakingTurns
from ..geometry import TEMPORAL_FACTOR, chunk_starts
from ..guided import Guided
from ..history import PromptChange
from ..noise import ScheduledNoise, SeededNoise
from ..policy import CachePolicy, cache_policy
from ..rollout import Chunk, rollout
from ..roofline.device import measured_card
from ..roofline.meter import Meter
from ..weights.checkpoint import Checkpoint
from ..weights.float8 import store_in_float8
from ..weights.load import build_model, build_taehv, build_text_encoder, check_channels
from .beside import consume_beside
from .plan import Plan, Timeline, plan_request
from .request import PromptBatch, Request
from .start import (
    Decoder,
    Start,
    frames_of,
    start_from_image,
    start_from_latents,
    start_from_video,
    write_latents,
)
from .write import batch_settings, write_batch

log = logging.getLogger(__name__)
FPS_INCLUDES = "text encoding, denoising, cache passes and decoding; not loading the models or waiting for the file"
Kernel = Callable[[], AbstractContextManager[None]]


class Stopwatch:
    """Seconds in named laps: each lap is the time since the one before."""

    def __init__(self) -> None:
        self.laps: defaultdict[str, list[float]] = defaultdict(list)
        self._since = time.perf_counter()

    def lap(self, name: str) -> None:
        """End a lap, which takes its name from what was done in it."""
        now = time.perf_counter()
        self.laps[name].append(now - self._since)
        self._since = now

    def seconds(self, name: str) -> float:
        """Return the sum of the laps of a name; 0 where there is none."""
        return sum(self.laps[name])


def generate(request: Request, *, show_progress: bool = False) -> dict[str, Any]:
    """Generate one video and write it (and its contact sheet); return the measurements in plain JSON types.

    Raises ValueError, before anything is computed or written, for whatever cannot work.
    """
    batch = PromptBatch(request.prompt, request.prompt, (request.out,))
    return generate_all(request, [batch], show_progress=show_progress)[0]


def generate_all(
    request: Request,
    batches: Sequence[PromptBatch],
    *,
    rewrite: Callable[[list[str]], list[str]] | None = None,
    show_progress: bool = False,
) -> list[dict[str, Any]]:
    """Generate several batches with the same settings, loading each network once; return a record for each video.

    rewrite: gives the texts that the model reads, from those of the batches; asked once, when all else is checked.
    Raises ValueError, before anything is computed or written, for whatever cannot work.
    """
    plan = plan_request(request, batches, rewrite)
    prompts = _PromptEncoding(plan)
    if show_progress and plan.device.type != "cpu":
        log.warning("%s", plan.memory_in_words(prompts.encoder_bytes))
    # The generators of chunks and frames run in here too: nothing below asks for gradients.
    with _compiler_named() if request.compile else nullcontext(), torch.no_grad():
        run = Run(plan, prompts, show_progress=show_progress)
        return [record for parts in zip(plan.batches, plan.timelines) for record in run.make(*parts)]


@contextmanager
def _compiler_named() -> Iterator[None]:
    """Say in one line what torch.compile lacks, in place of its own pages."""
    from torch._dynamo.exc import TorchDynamoException

    try:
        yield
    except TorchDynamoException as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"--compile failed ({reason}); it needs a C++ compiler, on a GPU Triton as well; leave it out otherwise"
        ) from error


# ------------------------------------------------------------------ prompts --
class _PromptEncoding:
    """A plan's prompts on their way to embeddings, which may be kept on disk."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.dtype = torch.bfloat16 if plan.dtype == torch.float16 else plan.dtype  # float16 overflows inside UMT5
        self.has_loaded = False  # whether an encoder was needed

    @functools.cached_property
    def folder(self) -> EmbeddingFolder | None:
        """Where embeddings are kept, if anywhere."""
        kept = self.plan.request.embeddings
        return None if kept is None else EmbeddingFolder(kept, self.plan.text_encoder, self.dtype, "used")

    @functools.cached_property
    def is_known(self) -> bool:
        """Whether the embeddings of all prompts are kept, so that no text encoder is loaded."""
        return self.folder is not None and all(self.folder.path(text).is_file() for text in self.plan.encoded_prompts)

    @property
    def encoder_bytes(self) -> int:
        """Bytes of the encoder's weights as they will be loaded; 0 where they are not."""
        return 0 if self.is_known else encoder_bytes(self.plan.text_encoder, self.dtype)

    def encoded(self, watch: Stopwatch) -> dict[str, Tensor]:
        """Return the embeddings [1, P, E] of each prompt on the CPU without their zero rows."""
        path, device = self.plan.text_encoder, self.plan.device

        # Not before a prompt needs it: of kept embeddings a single damaged file may be the only reason.
        @functools.cache
        def load() -> TextEncoder:
            self.has_loaded = True
            return build_text_encoder(path, dtype=self.dtype, device=device)

        def encode(text: str) -> Tensor:
            return _trimmed(load().encode([text])).cpu()[0]

        embeds = encode if self.folder is None else functools.partial(self.folder.get, encode=encode)
        if not self.is_known:
            load()
        watch.lap("loading")
        embeddings = {text: embeds(text)[None] for text in self.plan.encoded_prompts}
        watch.lap("encoding")
        return embeddings


def _trimmed(embeds_1PE: Tensor) -> Tensor:
    # Rows behind a prompt's end are zero, and the model pads with zeros again.
    used = int(embeds_1PE[0].any(-1).sum())
    return embeds_1PE[:, : max(used, 1)].clone()


# ---------------------------------------------------------------------- run --
class Run:
    """The networks of a plan on its device, and the videos that they make, batch by batch."""

    def __init__(self, plan: Plan, prompts: _PromptEncoding, *, show_progress: bool) -> None:
        self.plan = plan
        self.show_progress = show_progress
        self.watch = Stopwatch()
        self.embeddings = prompts.encoded(self.watch)  # of every prompt, [1, P, E] on the CPU
        if prompts.has_loaded:
            gc.collect()  # the text encoder may sit in a cycle of references, and has to go before the model comes
        self.autoencoder = _load_autoencoder(plan)
        self.start, self.image, self.clip = _start(plan, self.autoencoder)
        self.model = _load_model(plan)
        # Shared by all batches, so that each shape is measured once.
        self.kernel: Kernel = functools.partial(attention_kernel, plan.request.attention, MeasuredKernels())
        self.watch.lap("loading")
        self.card = measured_card(plan.device, plan.dtype) if plan.request.roofline else None

    def make(self, batch: PromptBatch, timeline: Timeline) -> list[dict[str, Any]]:
        """Make and write the videos of a batch; return their settings and measurements in plain JSON types."""
        plan, sheet = self.plan, self.plan.request.sheet
        meter = self._meter(len(batch.outs))
        if meter is not None and self.show_progress:
            log.warning("%s", _prediction_in_words(meter))
        watch, start = Stopwatch(), time.perf_counter()
        decoder = self._decoder()
        chunks = self._rollout(batch, timeline, decoder.encode_first if isinstance(decoder, FirstPictures) else None)
        frames = self._frames(chunks, decoder, len(batch.outs), watch)
        settings = batch_settings(plan, batch, timeline)
        # beside the rollout, which no card is to wait for: encoding takes the processor, and a disk may be slow
        consume_beside(functools.partial(write_batch, plan, batch, settings), frames)
        watch.lap("writing")
        seconds_in_all = time.perf_counter() - start
        # What stands before the first chunk is waited for with it.
        first, *later = watch.laps["chunk"]
        seconds = [watch.seconds("start") + first, *later]
        roofline = {} if meter is None else {"roofline": {**meter.predicted(), **meter.reached(seconds)}}
        # All prompts were encoded together before the first video; each batch bears its share.
        share_of_encoding = self.watch.seconds("encoding") / len(plan.batches)
        seconds[0] += share_of_encoding
        measurements = {
            **_speed(seconds, plan.extent.generated_frames * len(batch.outs)),
            "seconds_loading": self.watch.seconds("loading"),
            "seconds_writing": watch.seconds("writing"),
            "written_fps": plan.extent.generated_frames * len(batch.outs) / (seconds_in_all + share_of_encoding),
        }
        return [
            {"out": str(out), "sheet": str(sheet) if sheet else None, **settings, **measurements, **roofline}
            for out in batch.outs
        ]

    def _meter(self, batch: int) -> Meter | None:
        """Return what measures `batch` videos against the device, which was measured itself; None where it was not."""
        if self.card is None:
            return None
        recipe = self.plan.recipe(batch)
        if isinstance(self.autoencoder, TAEHV):
            recipe = replace(recipe, taehv=self.autoencoder.config)
        return Meter(recipe, self.card)

    def _rows(self, tensor: Any, count: int) -> Any:
        """Return a tensor of one row for `count` videos, where and as the model computes; None stays None."""
        if tensor is None:
            return None
        return tensor.to(self.plan.device, self.plan.dtype).expand(count, *[-1] * (tensor.ndim - 1))

    def _rollout(
        self, batch: PromptBatch, timeline: Timeline, encode_first: Callable[[int], Tensor] | None
    ) -> Iterator[Chunk]:
        """Return the chunks of a batch, of which nothing is computed before they are asked for."""
        plan, count = self.plan, len(batch.outs)
        guided = [] if plan.cfg == 1 else [plan.request.negative]
        image, clip = self._rows(self.image, count), self._rows(self.clip, count)
        conditionings = {
            text: Conditioning(self._rows(self.embeddings[text], count), image, clip)
            for text in dict.fromkeys([*timeline.prompts, *guided])
        }
        later = _changes(timeline, conditionings, plan.extent.chunk_lengths, cache_policy(plan.causal.policy))
        negative = None if plan.cfg == 1 else conditionings[plan.request.negative]
        seeded = functools.partial(SeededNoise, first_row=batch.first_row, first_frame=plan.extent.first_frame)
        return rollout(
            Guided(
                self.model,
                conditionings[timeline.prompts[0]],
                negative=negative,
                guidance=plan.cfg,
                encode_first=encode_first,
            ),
            noise=ScheduledNoise(seeded(plan.request.seed), timeline.seeds, seeded),
            latent_shape=plan.latent_shape,
            causal=plan.causal,
            steps=plan.steps,
            prompt_at=later.get if later else None,
            start=self.start.prefix_BTCHW,
        )

    def _decoder(self) -> _Cast | FirstPictures:
        """Return a decoder of one video, which is decoded in a stream, and of which a policy may read pictures."""
        coder, plan = self.autoencoder, self.plan
        decoder = _Cast(StreamingWanDecoder(coder) if isinstance(coder, WanVAE) else StreamingDecoder(coder), plan)
        policy = cache_policy(plan.causal.policy)
        if not policy.recomputes or policy.keeps_first or plan.causal.window == -1:
            return decoder
        shown = 0 if self.start.shown_BTCHW is None else self.start.shown_BTCHW.shape[1] - self.start.latent_frames
        back = plan.causal.window - plan.causal.chunk
        return FirstPictures(decoder, _OnDevice(coder, plan).encode, back=back, first_frame=shown)

    def _frames(self, chunks: Iterator[Chunk], decoder: Decoder, count: int, watch: Stopwatch) -> Iterator[Tensor]:
        """Yield frames [B, V, R, H, W] of `count` videos on the CPU, as integers for their files, when they are there.

        What the start shows comes first, then chunk by chunk; the latents are written last, if they are asked for.
        Raises ValueError for a chunk with numbers that are NaN or Inf.
        """
        request, lengths, shown_BTCHW = self.plan.request, self.plan.extent.chunk_lengths, self.start.shown_BTCHW
        kept: list[Tensor] = [] if shown_BTCHW is None else [shown_BTCHW[0]]  # latents for the request's file of them
        # In ASCII, since consoles of Windows may show nothing else.
        with tqdm(total=len(lengths), unit="chunk", disable=not self.show_progress, ascii=True) as bar:
            watched = self._watched(chunks, bar, kept)
            watch.lap("writing")
            for name, frames in frames_of(self.start, watched, decoder, self.plan.causal.chunk):
                # What the start brings along is one row, which all videos begin with.
                frames = to_integers(frames, self.plan.file_bits).cpu().expand(count, *[-1] * 4)
                watch.lap(name)
                yield frames
                watch.lap("writing")
        if request.latents is not None:
            write_latents(request.latents, torch.cat(kept), overwrite=request.overwrite)

    def _watched(self, chunks: Iterator[Chunk], bar: Any, kept: list[Tensor]) -> Iterator[Chunk]:
        """Yield the chunks, each checked, counted by the bar, and kept if latents are asked for."""
        while True:
            with self.kernel():  # only while a chunk is made: other networks' attention it may refuse
                chunk = next(chunks, None)
            if chunk is None:
                return
            _check_finite(chunk, self.plan)
            bar.update()
            is_kept_already = chunk.is_given and self.start.shown_BTCHW is not None
            if self.plan.request.latents is not None and not is_kept_already:
                kept.append(chunk.latents_BTCHW[0].cpu())
            yield chunk


def _changes(
    timeline: Timeline, conditionings: Mapping[str, Conditioning], lengths: Sequence[int], policy: CachePolicy
) -> dict[int, PromptChange]:
    """Return what changes by the first latent frame of each chunk that does not go on with the prompt before."""
    if not timeline.later:
        return {}
    starts = chunk_starts(lengths)
    first, on_the_way = conditionings[timeline.prompts[0]], history_on_the_way(policy)
    blending = Blending(first, starts, blend_conditionings, on_the_way=on_the_way)
    changes: dict[int, PromptChange] = {}
    for start in starts:
        blending.begin(start)
        if start in timeline.later:
            text, transition = timeline.later[start]
            blending.change(conditionings[text], transition)
        step = blending.step()
        if step is not None:
            changes[start] = PromptChange(*step)
    return changes


def _speed(seconds: list[float], frames: int) -> dict[str, Any]:
    """Return the speed of a video of `frames` generated frames from the seconds of its chunks."""
    later = seconds[1:] or seconds  # the first chunk also waits for the text's encoding, and for a compiler
    return {
        "seconds_to_first_frame": seconds[0],
        "seconds_per_chunk": sum(later) / len(later),
        "generated_fps": frames / sum(seconds),
        "generated_fps_includes": FPS_INCLUDES,
    }


def _prediction_in_words(meter: Meter) -> str:
    prediction = meter.predicted()
    return (
        f"the device multiplies at {prediction['device_tflops']:.3g} TFLOP/s and moves "
        f"{prediction['device_gbytes_per_second']:.3g} GB/s: {meter.in_words()}"
    )


def _check_finite(chunk: Chunk, plan: Plan) -> None:
    """Raise ValueError for what would be a black video."""
    if not chunk.latents_BTCHW.isfinite().all():
        raise ValueError(
            f"chunk {chunk.index} holds numbers beyond {str(plan.dtype).removeprefix('torch.')}; "
            f"use a smaller --cfg than {plan.cfg}, or another --dtype"
        )


@dataclass(frozen=True)
class _Cast:
    """A decoder that takes latents from anywhere."""

    decoder: Any
    plan: Plan

    def decode(self, latents_BTCHW: Tensor) -> Tensor:
        return self.decoder.decode(latents_BTCHW.to(self.plan.device, self.plan.dtype))


# ----------------------------------------------------------------- networks --
def _load_autoencoder(plan: Plan) -> TAEHV | WanVAE:
    """Return what decodes the video. Raises ValueError if it is made for other latents."""
    if plan.taehv is not None:
        return build_taehv(plan.taehv, dtype=plan.dtype, device=plan.device)
    assert plan.request.vae is not None
    vae = load_wan_vae(plan.request.vae, dtype=plan.dtype, device=plan.device)
    check_channels(plan.config.out_dim, vae.latent_channels, "VAE", plan.request.vae)
    return vae


def _load_model(plan: Plan) -> Any:
    """Return the video model on its device; of two networks that take turns there, both beside it."""
    device = None if plan.takes_turns else plan.device
    model = _network(plan, plan.checkpoint, device)
    if plan.pair is None:
        return model
    networks = model, _network(plan, plan.pair.low, device)
    bring = TakingTurns(networks, plan.device) if plan.takes_turns else None
    assert plan.steps.boundary is not None
    return Experts(*networks, plan.steps.boundary, bring=bring)


def _network(plan: Plan, checkpoint: Checkpoint, device: torch.device | None) -> Any:
    """Return a network on its device; with fp8 it is shrunk on the CPU before it moves."""
    # The device may have room for the small weights only.
    model: Any = build_model(checkpoint, dtype=plan.dtype, device=None if plan.request.fp8 else device)
    if plan.request.fp8:
        model = store_in_float8(model)
        model = model if device is None else model.to(device)
    model.cache_dtype = plan.cache_dtype
    return model.compile_blocks() if plan.request.compile else model


def _start(plan: Plan, autoencoder: TAEHV | WanVAE) -> tuple[Start, Tensor | None, Tensor | None]:
    """Return how the video begins, and for image-to-video models their condition channels and CLIP features."""
    encoder = _OnDevice(autoencoder, plan)
    if plan.source is not None:
        if isinstance(plan.source, Tensor):
            return start_from_latents(plan.source, plan.causal), None, None
        return start_from_video(plan.source, encoder, plan.causal), None, None
    if plan.image_RHW is None:
        return Start(), None, None
    size = plan.extent.geometry
    image = fit_image(plan.image_RHW, size.width, size.height)[None]
    if plan.is_prefixed_by_image:
        return start_from_image(image, encoder), None, None
    assert plan.request.vae is not None
    # The condition channels are latents of Wan's own VAE, on which these models were trained, whatever decodes.
    vae = autoencoder
    if not isinstance(vae, WanVAE):
        vae = load_wan_vae(plan.request.vae, dtype=plan.dtype, device=plan.device)
    condition = first_frame_condition(_OnDevice(vae, plan), image, size.latent_frames)
    if not plan.config.reads_clip:
        return Start(), condition.cpu(), None
    from ..codecs.clip import load_clip

    assert plan.request.clip is not None
    clip = load_clip(plan.request.clip, dtype=plan.dtype, device=plan.device).encode(image)
    return Start(), condition.cpu(), clip.cpu()


@dataclass(frozen=True)
class _OnDevice:
    """An encoder that takes frames from anywhere and holds the work for one chunk of them at a time."""

    autoencoder: TAEHV | WanVAE
    plan: Plan

    def encode(self, frames_BVRHW: Tensor) -> Tensor:
        device, dtype = self.plan.device, self.plan.dtype
        if isinstance(self.autoencoder, WanVAE):  # walks through a video in groups of 4 frames by itself
            return self.autoencoder.encode(frames_BVRHW.to(device, dtype))
        stream = StreamingEncoder(self.autoencoder)
        pieces = frames_BVRHW.split(TEMPORAL_FACTOR * self.plan.causal.chunk, 1)
        return torch.cat([*(stream.encode(piece.to(device, dtype)) for piece in pieces), stream.flush()], 1)
