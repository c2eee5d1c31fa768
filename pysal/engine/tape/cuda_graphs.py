"""Passes that come again with the same shape, replayed as CUDA graphs: the GPU gets them whole, not one kernel at a time.

A recorded pass is some hundred small kernels, which Python launches slower than a GPU runs them on few images. A graph holds
the launches and the memory they write to, so what a replay returns is copied before the next one.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from pysal._checks import first_line
from pysal.engine.graph.distance import distance
from pysal.engine.model.relu_rules import ReluRule
from pysal.engine.running.chunks import give_back_when_full, is_out_of_memory
from pysal.engine.tape.tape import Place, Program, Tape

T = TypeVar("T")
Capture = Callable[[Callable[[], T]], tuple[T, Callable[[], None]]]
"""Runs a function; returns what it returned, and what fills the tensors of that anew from the function's inputs."""

# Graphs keep the memory of a whole pass for themselves: a method has one shape, and one more for its last chunk. The one that
# was not used for longest makes room for another; of sweeps from one pass, later ones run as they are.
MOST_SHAPES, MOST_SWEEPS = 8, 8
# Shapes that came once are remembered; the oldest is forgotten.
MOST_SEEN = 64
# Passes that run as they are after memory ran out, before a graph is recorded again: what took the memory may be gone by then.
PASSES_BEFORE_ANOTHER_TRY = 64
# A replay runs the kernels it was recorded from. Adding in another order, in bf16 too, moves a result by less than this; one
# that left a tensor unwritten moves it by its own size.
AGREEMENT = 3e-2
# torch allows one capture at a time in a process.
_capturing = threading.Lock()


class Pool:
    """The memory that the graphs of one model share: one shape's lies where another's lay between passes.

    What a graph keeps for its owner is its own. The rest another may write to, so they must not be played at once.
    """

    def __init__(self) -> None:
        self._handle: Any = None
        self._streams: dict[int, torch.cuda.Stream] = {}  # by the device

    def renew(self) -> None:
        """Begin anew once no graph is left: torch frees the memory of a pool that none uses, and does not take it up again."""
        self._handle = None

    def capture(self, function: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        """Record a function as a CUDA graph on the current device; see `Capture`."""
        current = torch.cuda.current_stream()
        device = torch.cuda.current_device()
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        # torch's own stream for captures is of the device that captured first: what runs on another is not in the graph
        side = self._streams[device]
        # a capture that fails leaves its stream as the current one: the outer context puts the caller's back
        with _capturing, torch.cuda.stream(current):
            side.wait_stream(current)
            with torch.cuda.stream(side):
                function()  # what is made at a kernel's first launch, handles and plans, must not be made inside a graph
            current.wait_stream(side)
            if self._handle is None:
                self._handle = torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            # what other threads allocate meanwhile is none of the graph's business, nor may it end it
            with torch.cuda.graph(graph, pool=self._handle, stream=side, capture_error_mode="thread_local"):
                found = function()
        return found, graph.replay


class Replays:
    """The graphs of a program.

    A shape is captured when it comes for the second time, also if others came in between. Where that fails, or a replay does
    not give what the program gives, every pass runs as it is from then on; where memory ran out, for some passes.

    Attributes:
        program: what is recorded.
        refused: why passes are not replayed, None while they are.
    """

    def __init__(self, program: Program, capture: Capture[Any] | None = None) -> None:
        self._pool = Pool()
        self.program, self.capture = program, capture or self._pool.capture
        self._seen: dict[Any, None] = {}
        self._held: dict[Any, _Replay] = {}  # the one that was used last at the end
        self._one_at_a_time = threading.Lock()
        self._last: torch.cuda.Stream | None = None
        self._postponed = 0  # passes before the next capture
        self.refused: str | None = None
        give_back_when_full(self)

    @contextlib.contextmanager
    def recording(self, images: Tensor, layers: Sequence[Place] = ()) -> Iterator[Tape]:
        """Record a pass as `Program.record` does, or replay one; its tape ends with the context.

        Whoever comes meanwhile gets the program's own.
        """
        if not self._one_at_a_time.acquire(blocking=False):
            yield self.program.record(images, layers)
            return
        device = torch.cuda.device(images.device) if images.is_cuda else contextlib.nullcontext()
        try:
            with device:  # which captures work on, whatever the caller's current one
                self._take_turn(images)
                yield self._record(images, layers)
        finally:
            self._one_at_a_time.release()

    def _take_turn(self, images: Tensor) -> None:
        """Wait, on the GPU, for what another stream has played: graphs share memory."""
        if images.is_cuda:
            stream = torch.cuda.current_stream(images.device)
            if self._last not in (None, stream) and self._held:
                stream.wait_stream(self._last)
            self._last = stream

    def _record(self, images: Tensor, layers: Sequence[Place]) -> Tape:
        stream = torch.cuda.current_stream(images.device) if images.is_cuda else None
        case = (images.shape, images.stride(), images.dtype, images.device, tuple(layers), stream)
        if self.refused is not None:
            return self.program.record(images, layers)
        postponed = self._postponed > 0
        self._postponed -= postponed
        if case in self._held:
            replay = self._held[case] = self._held.pop(case)
            return replay.record(images)
        tape = self.program.record(images, layers)
        if postponed:
            return tape
        if case not in self._seen:
            self._seen[case] = None
            if len(self._seen) > MOST_SEEN:
                del self._seen[next(iter(self._seen))]
            return tape
        del self._seen[case]
        if len(self._held) == MOST_SHAPES:
            del self._held[next(iter(self._held))]
        if not self._held:
            self._pool.renew()
        try:
            replay = _Replay(self, images, layers)
            difference = distance(replay.record(images).output, tape.output)
        except Exception as error:  # whatever a graph cannot hold
            self._seen[case] = None
            self._failed(error)
        else:
            if difference <= AGREEMENT:
                self._held[case] = replay
            else:
                self.refuse(f"a replay was {difference:.1e} away from the pass")
        return tape

    def _failed(self, error: Exception) -> None:
        if is_out_of_memory(error):
            self._postponed = PASSES_BEFORE_ANOTHER_TRY
        else:
            self.refuse(error)

    def give_back(self) -> None:
        """Give the memory of the graphs back, unless they are in use; they are recorded again, but not at once."""
        if self._one_at_a_time.acquire(blocking=False):
            try:
                self._held.clear()
                self._postponed = PASSES_BEFORE_ANOTHER_TRY
            finally:
                self._one_at_a_time.release()

    def clear(self) -> None:
        """Forget every shape, and what was refused, and give the memory of the graphs back."""
        self.refused = None
        self._postponed = 0
        self._seen.clear()
        self._held.clear()

    def refuse(self, reason: object) -> None:
        """Replay nothing any more, and give the memory of the graphs back."""
        self.refused = first_line(reason)
        self._held.clear()


class _Replay:
    """A forward pass as a graph, and the sweeps that were made of it."""

    def __init__(self, owner: Replays, images: Tensor, layers: Sequence[Place]) -> None:
        self.owner = owner
        self._images = torch.empty_like(images).copy_(images)
        self.tape, self._run = owner.capture(lambda: owner.program.record(self._images, layers))
        self._sweeps: dict[Any, tuple[Tensor, Any, Callable[[], None]]] = {}

    def record(self, images: Tensor) -> Tape:
        self._images.copy_(images)
        self._run()
        return _ReplayedTape(self)

    def sweep(self, grad: Tensor, rule: ReluRule, layers: Sequence[Place], to_input: bool) -> Any:
        case = (grad.shape, grad.dtype, rule, tuple(layers), to_input)
        if case not in self._sweeps:
            expected = self.tape.sweep(grad, rule, layers=layers, to_input=to_input)
            if self.owner.refused is None and not self.owner._postponed and len(self._sweeps) < MOST_SWEEPS:
                held = grad.clone(memory_format=torch.contiguous_format)
                try:
                    found, run = self.owner.capture(lambda: self.tape.sweep(held, rule, layers=layers, to_input=to_input))
                    run()
                    differences = list(map(distance, _tensors(found), _tensors(expected)))
                except Exception as error:  # whatever a graph cannot hold
                    self.owner._failed(error)
                else:
                    self._sweeps[case] = held, found, run
                    if not all(difference <= AGREEMENT for difference in differences):
                        self.owner.refuse(f"a replayed sweep was {max(differences):.1e} away from the sweep")
            return expected
        held, found, run = self._sweeps[case]
        held.copy_(grad)
        run()
        result, values = found
        copied = {place: None if value is None else value.clone() for place, value in values.items()}
        return None if result is None else result.clone(), copied


class _ReplayedTape(Tape):
    """The tape of a replayed pass, until the next one."""

    def __init__(self, replay: _Replay) -> None:
        tape = replay.tape
        values = {place: value.clone() for place, value in tape.values.items()}
        super().__init__(tape.program, tape._saved, tape.output.clone(), values, tape.dtype)
        self._replay = replay

    def sweep(
        self, grad: Tensor, rule: ReluRule = "plain", *, layers: Sequence[Place] = (), to_input: bool = True
    ) -> tuple[Tensor | None, dict[Place, Tensor | None]]:
        found: tuple[Tensor | None, dict[Place, Tensor | None]] = self._replay.sweep(grad, rule, layers, to_input)
        return found


def _tensors(found: tuple[Tensor | None, dict[Place, Tensor | None]]) -> list[Tensor]:
    return [value for value in (found[0], *found[1].values()) if value is not None]
