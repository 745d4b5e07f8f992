"""Work that goes on beside the rollout: a consumer in a thread of its own, fed through a bounded queue."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Generic, TypeVar

T = TypeVar("T")
WAITING = 2  # items made ahead of the consumer; more would only take memory, since the slower of the two sets the pace


class _Abandoned(Exception):
    """Raised in the consumer where no more items come because making them failed; never seen outside."""


class _End:
    """Stands behind the last item."""

    def __init__(self, *, is_whole: bool) -> None:
        self.is_whole = is_whole


class _Consumer(threading.Thread, Generic[T]):
    """A thread that consumes what is put into its queue; error: what ended it, if not the end of the items."""

    def __init__(self, consume: Callable[[Iterator[T]], None]) -> None:
        super().__init__(name="consumer", daemon=True)  # a process that is told to end does not wait for it
        self.consume, self.is_over = consume, False
        self.items: queue.Queue[T | _End] = queue.Queue(WAITING)
        self.error: BaseException | None = None

    def run(self) -> None:
        """Run the consumer; whatever ends it, nobody who puts something in waits for ever."""
        try:
            self.consume(self._received())
        except BaseException as error:  # of every kind: it is raised again where the items are made
            self.error = error
        finally:
            self.is_over = True
            with suppress(queue.Empty):  # whoever waits for room goes on, and then sees that it is over
                while True:
                    self.items.get_nowait()

    def put(self, item: T | _End) -> None:
        """Hand an item over, waiting for room; without effect where the consumer has ended."""
        if not self.is_over:
            self.items.put(item)

    def _received(self) -> Iterator[T]:
        while not isinstance(item := self.items.get(), _End):
            yield item
        if not item.is_whole:
            raise _Abandoned


def consume_beside(consume: Callable[[Iterator[T]], None], items: Iterator[T]) -> None:
    """Run `consume` on the items in another thread, while the next ones are made in this one.

    Returns when both have ended. An error of either ends the other and is raised here: inside `consume` as one from the
    iterator, so that it can leave nothing half-written.
    """
    consumer = _Consumer(consume)
    consumer.start()
    is_whole = False
    try:
        for item in items:
            consumer.put(item)
            if consumer.is_over:
                break
        else:
            is_whole = True
    finally:
        consumer.put(_End(is_whole=is_whole))
        consumer.join()
    if consumer.error is not None:
        raise consumer.error
