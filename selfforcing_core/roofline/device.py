"""What a device can do: data sheets of known GPUs, and measured rates of the device that is here."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

MATMUL_SIZES = (2048, 8192)  # rows of the square product that measures a device: at first, and at most
COPY_BYTES = (2**26, 2**28)  # bytes of the copy that measures it, likewise
SMALL, SLOW = 256, 0.01  # a device is slow if a product of so many rows takes so many seconds
LONG = 1e-3  # seconds of work beside which its start, some microseconds, does not count
TOGETHER = 0.02  # seconds of calls between two looks at the clock


@dataclass(frozen=True)
class Card:
    """The rates of a device, and the shares of them that large products and long copies attain."""

    flops: float  # a second, of dense bfloat16 products accumulated in float32
    bandwidth: float  # bytes a second, read and written
    flops_share: float = 0.8
    bandwidth_share: float = 0.88

    @property
    def attainable(self) -> Card:
        """Return the same card at what it attains."""
        return Card(self.flops * self.flops_share, self.bandwidth * self.bandwidth_share, 1.0, 1.0)


# By the maker's data sheets, without sparsity, which doubles the numbers in their headlines.
CARDS = {
    "a100": Card(312e12, 2.04e12),
    "h100": Card(989e12, 3.35e12),
    "h200": Card(989e12, 4.8e12),
    "b200": Card(2250e12, 8.0e12),
    "gb200": Card(2500e12, 8.0e12),
    "gb300": Card(2500e12, 8.0e12),
    "rtx-4090": Card(165.2e12, 1.008e12),
    "rtx-5090": Card(209.5e12, 1.792e12),
}


def matmul_rate(device: torch.device, dtype: torch.dtype, *, seconds: float = 0.3) -> float:
    """Return the FLOP per second of a square product here, the median over about `seconds` after a warm-up."""

    def product(size: int) -> Callable[[], Tensor]:
        matrix = torch.randn(size, size, device=device).to(dtype)
        return lambda: torch.mm(matrix, matrix)

    # A CPU that emulates the number type would take minutes for the usual size.
    is_slow = _median_seconds(product(SMALL), 0) > SLOW
    size, duration = _grown(product, (SMALL, SMALL) if is_slow else MATMUL_SIZES, seconds)
    return 2 * size**3 / duration  # a multiplication and an addition for every term of every sum


def copy_rate(device: torch.device, *, seconds: float = 0.3) -> float:
    """Return the bytes read and written per second by a long copy on this device, measured likewise."""

    def copy(size: int) -> Callable[[], Tensor]:
        source = torch.zeros(size, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    size, duration = _grown(copy, COPY_BYTES, seconds)
    return 2 * size / duration  # each byte is read and written


def _grown(make: Callable[[int], Callable[[], Tensor]], sizes: tuple[int, int], seconds: float) -> tuple[int, float]:
    """Return the first size whose work keeps the device busy for LONG, or the largest, and the seconds that it takes.

    Smaller work is dominated by its start, or lies in a cache.
    """
    size, largest = sizes
    while size < largest and _median_seconds(make(size), 0) < LONG:
        size *= 2
    return size, _median_seconds(make(size), seconds)


def measured_card(device: torch.device, dtype: torch.dtype, *, seconds: float = 2.0) -> Card:
    """Return this device, measured by `seconds` of products and copies. Its shares are 1, since they are measured."""
    return Card(matmul_rate(device, dtype, seconds=seconds / 2), copy_rate(device, seconds=seconds / 2), 1.0, 1.0)


def _median_seconds(work: Callable[[], Tensor], seconds: float) -> float:
    def seconds_each(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            result = work()
        result.flatten()[0].item()  # reading a number waits for the device, whichever it is
        return (time.perf_counter() - start) / count

    seconds_each(1)  # the first call of a kernel loads it, or chooses one
    count = max(1, int(TOGETHER / seconds_each(1)))  # so many that launching and waiting do not count
    durations: list[float] = []
    start = time.perf_counter()
    while not durations or time.perf_counter() - start < seconds:
        durations.append(seconds_each(count))
    return statistics.median(durations)
