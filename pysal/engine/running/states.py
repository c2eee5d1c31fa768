"""What a call changes of its thread, put back however the call ends, also by an interrupt at any moment.

Python raises a KeyboardInterrupt, or an exception that another thread sends, wherever it begins a function or comes back from
one: so also on the first step into a context's `__exit__`, which then undoes nothing, and a context manager made of a generator
is finished later, whenever the traceback is let go. Here no state hangs on one call. What was is noted before anything changes,
and is put back by value; where an interrupt keeps that from being done, it is done again.
"""

import functools
import operator
import threading
from collections import deque
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, ParamSpec, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode, _get_current_function_mode_stack
from torch.utils import _python_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

P = ParamSpec("P")
R = TypeVar("R")

_AUTOCAST_DEVICES = ("cpu", "cuda")
# what torch notes beside the stack of dispatch modes, and what reads all of it
_DISPATCH_FLAGS = [
    name
    for name in (
        "_is_in_torch_dispatch_mode",
        "_is_in_non_infra_torch_dispatch_mode",
        "_is_in_any_mode_without_ignore_compile_internals",
    )
    if hasattr(_python_dispatch, name)
]
_flags = operator.attrgetter(*_DISPATCH_FLAGS, "__name__", "__name__")  # of two names or more it returns a tuple
_variables: list[ContextVar[Any]] = []


class _Undoings(threading.local):
    def __init__(self) -> None:
        self.held: list[Callable[[], object]] = []


_undoings = _Undoings()


def kept(variable: ContextVar[R]) -> ContextVar[R]:
    """Return a context variable, whose value is from now on a part of the state."""
    _variables.append(variable)
    return variable


def undo_later(undo: Callable[[], object]) -> None:
    """Have something called when the innermost state is put back. It may be called several times, and before what it undoes."""
    _undoings.held.append(undo)


class State:
    """The state of this thread, as it is when the object is made.

    It holds what autograd, autocast and TorchScript are set to, the modes of this package on torch's stacks, the number of
    threads, context variables that are `kept` and, on a GPU, the current device and stream.
    """

    def __init__(self) -> None:
        self._modes: list[Any] = []
        self._dispatch_modes = torch._C._len_torch_dispatch_stack()
        if self._dispatch_modes:
            _drop_dispatch_modes(lambda mode: not mode.open)  # which an earlier call could not take away
            self._dispatch_modes = torch._C._len_torch_dispatch_stack()
        self._undoings = len(_undoings.held)
        self._dispatch_flags = _flags(_python_dispatch)
        self._settings = _settings()
        self.grad = self._settings[0]
        self._values = [*map(ContextVar.get, _variables)]
        self._stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None
        if torch._C._len_torch_function_stack():
            self._modes = [mode for mode in _get_current_function_mode_stack() if not _is_over(mode)]
            self._put_back_modes()

    def restore(self) -> None:
        """Put the state back."""
        if len(_undoings.held) > self._undoings:
            for undo in reversed(_undoings.held[self._undoings :]):
                undo()
            del _undoings.held[self._undoings :]
        self._put_back_modes()
        now, then = _settings(), self._settings
        if now != then or self.grad != then[0]:  # which whoever holds the state may want to be another
            _set(now, (self.grad, *then[1:]))
        if not all(map(operator.is_, map(ContextVar.get, _variables), self._values)):
            for variable, value in zip(_variables, self._values, strict=True):
                if variable.get() is not value:
                    variable.set(value)
        if self._stream is not None and torch.cuda.current_stream() != self._stream:
            torch.cuda.set_stream(self._stream)

    def _put_back_modes(self) -> None:
        if torch._C._len_torch_function_stack():
            self._put_back_function_modes()
        if torch._C._len_torch_dispatch_stack() > self._dispatch_modes:
            _drop_dispatch_modes(lambda _: torch._C._len_torch_dispatch_stack() > self._dispatch_modes)
        if _flags(_python_dispatch) != self._dispatch_flags and torch._C._len_torch_dispatch_stack() == self._dispatch_modes:
            for name, value in zip(_DISPATCH_FLAGS, self._dispatch_flags, strict=False):
                if getattr(_python_dispatch, name) != value:
                    setattr(_python_dispatch, name, value)

    def _put_back_function_modes(self) -> None:
        modes = _get_current_function_mode_stack()
        right = [mode for mode in modes if mode in self._modes or not isinstance(mode, FunctionMode)]
        if len(right) < len(modes):
            for mode in modes:
                if mode not in right:
                    mode.open = False
            pops: list[Callable[[], object]] = [torch._C._pop_torch_function_stack] * len(modes)
            pushes = [functools.partial(torch._C._push_on_torch_function_stack, mode) for mode in right]
            steps: list[Callable[[], object]] = [*pops, *pushes]
            deque(map(operator.call, steps), maxlen=0)  # without a moment between: an interrupt must not lose others' modes


def _settings() -> tuple[Any, ...]:
    """Return what autograd, autocast and TorchScript are set to, and the number of threads."""
    return (
        torch.is_grad_enabled(),
        *map(torch.is_autocast_enabled, _AUTOCAST_DEVICES),
        *map(torch.get_autocast_dtype, _AUTOCAST_DEVICES),
        torch.is_autocast_cache_enabled(),
        _autocast_nesting(),
        torch._C._get_graph_executor_optimize(),
        torch.get_num_threads(),
    )


def _set(now: tuple[Any, ...], settings: tuple[Any, ...]) -> None:
    """Set what `_settings` returned then, where it is not so now."""
    for set_it, is_now, was in zip(_SETTERS, now, settings, strict=True):
        if is_now != was:
            set_it(was)


def _set_autocast_nesting(nesting: int) -> None:
    if nesting == 0:
        torch.clear_autocast_cache()
    while _autocast_nesting() > nesting:
        torch.autocast_decrement_nesting()
    while _autocast_nesting() < nesting:
        torch.autocast_increment_nesting()


# in the order of `_settings`
_SETTERS: tuple[Callable[[Any], object], ...] = (
    torch._C._set_grad_enabled,
    *(functools.partial(torch.set_autocast_enabled, kind) for kind in _AUTOCAST_DEVICES),
    *(functools.partial(torch.set_autocast_dtype, kind) for kind in _AUTOCAST_DEVICES),
    torch.set_autocast_cache_enabled,
    _set_autocast_nesting,
    torch._C._set_graph_executor_optimize,
    torch.set_num_threads,
)


def keep_random_numbers(*devices: torch.device) -> None:
    """Have torch's generators, of the CPU and of GPUs among some devices, be as they are when the state is put back."""
    undo_later(functools.partial(torch.set_rng_state, torch.get_rng_state()))
    for device in dict.fromkeys(devices):
        if device.type == "cuda":
            undo_later(functools.partial(torch.cuda.set_rng_state, torch.cuda.get_rng_state(device), device))


def restoring(function: Callable[P, R]) -> Callable[P, R]:
    """Return the function as one that leaves the state as it was."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        before = State()
        try:
            return function(*args, **kwargs)
        except BaseException as error:
            if not isinstance(error, Exception):
                late = _Late()  # noqa: F841, it is this frame that holds it
            raise
        finally:
            try:
                before.restore()
            except BaseException:
                before.restore()
                raise

    return run


class _Late:
    """Lies in the frame of a call that was interrupted.

    While torch runs some functions it has taken a mode from its stack, and where that is interrupted it puts the mode back when
    the frames of those functions are let go: just before this object.
    """

    def __del__(self) -> None:
        if any(map(_is_over, _get_current_function_mode_stack())):
            State()


class Restored:
    """A block that leaves the state as it was, unless it is interrupted: it belongs into a `restoring` function."""

    def __enter__(self) -> None:
        """Note the state."""
        self._before = State()

    def __exit__(self, *error: object) -> None:
        """Put it back."""
        self._before.restore()


_unwatched: ContextVar[bool] = kept(ContextVar("pysal_unwatched", default=False))


def without_hooks() -> None:
    """Have `Hooks` do nothing until the state is put back: the pass that they watch failed, and others ask why."""
    _unwatched.set(True)


def leave_inference_mode() -> None:
    """End torch.inference_mode, until the state is put back."""
    if torch.is_inference_mode_enabled():
        guards: list[Any] = []
        undo_later(lambda: [guard.__exit__(None, None, None) for guard in guards])
        guards.extend(map(torch._C._InferenceMode, (False,)))  # it holds from the moment it is made: no step may lie between


def outside_inference(make: Callable[[], R]) -> R:
    """Return what a function makes outside of torch.inference_mode, whose tensors could not be differentiated later."""
    return _left_inference(make) if torch.is_inference_mode_enabled() else make()


@restoring
def _left_inference(make: Callable[[], R]) -> R:
    leave_inference_mode()
    return make()


@restoring
def recorded(make: Callable[[], R]) -> R:
    """Return what a function makes with autograd recording it, whatever the caller has set."""
    leave_inference_mode()
    torch._C._set_grad_enabled(True)
    return make()


class FunctionMode(TorchFunctionMode):
    """A mode that does nothing once it is over, also where it could not be taken from torch's stack."""

    def __init__(self) -> None:
        super().__init__()
        self.open = True

    def __enter__(self) -> Self:
        """Put the mode on the stack, in a `restoring` function."""
        undo_later(functools.partial(setattr, self, "open", False))  # wherever the mode is by then
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: object) -> None:
        """Take the mode away, where an interrupt has not taken it from the stack before."""
        self.open = False
        if _get_current_function_mode() is self:
            super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function of torch as the mode has it."""
        return self.replaced(func, args, kwargs or {}) if self.open else func(*args, **(kwargs or {}))

    def replaced(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Return what the mode has in the place of `func(*args, **kwargs)`."""
        raise NotImplementedError


class DispatchMode(TorchDispatchMode):
    """A dispatch mode that does nothing once it is over."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.open = True

    def __enter__(self) -> Self:
        """Put the mode on the stack, in a `restoring` function."""
        undo_later(functools.partial(setattr, self, "open", False))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: object) -> None:
        """Take the mode away."""
        self.open = False
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator as the mode has it."""
        result = func(*args, **(kwargs or {}))
        if self.open:
            self.see(result)
        return result

    def see(self, result: Any) -> None:
        """Take notice of what an operator returned."""
        raise NotImplementedError


_OWN = "_of_pysal"


def is_own_hook(hook: object) -> bool:
    """Say whether a hook of a module is one of `Hooks`, and so gone after the call."""
    return getattr(hook, _OWN, False)


class Hooks:
    """Forward hooks and marks of one pass, for a `restoring` function: they are gone when the state is put back."""

    def __init__(self) -> None:
        self.open = True
        self._held: list[tuple[nn.Module, Callable[..., Any]]] = []
        self._marked: list[Tensor] = []
        undo_later(self.close)

    def add(self, module: nn.Module, function: Callable[..., Any], *, before: bool = False, named: bool = False) -> None:
        """Have `function` called after, or before, a module runs in this thread: others may run it at the same time.

        `named`: before it, it is also given the arguments by name, and returns both kinds or None.
        """
        thread = threading.get_ident()

        def hook(*args: Any) -> Any:
            return function(*args) if self.open and threading.get_ident() == thread and not _unwatched.get() else None

        setattr(hook, _OWN, True)
        self._held.append((module, hook))
        if before:
            module.register_forward_pre_hook(hook, with_kwargs=named)
        else:
            module.register_forward_hook(hook)

    def mark(self, tensor: Tensor) -> None:
        """Make a tensor require its gradient as long as the hooks are there."""
        self._marked.append(tensor)
        tensor.requires_grad_()

    def close(self) -> None:
        """Take the hooks and the marks away."""
        self.open = False
        while self._held:  # one is let go once it is gone: they hold this object, which would wait for the collector
            module, hook = self._held[-1]
            for hooks in (module._forward_hooks, module._forward_pre_hooks):
                for key in [key for key, one in hooks.items() if one is hook]:
                    hooks.pop(key, None)
                    module._forward_pre_hooks_with_kwargs.pop(key, None)
            self._held.pop()
        while self._marked:
            self._marked[-1].requires_grad_(False)
            self._marked.pop()


def _drop_dispatch_modes(unwanted: Callable[[DispatchMode], bool]) -> None:
    """Take modes of this package from the top of torch's stack."""
    while True:
        mode = _python_dispatch._get_current_dispatch_mode()
        if not isinstance(mode, DispatchMode) or not unwanted(mode):
            return
        mode.open = False
        _python_dispatch._pop_mode()


def _is_over(mode: Any) -> bool:
    return isinstance(mode, FunctionMode) and not mode.open


def _autocast_nesting() -> int:
    # in one step, between whose calls no interrupt comes: torch tells the depth only by changing it
    _, depth = map(operator.call, (torch.autocast_increment_nesting, torch.autocast_decrement_nesting))
    return depth
