"""What becomes of the frames so far when the prompt changes: written again under the new one, or kept.

Letters: B batch, T latent frames, C latent channels, H W latent size.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .conditioning import Conditioning
from .config import CausalConfig
from .geometry import chunk_starts
from .guided import Guided
from .policy import CUT, FLUSH, HISTORIES, RECACHE, RECACHE_SINK, RECODE, cache_policy
from .snapshot import Snapshot

log = logging.getLogger(__name__)
CONTEXT, FIRST = "context", "first"  # names of latents in a snapshot: the frames of the window, and the first of all


@dataclass(frozen=True)
class PromptChange:
    """Another prompt from here on, and what becomes of the frames so far.

    history: a word of policy.HISTORIES; None leaves it to the policy. Raises ValueError for any other word.
    """

    conditioning: Conditioning
    history: str | None = None

    def __post_init__(self) -> None:
        if self.history is not None and self.history not in HISTORIES:
            raise ValueError(f"history {self.history!r} is unknown; use {' or '.join(HISTORIES)}")


PromptAt = Callable[[int], PromptChange | None]


def is_past_known(resume: Snapshot, causal: CausalConfig) -> bool:
    """Return whether a rollout that goes on from there can write its history again, as history "recode" does."""
    return CONTEXT in resume.latents or (resume.video_BTCHW is not None and causal.cache_source != "last_step")


class History:
    """The clean frames that the chunk being made sees, as they were written into the cache."""

    def __init__(
        self, guided: Guided, causal: CausalConfig, lengths: tuple[int, ...], prompt_at: PromptAt | None
    ) -> None:
        self.guided, self.causal, self.prompt_at = guided, causal, prompt_at
        self.policy = cache_policy(causal.policy)
        evicts = -1 < causal.window < sum(lengths)  # else the ring never comes round, and no frame counts as sink
        self.sink = causal.sink if evicts else 0
        self.ring = causal.window - causal.sink - self.policy.num_means if evicts else sum(lengths)
        self.window = causal.window if evicts else sum(lengths)
        self.chunks: list[tuple[int, Tensor, float]] = []  # start frame, what was written, at which timestep
        self.first_BTCHW: Tensor | None = None  # frame 0, where the policy computes its window again
        # Frames before a chunk that such a policy computes again, also behind the last one, for a longer video.
        self.context = sum(lengths) if causal.window == -1 else causal.window - causal.chunk
        self.is_known = True
        if self.policy.recomputes and not self.policy.keeps_first and guided.encode_first is None and evicts:
            log.warning(
                "policy %s begins its window with the video's first frame: without an autoencoder in the rollout, no "
                "later picture can be encoded as a first one",
                self.policy.name,
            )
        self.begun: int | None = None  # where the chunk begins that was asked for last

    def add(self, start_frame: int, x_BTCHW: Tensor, timestep: float) -> None:
        """Remember a finished chunk, in place of an earlier one there; forget those that it did not see.

        Where nothing is ever written again, nothing is remembered.
        """
        if start_frame == 0:
            self.first_BTCHW = x_BTCHW[:, :1] if self.policy.recomputes else None
        if self.prompt_at is None and not self.policy.recomputes:
            return
        # `start < start_frame` leaves out the first version of a chunk that is generated once more
        self.chunks = [
            (start, x, t)
            for start, x, t in self.chunks
            if start < start_frame and (start < self.sink or start + x.shape[1] > start_frame - self.window)
        ]
        self.chunks.append((start_frame, x_BTCHW, timestep))

    def add_video(self, snapshot: Snapshot, lengths: tuple[int, ...]) -> None:
        """Remember the chunks before a snapshot, if it holds them as they were written."""
        self.is_known = is_past_known(snapshot, self.causal)
        if self.policy.recomputes and not self.is_known:
            raise ValueError(
                f"the snapshot does not hold the clean frames that policy {self.policy.name} computes its window from; "
                "resume with the policy it was saved with"
            )
        if CONTEXT in snapshot.latents:
            self._check_context(snapshot)
            context_BTCHW = snapshot.latents[CONTEXT].to(self.guided.device)
            self.chunks = [(snapshot.end_frame - context_BTCHW.shape[1], context_BTCHW, self.causal.context_noise)]
            self.first_BTCHW = snapshot.latents[FIRST].to(self.guided.device)
            return
        if not self.is_known or (self.prompt_at is None and not self.policy.recomputes):
            return
        assert snapshot.video_BTCHW is not None
        starts = chunk_starts(lengths)
        for start, chunk in zip(starts, snapshot.video_BTCHW.split(lengths, 1)):
            # as the clean pass wrote them, which is why a cache of noisy chunks (last_step) is not known
            self.add(start, chunk.to(self.guided.device), self.causal.context_noise)

    def _check_context(self, snapshot: Snapshot) -> None:
        """Raise ValueError unless the clean frames of a snapshot are those that this policy's window begins with."""
        if not self.policy.recomputes:  # refused by its name, with everything else that is not here
            return
        if snapshot.policy not in ("", self.policy.memory_text):  # older files do not say
            raise ValueError(
                f"the snapshot was taken under policy {snapshot.policy}, this rollout follows "
                f"{self.policy.memory_text}; resume with the policy and the settings it was saved with"
            )
        count, needed = snapshot.latents[CONTEXT].shape[1], min(snapshot.end_frame, self.context)
        if count != needed:
            raise ValueError(
                f"the snapshot holds the {count} clean frames before its end that its window was computed from; window "
                f"{self.causal.window} takes {needed}; resume with the window and chunk it was saved with"
            )

    def follow_prompt(self, start_frame: int, latent_shape: tuple[int, int, int, int]) -> None:
        """Ask for the prompt that holds from here on; where it is another one, write the past again under it if asked.

        Under a policy that computes its window again before every chunk, this is when. Raises ValueError if the
        prompt's conditioning does not fit the network or the video.
        """
        for cache in self.guided.caches if start_frame == self.begun else ():  # it is made once more
            if cache is not None:
                cache.undo(start_frame)
        self.begun = start_frame
        change = None if self.prompt_at is None else self.prompt_at(start_frame)
        if self.policy.recomputes and self.policy.is_published:
            self.compute_window(start_frame)
        if change is not None:
            self._follow(change, start_frame, latent_shape)
        if self.policy.recomputes and not self.policy.is_published:
            self.compute_window(start_frame)

    def _follow(self, change: PromptChange, start_frame: int, latent_shape: tuple[int, int, int, int]) -> None:
        change.conditioning.check(self.guided.model.config, latent_shape)
        self.guided.change_prompt(change.conditioning)
        history = self.policy.with_history(change.history).history
        if start_frame == 0 or self.policy.recomputes:  # nothing to write again, or it is done for every chunk
            return
        for cache in self.guided.caches:
            if cache is not None:
                cache.close(start_frame)
                if history == CUT:
                    cache.begin_shot(start_frame)
        if history == RECODE:
            self.write_again(start_frame)
        elif history in (RECACHE, RECACHE_SINK):
            self.write_jointly(start_frame, moves_sink=history == RECACHE_SINK)
        elif history in (FLUSH, CUT) and self.policy.shot_offset is None:
            self.forget_window(start_frame, is_cut=history == CUT)

    def compute_window(self, end_frame: int) -> None:
        """Write the window before a chunk into empty caches, from its clean frames (Krea Realtime).

        Its first frame is no longer the video's, and is read as if it were: encoded again as a first frame.
        """
        if end_frame == 0:
            return
        first, chunk = max(0, end_frame - self.context), self.causal.chunk
        x_BTCHW = self._frames(first, end_frame)
        if first > 0:
            x_BTCHW = torch.cat([self._first_of_window(first, end_frame), x_BTCHW[:, 1:]], 1)
        for cache in self.guided.caches:
            assert cache is not None
            cache.begin_again(first)
        for start in range(first, end_frame, chunk):  # each sees itself and those before it, counted from the first
            part_BTCHW = x_BTCHW[:, start - first : start - first + chunk]
            self.guided.commit(part_BTCHW, self.causal.context_noise, start)
        for cache in self.guided.caches:
            assert cache is not None
            cache.bias = self.policy.bias  # of denoising passes alone

    def _frames(self, first: int, end_frame: int) -> Tensor:
        """Return clean frames [first, end_frame) of those that are remembered."""
        parts = [(start, x) for start, x, _ in self.chunks if start < end_frame and start + x.shape[1] > first]
        return torch.cat([x for _, x in parts], 1)[:, first - parts[0][0] : end_frame - parts[0][0]]

    def _first_of_window(self, first: int, end_frame: int) -> Tensor:
        assert self.first_BTCHW is not None
        # one chunk longer than it stands in the window, the video's own first frame is shown, as published
        is_own = self.policy.keeps_first or end_frame - self.causal.chunk < self.context
        if is_own or self.guided.encode_first is None:
            return self.first_BTCHW
        encoded_BTCHW = self.guided.encode_first(first).to(self.first_BTCHW)
        return encoded_BTCHW.expand_as(self.first_BTCHW)

    def latents(self, end_frame: int) -> dict[str, Tensor]:
        """Return what a snapshot after a chunk needs to compute the window again, by name."""
        if not self.policy.recomputes:
            return {}
        assert self.first_BTCHW is not None
        return {CONTEXT: self._frames(max(0, end_frame - self.context), end_frame), FIRST: self.first_BTCHW}

    def forget_window(self, end_frame: int, *, is_cut: bool) -> None:
        """Keep the sink and the last frames (Infinity-RoPE's flush); behind a cut the next chunk stands far away."""
        for cache in self.guided.caches:
            if cache is not None:
                cache.forget_window(end_frame, self.policy.kept)
                if is_cut:
                    cache.jump_to(self.policy.cut_at)

    def write_jointly(self, end_frame: int, *, moves_sink: bool) -> None:
        """Write the window again in one pass in which all of its frames see each other (LongLive's recache).

        Raises ValueError as `write_again` does.
        """
        self._expect_known()
        first = 0
        for cache in self.guided.caches:
            if cache is None:
                continue
            if end_frame <= self.window:  # nothing was evicted yet: the sink too is written again
                cache.restart(self.sink)
            elif moves_sink:
                first = end_frame - self.window
                cache.restart(first + self.sink, sink_start=first)
            else:  # the frames before would be computed for nobody
                first = end_frame - self.ring
                cache.rewind(first)
        parts = [(start, x, t) for start, x, t in self.chunks if start < end_frame and start + x.shape[1] > first]
        x_BTCHW = torch.cat([x for _, x, _ in parts], 1)[:, first - parts[0][0] : end_frame - parts[0][0]]
        self.guided.commit(x_BTCHW, parts[-1][2], first)

    def write_again(self, end_frame: int) -> None:
        """Empty the caches and write the frames before `end_frame` that they showed, oldest first.

        Raises ValueError if the rollout goes on from a snapshot without them.
        """
        self._expect_known()
        # as many frames as were visible, though not in the slots where they were
        base = max(self.sink, end_frame - self.ring)
        for cache in self.guided.caches:
            if cache is not None:
                cache.restart(base)
        # the sink first, then the ring from its oldest frame on, so that each chunk is written before those that see it
        for start, x_BTCHW, timestep in self.chunks:
            end = min(start + x_BTCHW.shape[1], end_frame)
            # What lay between the sink and the base is gone; where nothing did, a chunk is written whole, as it was.
            parts = ((start, min(end, self.sink)), (max(start, base), end)) if base > self.sink else ((start, end),)
            for part_start, part_end in parts:
                if part_start < part_end:
                    self.guided.commit(x_BTCHW[:, part_start - start : part_end - start], timestep, part_start)

    def _expect_known(self) -> None:
        if not self.is_known:
            raise ValueError(
                "the snapshot does not hold what was written into the cache, to write it again under another prompt; "
                "use history 'keep'"
            )
