"""A consumer beside its producer: it gets all there is, and an error of either ends both and is told once."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from selfforcing_core.generate.beside import WAITING, consume_beside


def test_all_items_arrive_in_order_in_another_thread() -> None:
    items: list[int] = []
    threads: set[str] = set()

    def consume(received: Iterator[int]) -> None:
        for item in received:
            items.append(item)
            threads.add(threading.current_thread().name)

    consume_beside(consume, iter(range(50)))
    assert items == list(range(50))
    assert threads == {"consumer"}


def test_no_more_than_the_bound_is_made_ahead() -> None:
    result, ahead = [], []

    def produce() -> Iterator[int]:
        for item in range(12):
            result.append(item)
            yield item

    def consume(received: Iterator[int]) -> None:
        for item in received:
            time.sleep(0.01)
            ahead.append(len(result) - 1 - item)

    consume_beside(consume, produce())
    assert len(ahead) == 12
    # those that wait, and the one that its maker holds until there is room
    assert max(ahead) <= WAITING + 1


def test_making_goes_on_while_an_item_is_consumed() -> None:
    is_second_made = threading.Event()

    def produce() -> Iterator[int]:
        yield 0
        is_second_made.set()
        yield 1

    def consume(received: Iterator[int]) -> None:
        for _ in received:
            assert is_second_made.wait(10), "nothing was made while the first item was consumed"

    consume_beside(consume, produce())


@pytest.mark.parametrize("failing_at", [0, 1, 7])
def test_an_error_of_the_consumer_stops_the_making_and_is_raised(failing_at: int) -> None:
    result = []

    def produce() -> Iterator[int]:
        for item in range(1000):
            result.append(item)
            yield item

    def consume(received: Iterator[int]) -> None:
        for item in received:
            if item == failing_at:
                raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        consume_beside(consume, produce())
    assert len(result) <= failing_at + WAITING + 3


@pytest.mark.parametrize("error", [ValueError("a chunk is NaN"), KeyboardInterrupt()])
def test_an_error_of_the_making_ends_the_consumer_by_an_error_too(error: BaseException) -> None:
    """What it writes must not look complete: it may not see an ordinary end."""
    ends = []

    def produce() -> Iterator[int]:
        yield 0
        raise error

    def consume(received: Iterator[int]) -> None:
        try:
            list(received)
            ends.append("complete")
        except BaseException:
            ends.append("given up")
            raise

    with pytest.raises(type(error)) as raised:
        consume_beside(consume, produce())
    assert raised.value is error
    assert ends == ["given up"]


def test_a_consumer_that_has_enough_ends_the_making() -> None:
    def produce() -> Iterator[int]:
        yield from range(10**9)

    def consume(received: Iterator[int]) -> None:
        next(received)

    consume_beside(consume, produce())
