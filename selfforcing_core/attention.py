"""The one door to attention: whole or by segments, by torch's own kernel, by a measured one, or by ComfyUI's function.

Letters: B batch, L query tokens, S cached tokens (with the chunk's own ones), N heads, K head width.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

log = logging.getLogger(__name__)
KERNELS = {
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
ATTENTIONS = ("auto", *KERNELS, "measured")
REPEATS = 2  # timed calls of each kernel, after one to warm up; the fastest one counts
MATH_LIMIT = 2**28  # bytes; "math" holds all scores at once and is only tried where they are few
# Types of device where torch's fast kernel tells the log-sum-exp of its scores, without which segments cannot be
# merged. Elsewhere they would be attended to by plain products, which is slower than one layer in a wider type.
MERGING_DEVICES = ("cpu",)


def attend(q_BLNK: Tensor, k_BSNK: Tensor, v_BSNK: Tensor, mask_LS: Tensor | None = None) -> Tensor:
    """Return softmax(q k^T / sqrt(K)) v, [B, L, N, K].

    mask_LS: True where a query may look, or what is added to the scores; one row is that of every query.
    """
    # context variables are not seen by compiled code, which could not stop to measure either
    is_compiling = torch.compiler.is_compiling()
    replacement = None if is_compiling else _replacement.get()
    if replacement is not None:
        return replacement(q_BLNK, k_BSNK, v_BSNK, mask_LS)
    q, k, v = q_BLNK.transpose(1, 2), k_BSNK.transpose(1, 2), v_BSNK.transpose(1, 2)
    # what carries gradient is not measured: most of its time goes into the backward pass, of which that says nothing
    kernels = None if is_compiling or q.requires_grad or k.requires_grad else _measured.get()
    attended = F.scaled_dot_product_attention(q, k, v, mask_LS) if kernels is None else kernels.attend(q, k, v, mask_LS)
    return attended.transpose(1, 2)


# Segments.


def attend_segments(q_BLNK: Tensor, segments: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Attend to keys and values that come in segments, of which one is held at a time. Without gradient.

    segments: keys and values, each [B, S, N, K] of a few of the tokens. Results are merged by the log-sum-exp of their
    scores (online softmax, arXiv 1805.02867), in float32 or wider.
    """
    if _replacement.get() is not None:  # which does not tell the log-sum-exp
        keys, values = zip(*segments)
        return attend(q_BLNK, torch.cat(keys, 1), torch.cat(values, 1))
    remaining = iter(segments)
    k, v = next(remaining)
    segment = next(remaining, None)
    if segment is None:
        return attend(q_BLNK, k, v)
    merged_BLNK, merged_lse = _attend_with_lse(q_BLNK, k, v)
    merged_BLNK = merged_BLNK.to(torch.promote_types(q_BLNK.dtype, torch.float32))
    while segment is not None:
        attended_BLNK, lse = _attend_with_lse(q_BLNK, *segment)
        segment = None  # gone before the next one is made
        # both are weighted by their share of the common denominator: sigmoid(a - b) = e^a / (e^a + e^b)
        merged_BLNK.lerp_(attended_BLNK.to(merged_BLNK.dtype), torch.sigmoid(lse - merged_lse).to(merged_BLNK.dtype))
        merged_lse = torch.logaddexp(merged_lse, lse)
        del attended_BLNK
        segment = next(remaining, None)
    return merged_BLNK.to(q_BLNK.dtype)


def _attend_with_lse(q_BLNK: Tensor, k_BSNK: Tensor, v_BSNK: Tensor) -> tuple[Tensor, Tensor]:
    """Return what `attend` returns, and the log-sum-exp of the scores, [B, L, N] and one."""
    q, k, v = (x.transpose(1, 2) for x in (q_BLNK, k_BSNK, v_BSNK))
    # torch's public function keeps the log-sum-exp to itself; the switch is that of sdpa_kernel, on every device
    if q.device.type in MERGING_DEVICES and torch.backends.cuda.flash_sdp_enabled():
        attended, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
        lse = lse.unsqueeze(-1)
    else:
        attended, lse = _products_with_lse(q, k, v)
    return attended.transpose(1, 2), lse.transpose(1, 2)


def _products_with_lse(q_BNLK: Tensor, k_BNSK: Tensor, v_BNSK: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the same by matrix products, of few queries at a time: scores take no more than keys and values."""
    wide = torch.promote_types(q_BNLK.dtype, torch.float32)
    k, v, width = k_BNSK.to(wide), v_BNSK.to(wide), q_BNLK.shape[-1]
    parts, sums = [], []
    for q in q_BNLK.split(2 * width, 2):
        scores = (q.to(wide) * width**-0.5) @ k.mT
        largest = scores.amax(-1, keepdim=True)  # taken out before exp, so that nothing overflows
        total = scores.sub_(largest).exp_().sum(-1, keepdim=True)
        parts.append((scores @ v) / total)
        sums.append(largest + total.log())
        del scores
    return torch.cat(parts, 2), torch.cat(sums, 2)


# Kernels.


class MeasuredKernels:
    """The fastest of torch's kernels for each shape, measured when the shape first comes up.

    Lengths of keys and values share a measurement up to the next power of two: a growing cache has a new length in
    every chunk, and what is fastest changes slowly with it.
    """

    def __init__(self) -> None:
        self.fastest: dict[tuple[Any, ...], str] = {}

    def attend(self, q_BNLK: Tensor, k_BNSK: Tensor, v_BNSK: Tensor, mask_LS: Tensor | None) -> Tensor:
        """Attend by the fastest kernel, heads before tokens, [B, N, L, K]."""
        length = k_BNSK.shape[2]
        kind = (q_BNLK.device, q_BNLK.dtype, tuple(q_BNLK.shape), mask_LS is not None)
        exact, rounded = (*kind, length), (*kind, f"to {1 << (length - 1).bit_length()}")
        name = self.fastest.get(exact) or self.fastest.get(rounded)
        if name is None:
            name = self.fastest[rounded] = _measure(q_BNLK, k_BNSK, v_BNSK, mask_LS)
        try:
            return _by_kernel(name, q_BNLK, k_BNSK, v_BNSK, mask_LS)
        except RuntimeError as error:
            if name == "auto" or not _is_refusal(error):
                raise
        log.info("attention kernel %s refuses %d keys; torch chooses for them", name, length)
        self.fastest[exact] = "auto"  # its neighbours' kernel does not serve this length
        return _by_kernel("auto", q_BNLK, k_BNSK, v_BNSK, mask_LS)


_measured: ContextVar[MeasuredKernels | None] = ContextVar("measured", default=None)


def _measure(q_BNLK: Tensor, k_BNSK: Tensor, v_BNSK: Tensor, mask_LS: Tensor | None) -> str:
    """Return the fastest of the kernels that serve this, or "auto": torch's own choice, which needs no switching."""
    (batch, heads, queries, width), length = q_BNLK.shape, k_BNSK.shape[2]
    seconds: dict[str, float] = {}
    scores = batch * heads * queries * length * max(q_BNLK.element_size(), 4)
    for name in ("auto", *KERNELS):
        if name == "math" and scores > MATH_LIMIT:
            continue
        try:
            seconds[name] = min(_seconds(name, q_BNLK, k_BNSK, v_BNSK, mask_LS) for _ in range(REPEATS + 1))
        except RuntimeError as error:
            if name == "auto":
                raise
            log.debug("attention kernel %s is left out: %s", name, error)
    name = min(seconds, key=lambda name: seconds[name])
    dtype, masked = str(q_BNLK.dtype).removeprefix("torch."), "" if mask_LS is None else ", masked"
    shape = f"{queries} queries to {length} keys, {heads} heads of {width}, batch {batch}, {dtype}{masked}"
    times = ", ".join(f"{name} {1000 * duration:.2f} ms" for name, duration in seconds.items())
    log.info("attention of %s: %s (%s)", shape, name, times)
    return name


def _seconds(name: str, *tensors: Tensor | None) -> float:
    start = time.perf_counter()
    with warnings.catch_warnings():  # a kernel that refuses says at length why
        warnings.simplefilter("ignore")
        _by_kernel(name, *tensors)[0, 0, 0, 0].item()  # reading one number waits for the device, whichever it is
    return time.perf_counter() - start


def _by_kernel(name: str, *tensors: Tensor | None) -> Tensor:
    if name == "auto":
        return F.scaled_dot_product_attention(*tensors)  # type: ignore[arg-type]
    with sdpa_kernel(KERNELS[name]):
        return F.scaled_dot_product_attention(*tensors)  # type: ignore[arg-type]


def _is_refusal(error: RuntimeError) -> bool:
    return "No available kernel" in str(error) or "No viable backend" in str(error)


@contextmanager
def attention_kernel(name: str, measured: MeasuredKernels | None = None) -> Iterator[None]:
    """Choose torch's kernel behind `attend` while the block runs; "auto" leaves the choice to torch.

    "measured" times the kernels that serve a shape when it first comes up and takes the fastest from then on, outside
    compiled code and without gradient; `measured` keeps these choices from one block to the next. Raises ValueError
    for an unknown name, or from the first call that the chosen kernel cannot serve.
    """
    if name not in ATTENTIONS:
        raise ValueError(f"attention {name!r} is unknown; use {', '.join(ATTENTIONS)}")
    token = _measured.set((measured or MeasuredKernels()) if name == "measured" else None)
    try:
        with nullcontext() if name not in KERNELS else sdpa_kernel(KERNELS[name]):
            yield
    except RuntimeError as error:
        if not _is_refusal(error):
            raise
        raise ValueError(f"attention {name!r} does not run on this device in this type; use auto") from error
    finally:
        _measured.reset(token)


# ComfyUI's function in the place of ours.

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
# A context variable and no argument, since it has to reach attention through modules that know nothing of it.
_replacement: ContextVar[Attend | None] = ContextVar("replacement", default=None)


@contextmanager
def attention_by(function: Attend) -> Iterator[None]:
    """Let a function take the place of `attend`, with its arguments, while the block runs; not in compiled code."""
    token = _replacement.set(function)
    try:
        yield
    finally:
        _replacement.reset(token)
