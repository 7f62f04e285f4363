"""Reading ahead in a thread. (Processes would have to import this pack by name, which ComfyUI's loader does not allow.)"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
_END = object()


def prefetched(source: Iterable[T], depth: int = 2) -> Iterator[T]:
    """The items of `source`, made up to `depth` ahead of their use; its exceptions are raised here."""
    items: queue.Queue = queue.Queue(depth)
    closed = threading.Event()

    def fill() -> None:
        try:
            for item in source:
                if not _put(items, (item, None), closed):
                    return
            _put(items, (_END, None), closed)
        except BaseException as error:
            _put(items, (_END, error), closed)

    thread = threading.Thread(target=fill, daemon=True, name="videolora-prefetch")
    thread.start()
    try:
        while True:
            item, error = items.get()
            if error is not None:
                raise error
            if item is _END:
                return
            yield item
    finally:
        closed.set()
        thread.join()


def _put(items: queue.Queue, value: tuple, closed: threading.Event) -> bool:
    while not closed.is_set():
        try:
            items.put(value, timeout=0.1)
            return True
        except queue.Full:
            continue
    return False
