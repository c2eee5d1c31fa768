"""Who may use the machine next: one piece of work at a time, in turn between readers."""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager

from pysal.engine.running.chunks import Cancelled

KNOWN = 1000  # readers whose last turn is remembered


class Turns:
    """Lets one thread compute at a time and, between its pieces of work, whoever has waited since longest ago.

    What counts is the reader, not how often he asks: somebody with ten runs has one turn for every turn of somebody with one.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._busy = self._closed = False
        self._waiting: dict[int, Hashable] = {}  # ticket -> reader
        self._served: OrderedDict[Hashable, int] = OrderedDict()  # reader -> when his last turn began
        self._count = itertools.count(1)

    @contextmanager
    def taken(self, reader: Hashable, cancel: threading.Event | None = None) -> Iterator[Callable[[], None]]:
        """Wait for a turn and hold it; yields what lets others go first between two pieces of work.

        Args:
            reader: whose it is.
            cancel: ends the waiting when set.

        Raises:
            Cancelled: `cancel` was set, or the server is ending; also by what is yielded.
        """
        held = False

        def take() -> None:
            nonlocal held
            self._take(reader, cancel)
            held = True

        def pass_on() -> None:
            nonlocal held
            with self._changed:
                if not self._closed and set(self._waiting.values()) <= {reader}:
                    return
            self._give()
            held = False
            take()

        take()
        try:
            yield pass_on
        finally:
            if held:
                self._give()

    def close(self) -> None:
        """End all waiting, and all work after its present piece: the server is ending."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _take(self, reader: Hashable, cancel: threading.Event | None) -> None:
        with self._changed:
            ticket = next(self._count)
            self._waiting[ticket] = reader
            try:
                while True:
                    if self._closed or (cancel is not None and cancel.is_set()):
                        raise Cancelled("pysal demo: cancelled while it waited for its turn")
                    if not self._busy and self._next() == ticket:
                        break
                    self._changed.wait(0.1)  # an event that is set wakes nobody here
                self._busy = True
                self._served[reader] = next(self._count)
                self._served.move_to_end(reader)
                while len(self._served) > KNOWN:
                    self._served.popitem(last=False)
            finally:
                del self._waiting[ticket]
                self._changed.notify_all()

    def _give(self) -> None:
        with self._changed:
            self._busy = False
            self._changed.notify_all()

    def _next(self) -> int:
        """Return the ticket whose reader had his last turn longest ago, of equal ones the first."""
        return min(self._waiting, key=lambda ticket: (self._served.get(self._waiting[ticket], 0), ticket))
