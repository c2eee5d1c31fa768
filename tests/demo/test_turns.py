"""Readers of the page share the machine: one piece of work at a time, in turn."""

import threading

import pytest

from pysal.demo.turns import Turns
from pysal.engine.running.chunks import Cancelled


class Line:
    """Threads that wait for a turn while somebody holds it, and the order in which they had theirs."""

    def __init__(self) -> None:
        self.turns, self.order, self._threads = Turns(), [], []

    def work(self, reader: str, pieces: int, cancel: threading.Event | None = None) -> None:
        try:
            with self.turns.taken(reader, cancel) as pass_on:
                self.order.append(reader)
                for _ in range(pieces - 1):
                    pass_on()
                    self.order.append(reader)
        except Cancelled:
            self.order.append(f"{reader} cancelled")

    def wait(self, reader: str, pieces: int, cancel: threading.Event | None = None) -> None:
        """Start a thread, and return once it stands in the line."""
        before = len(self.turns._waiting)
        self._threads.append(threading.Thread(target=self.work, args=(reader, pieces, cancel)))
        self._threads[-1].start()
        while len(self.turns._waiting) == before:
            threading.Event().wait(0.001)

    def end(self) -> list[str]:
        for thread in self._threads:
            thread.join(600)
        return self.order


def test_two_readers_take_turns_between_pieces() -> None:
    line = Line()
    with line.turns.taken("first"):
        line.wait("a", 3)
        line.wait("b", 3)
    assert line.end() == ["a", "b", "a", "b", "a", "b"]


def test_many_runs_of_one_reader_do_not_starve_another() -> None:
    line = Line()
    with line.turns.taken("first"):
        for _ in range(20):
            line.wait("many", 1)
        line.wait("one", 3)
    assert [place for place, reader in enumerate(line.end()) if reader == "one"] == [1, 3, 5]


def test_a_new_reader_comes_before_those_who_had_turns() -> None:
    line = Line()
    with line.turns.taken("old") as pass_on:
        line.wait("new", 1)
        pass_on()
        assert line.order == ["new"]


def test_alone_no_turn_is_passed_on() -> None:
    turns = Turns()
    with turns.taken("a") as pass_on:
        for _ in range(3):
            pass_on()
        assert turns._busy
    assert not turns._busy


def test_who_is_gone_leaves_the_line() -> None:
    line, gone = Line(), threading.Event()
    with line.turns.taken("first"):
        line.wait("a", 1, gone)
        line.wait("b", 1)
        gone.set()
    assert sorted(line.end()) == ["a cancelled", "b"]
    assert line.turns._waiting == {}


def test_the_end_of_the_server_ends_all_waiting_and_work() -> None:
    line = Line()
    with line.turns.taken("first") as pass_on:
        line.wait("a", 1)
        line.turns.close()
        with pytest.raises(Cancelled, match=r"^pysal demo: cancelled while it waited for its turn$"):
            pass_on()
    assert line.end() == ["a cancelled"]
    with pytest.raises(Cancelled), line.turns.taken("late"):
        raise AssertionError("never reached")


def test_a_piece_that_fails_gives_its_turn_back() -> None:
    turns = Turns()
    with pytest.raises(ValueError, match="broken"), turns.taken("a"):
        raise ValueError("broken")
    with turns.taken("b"):
        pass
