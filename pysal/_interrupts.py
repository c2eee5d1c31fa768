"""Imports that Ctrl-C cannot cut in two.

Much is imported on first use: torch's ops are registered, sympy and scikit-image are loaded. An interrupt in the middle leaves
modules that are half there, and every later call of the process fails in them. So it waits the moment that the import takes.
"""

import importlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, ModuleType


@contextmanager
def held_back() -> Iterator[None]:
    """Keep signals whose handlers are written in Python, as that of Ctrl-C, until the block is over."""
    if threading.current_thread() is not threading.main_thread():  # the only one that they interrupt
        yield
        return
    handlers: dict[int, Callable[[int, FrameType | None], object]] = {}
    caught: list[tuple[int, FrameType | None]] = []
    over = False

    def note(number: int, frame: FrameType | None) -> None:
        if over:  # on the way out, one interrupt can keep the handler of another from being put back
            handlers[number](number, frame)
        else:
            caught.append((number, frame))

    try:
        for number in signal.valid_signals():
            handler = signal.getsignal(number)
            if callable(handler):
                handlers[number] = handler
                signal.signal(number, note)
        yield
    finally:
        over = True
        for known, handler in handlers.items():
            signal.signal(known, handler)
        for known, frame in caught:
            handlers[known](known, frame)


def import_whole(name: str) -> ModuleType:
    """Import a module, and keep interrupts until it is there."""
    module = sys.modules.get(name)
    if module is not None and not getattr(module.__spec__, "_initializing", False):
        return module
    with held_back():
        return importlib.import_module(name)
