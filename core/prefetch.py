"""Reading ahead in threads. (Processes would have to import this pack by name, which ComfyUI's loader does not allow.)"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def prefetched(source: Iterable[T], depth: int = 2) -> Iterator[T]:
    """The items of `source` in its order, made up to `depth` ahead of their use; its exceptions are raised here."""
    return parallel([source], workers=1, limit=depth + 1, cost=lambda _: 1)


def parallel(sources: Iterable[Iterable[T]], workers: int, limit: int, cost: Callable[[T], int]) -> Iterator[T]:
    """The items of all `sources`, each source read by one of `workers` threads, in the order in which they come.

    Items that wait, and the one in use, together cost at most `limit` (one that costs more is let through alone). The
    first exception of a source is raised here, after the items that came before it.
    """
    changed = threading.Condition()
    waiting: deque[tuple[T, int]] = deque()
    todo = iter(sources)
    held, running, closed = 0, workers, False
    failures: list[BaseException] = []

    def put(item: T) -> None:
        nonlocal held
        price = cost(item)
        with changed:
            changed.wait_for(lambda: closed or not held or held + price <= limit)
            waiting.append((item, price))
            held += price
            changed.notify_all()

    def work() -> None:
        nonlocal running
        try:
            while not (closed or failures):
                with changed:
                    source = next(todo, None)
                if source is None:
                    return
                for item in source:
                    put(item)
                    del item  # the next one is made before it is assigned
                    if closed:
                        return
        except BaseException as error:
            failures.append(error)
        finally:
            with changed:
                running -= 1
                changed.notify_all()

    threads = [threading.Thread(target=work, daemon=True, name="videolora-prefetch") for _ in range(workers)]
    for thread in threads:
        thread.start()
    try:
        while True:
            with changed:
                changed.wait_for(lambda: waiting or not running or failures)
                if not waiting:
                    if failures:
                        raise failures[0]
                    return
                item, price = waiting.popleft()
            yield item
            del item
            with changed:
                held -= price
                changed.notify_all()
    finally:
        with changed:
            closed = True
            changed.notify_all()
        for thread in threads:
            thread.join()
