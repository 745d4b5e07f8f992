"""Memories that choose which frames stay: a bank by the prompt, a sink that is refreshed, the first frames of a shot.

Which frames are alike is known to the device alone, and differs from layer to layer and from row to row: choices are
index tensors there, and nothing is read back. Frames are moved as they are stored, so that nothing is rounded twice.

Letters: B batch, L query tokens (those of the staged chunk), S cached tokens, N heads, K head width, P text tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .memory import Evicted, Memory, Ring
from .quantised import dequantise, quantise

CHOSEN = -3  # what a slot shows whose frame only the device knows


def _frames(buffer_BSNK: Tensor, first: int, end: int, tokens: int) -> Tensor:
    """Return a layer's slots as a view with an axis for them, as bytes where a number is one: those can be indexed."""
    part = buffer_BSNK[:, first * tokens : end * tokens].unflatten(1, (end - first, tokens))
    return part.view(torch.uint8) if part.element_size() == 1 else part


class FrameBank(Memory):
    """Frames of earlier times, kept by their likeness to the prompt, in each layer by its own (MemFlow).

    The first frame of every few chunks enters. Once the bank is full, the frame whose keys answer least to the text's
    makes room. The text is that of the latest pass.
    """

    def __init__(self, cache: Ring) -> None:
        super().__init__(cache)
        self.num_recorded = self.closed = 0  # frames that entered; where the frames end that were looked at

    def reset(self) -> None:
        super().reset()
        self.num_recorded = self.closed = 0

    def restart(self) -> None:
        """Keep the bank: what is written again is what the window shows."""

    @property
    def num_banked(self) -> int:  # type: ignore[override]
        return min(self.num_recorded, self.cache.policy.bank)

    def read_text(self, layer: int, k_BPNK: Tensor) -> None:
        k_BNK = k_BPNK.detach().to(self.cache.k.device).mean(1, dtype=torch.float32)
        if "text_k" not in self.tensors:
            self.tensors["text_k"] = k_BNK.new_zeros(self.cache.k.shape[0], *k_BNK.shape)
        self.tensors["text_k"][layer] = k_BNK

    def close(self, end_frame: int) -> None:
        if self.cache.end_frame <= end_frame:  # else that chunk is not final, but to be made once more
            self._take()
            self.closed = max(self.closed, end_frame)

    def advance(self, evicted: Evicted, window_start: int) -> None:
        self._take()

    def _take(self) -> None:
        """Let the first frame of the chunk before enter, if it is its turn."""
        cache, policy = self.cache, self.cache.policy
        start, end = cache.start_frame, cache.end_frame
        # frames that are written again under another prompt were looked at before
        if start < self.closed or end <= start:
            return
        self.closed = end
        index = -(-(start - cache.sink_start) // (end - start))  # of the chunk; a first frame of its own is chunk 0
        enters = index % policy.record_every == 0
        if not enters and not policy.bank_follows and not policy.is_published:
            return
        self.num_recorded += enters
        if self.num_recorded > policy.bank:
            self._choose()
        if enters or policy.bank_follows:
            self._copy(cache.slot_of(start), cache.capacity + self.num_banked - 1)

    def _copy(self, slot: int, target: int) -> None:
        tokens = self.cache.tokens_per_frame
        for buffer in _buffers(self.cache):
            buffer[:, :, target * tokens : (target + 1) * tokens] = buffer[:, :, slot * tokens : (slot + 1) * tokens]

    def _choose(self) -> None:
        """Move those that answer most to the text to the front; the last place is free for the one that enters."""
        cache, bank = self.cache, self.cache.policy.bank
        first, tokens = cache.capacity, cache.tokens_per_frame
        place = slice(first * tokens, (first + bank) * tokens)
        like = torch.empty(0, device=cache.k.device, dtype=torch.float32)
        for layer, text_BNK in enumerate(self.tensors["text_k"]):
            scale = None if cache.k_scale is None else cache.k_scale[layer, :, place]
            k_BSNK = dequantise(cache.k[layer, :, place], scale, like)
            # the mean of all products of a text's and a frame's keys is the product of their means
            means = k_BSNK.unflatten(1, (bank, tokens)).mean(2)
            scores = (means * text_BNK.unsqueeze(1)).sum((-2, -1))
            kept = scores.topk(bank - 1, 1).indices.sort(1).values
            rows = torch.arange(kept.shape[0], device=kept.device).unsqueeze(1)
            for buffer in _buffers(cache):
                frames = _frames(buffer[layer], first, first + bank, tokens)
                frames[:, : bank - 1] = frames[rows, kept]

    def state(self) -> dict[str, Tensor]:
        if not self.num_recorded:
            return {}
        return {**self.tensors, "num_recorded": torch.tensor(self.num_recorded)}

    def restore(self, state: dict[str, Tensor]) -> None:
        self.tensors = {name: x for name, x in state.items() if name != "num_recorded"}
        self.num_recorded = int(state.get("num_recorded", 0))


class RefreshedSink(Memory):
    """A sink whose frames make room when the video has moved away from them (StreamDiffusionV2, sink refresh).

    In every pass over a new frame each layer compares its keys and values with those of the sink's frames. If the one
    least like it is less so than a threshold, the new frame takes its slot. All slots wait in a queue: those of the
    ring in turn, and in front of them the sink's that were found so, the latest first. As published that queue has no
    end; here it forgets the oldest of more than WAITING.
    """

    WAITING = 64

    def __init__(self, cache: Ring) -> None:
        super().__init__(cache)
        self.is_due = self.was_due = False  # whether the queue moves on before the next pass
        self.num_passes = 0  # over the staged chunk
        self.slots: dict[int, Tensor] = {}  # by layer, of the staged chunk for each row
        self.before: dict[str, Tensor] = {}  # what the staged chunk may overwrite, for a chunk that is made once more

    def reset(self) -> None:
        super().reset()
        self.is_due, self.num_passes, self.slots, self.before = False, 0, {}, {}

    def num_bytes(self) -> int:
        return super().num_bytes() + sum(x.nbytes for x in (*self.before.values(), *self.slots.values()))

    @property
    def _is_published(self) -> bool:
        return self.cache.policy.is_published

    def offset(self, start_frame: int) -> float:
        first, back = self.cache.policy.reset_at, self.cache.capacity - 1
        if not first or start_frame < first or first <= back:
            return 0.0
        return float(back + (start_frame - first) % (first - back) - start_frame)

    def is_chosen(self, start_frame: int) -> bool:
        return start_frame - self.cache.sink_start >= self.cache.capacity

    def place(self, frames: Sequence[int]) -> list[int]:
        if not self.is_chosen(frames[0]):
            return super().place(frames)
        assert len(frames) == 1, "slots are chosen for one frame at a time"
        self.cache.slot_frames[:] = [CHOSEN] * self.cache.capacity
        return []

    def advance(self, evicted: Evicted, window_start: int) -> None:
        cache = self.cache
        if not self.tensors:
            shape = (cache.k.shape[0], cache.k.shape[1])
            zeros = torch.zeros(*shape, self.WAITING, dtype=torch.long, device=cache.k.device)
            # slots of the sink that wait, the next one first; how many; and which slot of the ring is next
            self.tensors = {"waiting": zeros, "depth": zeros[..., 0].clone(), "turn": zeros[..., 0].clone()}
        if not self._is_published and self.is_chosen(cache.start_frame):
            self._pop()  # a frame had one slot in all of its passes, and the last one's keys stay there
        self.num_passes, self.slots = 0, {}
        self._save(is_overwriting=self.is_chosen(cache.end_frame))

    def begin_pass(self) -> None:
        if not self.cache.writes:
            raise ValueError(
                f"policy {self.cache.policy.name} chooses where to write in every pass, and one with gradient writes "
                "nothing; train with another policy"
            )
        is_chosen = self.is_chosen(self.cache.start_frame)
        if self.is_due:
            self._pop()
        # The published test of a full cache holds a pass too early: a frame's first pass overwrites what the one before
        # left, and only then the queue moves on.
        self.is_due = self._is_published and is_chosen and self.num_passes == 0
        self.num_passes += 1

    def _pop(self) -> None:
        waiting, depth, turn = (self.tensors[name] for name in ("waiting", "depth", "turn"))
        is_sink = depth > 0
        ring = self.cache.capacity - self.cache.sink
        turn.copy_(torch.where(is_sink, turn, (turn + 1) % ring))
        waiting.copy_(torch.where(is_sink.unsqueeze(-1), waiting.roll(-1, -1), waiting))
        depth.sub_(is_sink.long())

    def write(self, layer: int, k_BLNK: Tensor, v_BLNK: Tensor) -> bool:
        cache = self.cache
        is_one = cache.end_frame - cache.start_frame == 1
        k_BLNK, v_BLNK = k_BLNK.to(cache.k.device), v_BLNK.to(cache.k.device)
        if is_one:
            self._compare(layer, k_BLNK, v_BLNK)
        is_filling = self._is_published and self.num_passes > 1 and cache.end_frame - cache.sink_start == cache.capacity
        if not self.is_chosen(cache.start_frame) and not (is_filling and is_one):
            return False
        waiting, depth, turn = (self.tensors[name][layer] for name in ("waiting", "depth", "turn"))
        slot_B = self.slots[layer] = torch.where(depth > 0, waiting[:, 0], cache.sink + turn)
        rows, tokens = torch.arange(len(slot_B), device=slot_B.device), cache.tokens_per_frame
        for new, buffer, scales in ((k_BLNK, cache.k, cache.k_scale), (v_BLNK, cache.v, cache.v_scale)):
            stored, scale = (new.to(buffer.dtype), None) if scales is None else quantise(new, buffer.dtype)
            frames = _frames(buffer[layer], 0, cache.capacity, tokens)
            frames[rows, slot_B] = stored.view(torch.uint8) if stored.element_size() == 1 else stored
            if scales is not None and scale is not None:
                _frames(scales[layer], 0, cache.capacity, tokens)[rows, slot_B] = scale
        return True

    def slot_in(self, layer: int) -> Tensor | None:
        return self.slots.get(layer)

    def _compare(self, layer: int, k_BLNK: Tensor, v_BLNK: Tensor) -> None:
        """Let a frame of the sink wait for its end if it is not like the new one."""
        cache, threshold = self.cache, self.cache.policy.refresh_below
        assert threshold is not None
        start = cache.start_frame - cache.sink_start
        # as published, an empty slot is like nothing: it waits for its end before it holds anything
        num_full = min(cache.sink, start + (self.num_passes > 1))
        likeness = k_BLNK.new_zeros(k_BLNK.shape[0], cache.sink, dtype=torch.float32)
        place = slice(0, num_full * cache.tokens_per_frame)
        like = torch.empty(0, device=cache.k.device, dtype=torch.float32)
        for new, buffer, scales in ((k_BLNK, cache.k, cache.k_scale), (v_BLNK, cache.v, cache.v_scale)):
            if not num_full:
                break
            stored = dequantise(buffer[layer, :, place], None if scales is None else scales[layer, :, place], like)
            means = stored.unflatten(1, (num_full, -1)).mean(2).flatten(2)
            likeness[:, :num_full] += F.cosine_similarity(means, new.float().mean(1).flatten(1).unsqueeze(1), dim=-1)
        least, index = (likeness / 2).min(1)
        waiting, depth = (self.tensors[name][layer] for name in ("waiting", "depth"))
        is_unlike = least < threshold
        waits = waiting.roll(1, -1)
        waits[:, 0] = index
        waiting.copy_(torch.where(is_unlike.unsqueeze(1), waits, waiting))
        depth.copy_((depth + is_unlike).clamp_max(self.WAITING))

    def _save(self, *, is_overwriting: bool) -> None:
        """Keep what the staged chunk may overwrite: the queue, the sink, and the slots of the ring whose turn it is."""
        self.before = {name: x.clone() for name, x in self.tensors.items()}
        self.was_due = self.is_due
        cache, tokens = self.cache, self.cache.tokens_per_frame
        if not (is_overwriting or self._is_published):
            return
        for number, buffer in enumerate(_buffers(cache)):
            frames = [_frames(layer, 0, cache.capacity, tokens) for layer in buffer]
            self.before[f"sink{number}"] = torch.stack([each[:, : cache.sink] for each in frames])
            parts = [each[rows, slots] for each, rows, slots in zip(frames, *self._ring_slots())]
            self.before[f"ring{number}"] = torch.stack(parts)

    def _ring_slots(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return, layer by layer, the rows and the slots of the ring that a chunk may be written to."""
        cache, turns = self.cache, self.before["turn"]
        ring = cache.capacity - cache.sink
        count = min(ring, 2 if self._is_published else 1)
        slots = cache.sink + (turns.unsqueeze(-1) + torch.arange(count, device=turns.device)) % ring
        rows = torch.arange(turns.shape[1], device=turns.device).unsqueeze(1)
        return [rows] * len(slots), list(slots)

    def undo(self) -> None:
        self.num_passes, self.is_due, self.slots = 0, self.was_due, {}
        for name in self.tensors:
            self.tensors[name].copy_(self.before[name])
        if "sink0" not in self.before:
            return
        cache, tokens = self.cache, self.cache.tokens_per_frame
        for number, buffer in enumerate(_buffers(cache)):
            for layer, rows, slots, sink, ring in zip(
                buffer, *self._ring_slots(), self.before[f"sink{number}"], self.before[f"ring{number}"]
            ):
                frames = _frames(layer, 0, cache.capacity, tokens)
                frames[:, : cache.sink], frames[rows, slots] = sink, ring

    def state(self) -> dict[str, Tensor]:
        return {**self.tensors, "is_due": torch.tensor(self.is_due)} if self.tensors else {}

    def restore(self, state: dict[str, Tensor]) -> None:
        self.tensors = {name: x for name, x in state.items() if name != "is_due"}
        self.is_due = bool(state.get("is_due", False))
        self.num_passes = 1  # over the chunk that the state was taken after, whose slot is still the queue's first
        self.slots = {}


class PinnedShots(Memory):
    """The first frames of a shot stay while it lasts, and every shot stands some positions farther on (LongLive 2).

    Which frames they are is known beforehand, so that no tensor is kept: the ring leaves their slots out.
    """

    is_placing = True

    def __init__(self, cache: Ring) -> None:
        super().__init__(cache)
        self._begin()

    def _begin(self) -> None:
        self.num_shots, self.latest, self.one_before = 0, -1, -1  # behind the first; where the last two of them begin
        self.pinned = range(0)

    def reset(self) -> None:
        super().reset()
        self._begin()

    def begin_shot(self, start_frame: int) -> None:
        if start_frame != self.latest:
            self.num_shots, self.latest, self.one_before = self.num_shots + 1, start_frame, self.latest

    def undo(self) -> None:
        if self.latest == self.cache.start_frame:
            self.num_shots, self.latest = self.num_shots - 1, self.one_before

    def close(self, end_frame: int) -> None:
        if self.cache.end_frame <= end_frame:  # else that chunk is to be made once more
            self._pin()

    def _pin(self) -> None:
        """Pin the chunk before, if it is the first one of a shot; the former shot's is then a chunk like any other."""
        cache = self.cache
        if cache.start_frame == self.latest and cache.end_frame > cache.start_frame:
            self.pinned = range(self.latest, min(cache.end_frame, self.latest + cache.sink))

    def offset(self, start_frame: int) -> float:
        shot_offset = self.cache.policy.shot_offset
        assert shot_offset is not None
        return float(shot_offset * (self.num_shots - (start_frame < self.latest)))

    def place(self, frames: Sequence[int]) -> list[int]:
        self._pin()
        cache = self.cache
        in_sink = [frame - cache.sink_start for frame in frames if frame < cache.sink_start + cache.head]
        ring = range(cache.head, cache.capacity)
        free = [slot for slot in ring if cache.slot_frames[slot] == -1]
        in_turn = sorted((slot for slot in ring if slot not in free), key=lambda slot: cache.slot_frames[slot])
        free += [slot for slot in in_turn if cache.slot_frames[slot] not in self.pinned]
        return in_sink + free[: len(frames) - len(in_sink)]

    def advance(self, evicted: Evicted, window_start: int) -> None:
        """Leave everything to `place`."""

    def state(self) -> dict[str, Tensor]:
        if not self.num_shots:
            return {}
        return {"shots": torch.tensor([self.num_shots, self.latest, self.pinned.start, self.pinned.stop])}

    def restore(self, state: dict[str, Tensor]) -> None:
        self._begin()
        if state:
            self.num_shots, self.latest, start, stop = state["shots"].tolist()
            self.pinned = range(start, stop)


def _buffers(cache: Ring) -> list[Tensor]:
    return [buffer for buffer in (cache.k, cache.v, cache.k_scale, cache.v_scale) if buffer is not None]


def chosen_memory(cache: Ring) -> Memory | None:
    """Return the memory of a policy that chooses what stays, None for one that does not."""
    policy = cache.policy
    if policy.bank:
        return FrameBank(cache)
    if policy.refresh_below is not None:
        return RefreshedSink(cache)
    return PinnedShots(cache) if policy.shot_offset is not None else None
