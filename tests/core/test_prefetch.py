"""Reading ahead in threads."""

import threading
import time
from contextlib import closing

import pytest
from videolora.core.prefetch import parallel, prefetched


def test_items_come_in_the_order_of_one_source():
    assert list(prefetched(range(100))) == list(range(100))


def test_all_items_of_all_sources_come():
    sources = [range(start, start + 7) for start in range(0, 70, 7)]
    assert sorted(parallel(sources, workers=4, limit=5, cost=lambda _: 1)) == list(range(70))


def test_sources_are_read_at_the_same_time():
    meeting = threading.Barrier(3, timeout=20)

    def source():
        meeting.wait()
        yield 1

    assert list(parallel([source() for _ in range(3)], workers=3, limit=3, cost=lambda _: 1)) == [1, 1, 1]


@pytest.mark.parametrize("limit", [10, 25, 100])
def test_what_waits_and_what_is_in_use_never_costs_more_than_the_limit(limit):
    alive = most = 0
    lock = threading.Lock()

    def source(cost):
        nonlocal alive, most
        for _ in range(10):
            yield cost

    def price(cost):  # asked for when an item is about to be kept
        return cost

    items = parallel([source(cost) for cost in (3, 7, 10)], workers=3, limit=limit, cost=price)
    with closing(items):
        for taken in items:
            waiting = items.gi_frame.f_locals["waiting"]
            with lock:
                most = max(most, taken + sum(cost for _, cost in waiting))
            time.sleep(0.001)
    assert most <= limit


def test_an_item_that_costs_more_than_the_limit_comes_alone():
    items = parallel([[50], [50], [1]], workers=3, limit=10, cost=lambda item: item)
    seen = []
    for item in items:
        time.sleep(0.01)
        waiting = [cost for _, cost in items.gi_frame.f_locals["waiting"]]
        assert item + sum(waiting) <= 10 or not waiting
        seen.append(item)
    assert sorted(seen) == [1, 50, 50]


def test_an_exception_of_a_source_is_raised_after_what_came_before_it():
    def source():
        yield 1
        raise OSError("the disk is gone")

    items = prefetched(source())
    assert next(items) == 1
    with pytest.raises(OSError, match="the disk is gone"):
        next(items)


def test_stopping_early_ends_the_threads_and_closes_nothing_too_late():
    def endless():
        while True:
            yield 0

    before = threading.active_count()
    items = parallel([endless(), endless()], workers=2, limit=4, cost=lambda _: 1)
    assert next(items) == 0
    items.close()
    assert threading.active_count() == before
