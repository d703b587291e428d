"""Items made ahead of their use, in a thread."""

import queue
import threading
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")
_PATIENCE = 0.1  # seconds between two looks at whether the consumer has gone


@dataclass(frozen=True)
class _End:
    """The last thing in the queue: why the source ended."""

    error: BaseException | None


def prefetch(source: Iterator[T], depth: int = 2) -> Generator[T, None, None]:
    """The items of ``source`` in order, up to ``depth`` of them made ahead. Closing it ends the thread.

    Raises:
        Exception: whatever ``source`` raised, after the items before it.
    """
    ready: queue.Queue[T | _End] = queue.Queue(depth)
    gone = threading.Event()
    thread = threading.Thread(target=_fill, args=(source, ready, gone), name="prefetch", daemon=True)
    thread.start()
    try:
        while not isinstance(item := ready.get(), _End):
            yield item
        if item.error is not None:
            raise item.error
    finally:
        gone.set()
        thread.join()


def _fill(source: Iterator[T], ready: "queue.Queue[T | _End]", gone: threading.Event) -> None:
    try:
        for item in source:
            if not _put(item, ready, gone):
                return
        end = _End(None)
    except BaseException as error:  # raised again by the consumer, where somebody reads it
        end = _End(error)
    _put(end, ready, gone)


def _put(item: T | _End, ready: "queue.Queue[T | _End]", gone: threading.Event) -> bool:
    """Whether the item went in before the consumer went away."""
    while not gone.is_set():
        try:
            ready.put(item, timeout=_PATIENCE)
            return True
        except queue.Full:
            continue
    return False
