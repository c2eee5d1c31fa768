"""Interrupts the first calls of a process, which import what they need, and calls again. To be run as a script.

A process is forked for each, so that nothing but torch was imported before. The interrupt is a signal, as that of Ctrl-C: sent
when a profiler has been told of so many calls. Usage: first_calls.py TRIES SEED CALL ...
"""

import os
import random
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import nn

import pysal

layers = [nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3)]
model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).eval()
images = torch.rand(2, 3, 16, 16)

CALLS: dict[str, Callable[[], object]] = {
    "gradient": lambda: pysal.gradient(model, images, 1),
    "grad_cam": lambda: pysal.grad_cam(model, images, 1),
    "leave_one_out": lambda: pysal.leave_one_out(model, images, 1, segments=pysal.Slic(4)),
    "prepare": lambda: pysal.prepare(model, images),
    "explain": lambda: pysal.explain(model, images, 1, methods=["gradient"]).save(tempfile.mkdtemp()),
    "metrics": lambda: pysal.metrics.deletion(model, images, images.mean(1, keepdim=True), 1),
    "ops": lambda: __import__("pysal.ops.grad_cam"),
}


def interrupted(call: Callable[[], object], at: int) -> int:
    """Call once, with an interrupt at that place, and return how many places were passed."""
    passed = 0

    def note(_: FrameType, event: str, __: Any) -> None:
        nonlocal passed
        if event in ("call", "c_return"):
            passed += 1
            if passed == at:
                signal.raise_signal(signal.SIGINT)

    sys.setprofile(note)
    try:
        call()
    except KeyboardInterrupt:
        pass
    finally:
        sys.setprofile(None)
    return passed


def forked(call: Callable[[], object], at: int) -> str:
    """Interrupt a call in a process of its own; return what the next call came to, and how many places there were."""
    reading, writing = os.pipe()
    if not (process := os.fork()):
        try:
            passed = interrupted(call, at)
            call()
            said = f"right {passed}"
        except BaseException as error:
            said = f"{type(error).__name__}: {str(error)[:200]}"
        os.write(writing, said.encode())
        os._exit(0)
    os.close(writing)
    said = os.read(reading, 1000).decode()
    os.close(reading)
    os.waitpid(process, 0)
    return said


def main(tries: int, seed: int, *names: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    draw = random.Random(seed)
    for name in names:
        call = CALLS[name]
        said = forked(call, 0)
        print(f"{name}: {said}", flush=True)
        if not said.startswith("right "):
            continue
        for _ in range(tries):
            at = draw.randrange(1, int(said.split()[1]) + 1)
            print(f"{name}: {forked(call, at)}, at {at}", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
