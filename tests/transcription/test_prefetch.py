"""Work ahead: the order of the sources, the bound on what waits, errors in their place, and no thread left behind."""

import threading
import time

import pytest

from llama_smop.transcription.prefetch import Ahead


def collected(ahead: Ahead) -> list[list]:
    with ahead:
        return [list(items) for items in ahead]


@pytest.mark.parametrize("workers", [1, 3, 9])
@pytest.mark.parametrize("room", [1, 4, 100])
def test_items_come_in_the_order_of_their_sources(workers, room):
    sources = [lambda n=n: ((n, i) for i in range(n % 4)) for n in range(12)]
    assert collected(Ahead(sources, workers, room)) == [[(n, i) for i in range(n % 4)] for n in range(12)]


def test_what_waits_is_bounded():
    made, read, most = 0, 0, 0

    def source():
        nonlocal made, most
        for _ in range(30):
            made += 1
            most = max(most, made - read)
            yield made

    with Ahead([source, source, source], workers=3, room=5) as ahead:
        for items in ahead:
            for _ in items:
                time.sleep(0.001)
                read += 1
    assert read == 90
    assert most <= 5 + 1 + 3 + 1, "room, one more for the source that is read, one in each thread's hand, one in ours"


def test_an_error_is_raised_in_its_place():
    def bad():
        yield 1
        raise OSError("disk")

    with Ahead([lambda: iter([0]), bad, lambda: iter([2])], workers=3, room=9) as ahead:
        sources = iter(ahead)
        assert list(next(sources)) == [0]
        items = next(sources)
        assert next(items) == 1
        with pytest.raises(OSError, match="disk"):
            next(items)
        assert list(next(sources)) == [2]


def test_no_thread_outlives_the_block():
    def endless():
        while True:
            yield 0

    def busy():
        while True:
            ahead.check()
            time.sleep(0.001)
        yield

    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt), Ahead([endless, busy, endless], workers=3, room=2) as ahead:
        for items in ahead:
            next(items)
            raise KeyboardInterrupt
    assert threading.active_count() == before
