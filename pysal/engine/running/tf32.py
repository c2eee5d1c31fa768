"""Whether CUDA may round float32 to TF32: settings of the whole process, which threads share and get back as they were.

torch has two generations of these settings, which read as errors where they contradict each other, and values that are
inherited: a convolution that nobody set follows `torch.backends.cudnn.fp32_precision`, and that
`torch.backends.fp32_precision`.
Written values are put back as written and inherited ones as inherited, so that what the caller sets later still reaches them.
"""

import contextlib
import functools
import threading

import torch

from pysal.engine.running.states import undo_later

_Setting = tuple[str, str]
_ALL: _Setting = ("cuda", "all")
_MATMUL: _Setting = ("cuda", "matmul")
_OPS: tuple[_Setting, ...] = (_MATMUL, ("cuda", "conv"), ("cuda", "rnn"))
_CPU_MATMUL: _Setting = ("mkldnn", "matmul")
KEPT = None
"""In the place of whether TF32 is allowed: as the caller has set it."""


def _read(setting: _Setting) -> str:
    return str(torch._C._get_fp32_precision_getter(*setting))


def _write(setting: _Setting, value: str) -> None:
    torch._C._set_fp32_precision_setter(*setting, value)


class _Changes:
    """What was changed, noted before it is: whatever happens in between, `undo` puts it back, as often as it is called."""

    def __init__(self) -> None:
        self._written: dict[_Setting, str] = {}  # values that were written where they are read
        self._inherited: dict[_Setting, str] = {}  # as they were read
        self._older: str | None = None

    def allow(self, allowed: bool) -> None:
        """Let CUDA use TF32 in products, convolutions and recurrent layers, or in none of them."""
        wanted = "tf32" if allowed else "ieee"
        older = _older_setting()
        before = {op: _read(op) for op in _OPS}
        if any((value == "tf32") != allowed for value in before.values()):
            self._inherited[_ALL] = _read(_ALL)
            _write(_ALL, wanted)
            for op, value in before.items():
                if _read(op) != wanted:  # it does not follow, so its value is its own
                    self._written[op] = value
                    _write(op, wanted)
        if older is not None and (older != "highest") != allowed:
            # a model, or its compiler, may read the older setting, which must not contradict the newer one
            self._older = older
            if _MATMUL not in self._written:
                self._inherited[_MATMUL] = before[_MATMUL]
            if not allowed:
                self._inherited[_CPU_MATMUL] = _read(_CPU_MATMUL)
            torch.backends.cuda.matmul.allow_tf32 = allowed
            if not allowed and _read(_CPU_MATMUL) in ("tf32", "bf16"):  # which the older setting wrote
                _write(_CPU_MATMUL, "ieee")

    def undo(self) -> None:
        if self._older == "medium":  # the other two say the same of TF32 as a flag does
            torch.set_float32_matmul_precision("medium")
        elif self._older is not None:
            torch.backends.cuda.matmul.allow_tf32 = self._older != "highest"
        for setting, value in self._inherited.items():
            _write(setting, "none")
            if _read(setting) != value:
                _write(setting, value)
        for setting, value in self._written.items():
            _write(setting, value)


def _older_setting() -> str | None:
    """Return torch's older setting of products, None where the newer one contradicts it."""
    with contextlib.suppress(RuntimeError):
        return torch.get_float32_matmul_precision()
    with contextlib.suppress(RuntimeError):  # what contradicts it may be set for the CPU alone
        return "high" if torch.backends.cuda.matmul.allow_tf32 else "highest"
    return None


class _Shared:
    """The settings among threads. Those that want the same run side by side; who wants another waits until they are through.

    A thread that waits holds nobody up, also where it had begun with other settings, and gets those back before it goes on.
    """

    def __init__(self) -> None:
        self._turn = threading.Condition(threading.Lock())
        self._wanted: dict[int, list[bool | None]] = {}  # by thread, the innermost last
        self._waiting: set[int] = set()
        self._now: bool | None = KEPT
        self._changes = _Changes()

    def depth(self) -> int:
        return len(self._wanted.get(threading.get_ident(), ()))

    def enter(self, allowed: bool | None) -> None:
        thread = threading.get_ident()
        with self._turn:
            self._wanted.setdefault(thread, []).append(allowed)
            self._take_turn(thread)

    def leave(self, depth: int) -> None:
        """Want what this thread wanted at that depth; nothing happens where it does already."""
        thread = threading.get_ident()
        with self._turn:
            wanted = self._wanted.get(thread, [])
            del wanted[depth:]
            if wanted:
                self._take_turn(thread)
            else:
                self._wanted.pop(thread, None)
                if not self._running(thread):
                    self._set(KEPT)
            self._turn.notify_all()

    def _running(self, thread: int) -> list[bool | None]:
        return [wanted[-1] for one, wanted in self._wanted.items() if one != thread and one not in self._waiting]

    def _take_turn(self, thread: int) -> None:
        allowed = self._wanted[thread][-1]
        self._waiting.add(thread)
        self._turn.notify_all()
        try:
            while any(other != allowed for other in self._running(thread)):
                self._turn.wait()
            self._set(allowed)
        finally:
            self._waiting.discard(thread)

    def _set(self, allowed: bool | None) -> None:
        if allowed is self._now:
            return
        self._changes.undo()
        self._now, self._changes = KEPT, _Changes()
        if allowed is not KEPT:
            self._now = allowed
            self._changes.allow(allowed)


_shared = _Shared()


def allow_tf32(allowed: bool | None) -> None:
    """Let CUDA use TF32 or not until the state is put back (engine/running/states.py); None: as the caller has set it."""
    undo_later(functools.partial(_shared.leave, _shared.depth()))
    _shared.enter(allowed)
