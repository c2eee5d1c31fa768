"""TF32 settings of the process: what a pass runs in, given back as they were, and shared by threads."""

import functools
import os
import sys
import threading
from collections.abc import Callable

import pytest
import torch

from pysal.captum import Saliency
from pysal.engine.running import tf32
from pysal.engine.running.precision import Arithmetic, precision_mode
from pysal.engine.running.states import restoring
from tests.methods.networks import images

CUDA = torch.device("cuda")
OPS = (("cuda", "matmul"), ("cuda", "conv"), ("cuda", "rnn"))
SETTINGS = (("generic", "all"), ("cuda", "all"), *OPS, ("mkldnn", "all"), ("mkldnn", "matmul"), ("mkldnn", "conv"))


def write(*setting: str) -> Callable[[], None]:
    return lambda: torch._C._set_fp32_precision_setter(*setting)


def older(module: object, value: bool) -> Callable[[], None]:
    return lambda: setattr(module, "allow_tf32", value)


STATES: dict[str, list[Callable[[], None]]] = {
    "nothing": [],
    "older, products": [older(torch.backends.cuda.matmul, True)],
    "older, no products": [older(torch.backends.cuda.matmul, False)],
    "older, no convolutions": [older(torch.backends.cudnn, False)],
    "older, convolutions": [older(torch.backends.cudnn, True)],
    "high": [lambda: torch.set_float32_matmul_precision("high")],
    "medium": [lambda: torch.set_float32_matmul_precision("medium")],
    "highest": [lambda: torch.set_float32_matmul_precision("highest")],
    "medium, the CPU's taken back": [
        lambda: torch.set_float32_matmul_precision("medium"),
        write("mkldnn", "matmul", "ieee"),
    ],
    "products": [write("cuda", "matmul", "tf32")],
    "no products": [write("cuda", "matmul", "ieee")],
    "convolutions": [write("cuda", "conv", "tf32")],
    "no convolutions": [write("cuda", "conv", "ieee")],
    "recurrent layers alone": [write("cuda", "conv", "ieee"), write("cuda", "rnn", "tf32")],
    "all of CUDA": [write("cuda", "all", "tf32")],
    "none of CUDA": [write("cuda", "all", "ieee")],
    "everything": [write("generic", "all", "tf32")],
    "nothing at all": [write("generic", "all", "ieee")],
    "bf16 everywhere": [write("generic", "all", "bf16")],
    "everything but products": [write("generic", "all", "tf32"), write("cuda", "matmul", "ieee")],
    "everything but CUDA": [write("generic", "all", "tf32"), write("cuda", "all", "ieee")],
    "older and newer": [lambda: torch.set_float32_matmul_precision("high"), write("cuda", "matmul", "ieee")],
}
# What a caller may set afterwards: who followed before must follow then.
LATER: list[Callable[[], None]] = [
    lambda: None,
    write("generic", "all", "ieee"),
    write("generic", "all", "tf32"),
    write("cuda", "all", "ieee"),
    write("cuda", "all", "tf32"),
]


def read() -> list[object]:
    found: list[object] = [torch._C._get_fp32_precision_getter(*setting) for setting in SETTINGS]
    for function in (
        torch.get_float32_matmul_precision,
        torch._C._get_cublas_allow_tf32,
        torch._C._get_cudnn_allow_tf32,
    ):
        try:
            found.append(function())
        except RuntimeError as error:
            found.append(str(error))
    return found


def now_and_later() -> list[list[object]]:
    found = []
    for change in LATER:
        change()
        found.append(read())
    return found


def in_child(check: Callable[[], None]) -> None:
    """Run a function in a copy of this process, whose settings are those of torch's start: some cannot be taken back."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            check()
        except BaseException as error:
            os.write(writing, repr(error).encode()[:4000])
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as stream:
        told = stream.read()
    os.waitpid(child, 0)
    assert not told, told


@restoring
def inside(precision: Arithmetic, look: Callable[[], None]) -> None:
    with precision_mode(precision, CUDA, backward=False):
        look()


def products_and_convolutions() -> list[bool]:
    return [torch._C._get_fp32_precision_getter(*op) == "tf32" for op in OPS]


def set_up(state: str) -> None:
    for change in STATES[state]:
        change()


@functools.cache
def undisturbed(state: str) -> list[list[object]]:
    """What a process says now and later of a state that nothing else is done to."""

    def without() -> None:
        set_up(state)
        os.write(told, repr(now_and_later()).encode())

    listening, told = os.pipe()
    in_child(without)
    os.close(told)
    with os.fdopen(listening) as stream:
        found: list[list[object]] = eval(stream.read())
    return found


@pytest.mark.parametrize("precision", ["float32", "tf32", "as set"])
@pytest.mark.parametrize("state", STATES)
def test_settings_are_used_and_given_back(state: str, precision: Arithmetic) -> None:
    expected = undisturbed(state)

    def check() -> None:
        set_up(state)
        mine = products_and_convolutions()
        before = read()

        def look() -> None:
            assert products_and_convolutions() == (mine if precision == "as set" else [precision == "tf32"] * 3)
            if isinstance(before[-2], bool):  # a compiler asks for it, which may not be refused for what was set here
                assert torch.backends.cuda.matmul.allow_tf32 == products_and_convolutions()[0]
            if isinstance(before[-2], bool) and before[-3] in ("high", "medium", "highest"):
                assert (torch.get_float32_matmul_precision() != "highest") == products_and_convolutions()[0]

        inside(precision, look)
        inside(precision, lambda: inside("float32", lambda: inside("tf32", lambda: None)))
        assert read() == before
        found = now_and_later()
        assert found == expected, f"{found}\n{expected}"

    in_child(check)


@pytest.mark.parametrize("state", STATES)
def test_an_interrupt_at_any_setting_leaves_nothing(state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write_as_before = tf32._write

    def check() -> None:
        for change in STATES[state]:
            change()
        before = read()
        for last in range(1, 20):
            calls = 0

            def interrupted(setting: tuple[str, str], value: str) -> None:
                nonlocal calls
                calls += 1
                if calls == last:  # noqa: B023, called in this round
                    raise KeyboardInterrupt
                write_as_before(setting, value)

            monkeypatch.setattr(tf32, "_write", interrupted)
            for precision in ("float32", "tf32"):
                calls = 0
                try:
                    inside(precision, lambda: None)
                except KeyboardInterrupt:
                    assert read() == before, (last, precision)

    in_child(check)


def test_threads_take_turns() -> None:
    wrong: list[object] = []
    done: list[int] = []

    def run(number: int) -> None:
        for turn in range(60):
            for precision in ("float32", "tf32") if (number + turn) % 2 else ("tf32", "float32"):
                expected = [precision == "tf32"] * 3

                def look(expected: list[bool] = expected) -> None:
                    for _ in range(5):
                        if products_and_convolutions() != expected:
                            wrong.append((number, expected))

                def nested(look: Callable[[], None] = look, expected: list[bool] = expected) -> None:
                    look()
                    inside("float32" if expected[0] else "tf32", lambda: look([not one for one in expected]))  # type: ignore[call-arg]
                    look()

                inside(precision, nested if turn % 3 == 0 else look)  # type: ignore[arg-type]
        done.append(number)

    def check() -> None:
        before, interval = read(), sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(600)
        sys.setswitchinterval(interval)
        assert sorted(done) == [0, 1, 2, 3], f"threads wait for each other: {done}"
        assert not wrong, wrong[:3]
        assert read() == before

    in_child(check)


def test_threads_of_one_arithmetic_run_side_by_side() -> None:
    def check() -> None:
        both = threading.Barrier(2, timeout=600)
        threads = [threading.Thread(target=inside, args=("float32", both.wait)) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not both.broken

    in_child(check)


def test_the_faces_keep_the_callers_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    apply = precision_mode.set
    monkeypatch.setattr(precision_mode, "set", lambda mode: (asked.append(mode.precision), apply(mode))[1])
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 2)).eval()
    Saliency(model).attribute(images(1, 3, 2, 2, dtype=torch.float32), target=0)
    assert set(asked) == {"as set"}
