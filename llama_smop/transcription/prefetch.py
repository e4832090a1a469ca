"""Work ahead: threads make the items of several sources while the consumer is busy, within a bound on memory."""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence


class Stopped(BaseException):
    """Raised in a source whose consumer has gone. Not an Exception, so that no source takes it for a bad file."""


class Ahead:
    """The items of each source in turn, made ahead.

    Iterate over it inside `with`: it yields an iterator for every source, in order, to be read to its end. A source's
    exception is raised by its iterator. When the block is left, by Ctrl-C too, the threads end at their next item or
    call of `check`.

    Args:
        sources: called in a thread, a source by one thread; they return their items.
        workers: sources that are under way at the same time.
        room: items that wait at most.
    """

    def __init__(self, sources: Sequence[Callable[[], Iterable]], workers: int, room: int):
        self._sources, self._room = sources, room
        self._waiting: list[deque] = [deque() for _ in sources]
        self._ended: list[bool | BaseException] = [False] * len(sources)
        self._begun = self._head = 0
        self._stop = False
        self._changed = threading.Condition()
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(min(workers, len(sources)))]

    def __enter__(self) -> "Ahead":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error) -> None:
        with self._changed:
            self._stop = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def __iter__(self) -> Iterator[Iterator]:
        for number in range(len(self._sources)):
            with self._changed:
                self._head = number
                self._changed.notify_all()
            yield self._items(number)

    def check(self) -> None:
        """For sources that are busy for long between two items. Raises Stopped."""
        if self._stop:
            raise Stopped

    def _items(self, number: int) -> Iterator:
        waiting = self._waiting[number]
        while True:
            with self._changed:
                self._changed.wait_for(lambda: waiting or self._ended[number])
                if not waiting:
                    break
                item = waiting.popleft()
                self._changed.notify_all()
            yield item
        ended = self._ended[number]
        if isinstance(ended, BaseException):
            raise ended

    def _work(self) -> None:
        while True:
            with self._changed:
                number = self._begun
                if self._stop or number == len(self._sources):
                    return
                self._begun += 1
            ended: bool | BaseException = True
            try:
                for item in self._sources[number]():
                    self._put(number, item)
            except Stopped:
                return
            except BaseException as error:
                ended = error
            with self._changed:
                self._ended[number] = ended
                self._changed.notify_all()

    def _put(self, number: int, item) -> None:
        waiting = self._waiting[number]
        with self._changed:
            # The source that is read may always go on: others that are full must not hold it up.
            self._changed.wait_for(
                lambda: (
                    self._stop or sum(map(len, self._waiting)) < self._room or (number == self._head and not waiting)
                )
            )
            self.check()
            waiting.append(item)
            self._changed.notify_all()
