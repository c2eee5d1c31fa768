"""What `pysal.prepare` returns: a snapshot of a model, and what was found out about it."""

import copy
import os
from collections.abc import Callable, Hashable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from pysal import _library
from pysal._checks import refuse
from pysal.engine.boxes.incremental import Incremental
from pysal.engine.graph.fused_convolution import WAYS
from pysal.engine.layers.default_layer import Choice
from pysal.engine.model.model_state import ModelState
from pysal.engine.model.training import check_eval
from pysal.engine.prepared.forwards import Forwards, is_transformed
from pysal.engine.prepared.gains import AS_IT_IS, Gains
from pysal.engine.prepared.record import Comparison, Record, fingerprint, processor, write
from pysal.engine.running.heap import FreedMemory
from pysal.engine.running.precision import Precision
from pysal.engine.tape.cuda_graphs import Replays
from pysal.engine.tape.tape import Program, Recorded

# Prepares a copy of a model, as what it is a copy of was: model, example, precision, rows, whether they were asked for, gains.
Again: TypeAlias = Callable[[nn.Module, Tensor, Precision, int | None, bool, Gains | None], "PreparedModel"]

# Whole images are painted and handed over, too: so much of what ONNX Runtime gains on passes is left of it.
WHOLE_IMAGES = 0.85


class PreparedModel:
    """What `prepare` returns. Call it, or pass it to any method in place of the model.

    Attributes:
        original: the model it was made from.
        precision: the arithmetic of its passes.
        rows: images per pass that were fastest when it was made.
        rows_asked: whether they were asked for, not measured.
        only_rows: images per pass of a model that takes no other number; None = any.
        program: records passes; None where the model's gradient is taken as it is.
        gains: how many times as fast as the model it is; None where there was nothing to measure.
        replays: replays them as CUDA graphs; None on a CPU.
        way: how its convolutions run on a GPU.
        reason: why it runs as it is, where no graph was found that computes the same; else None.
        comparison: what came of comparing the graph; None where there is none.
    """

    def __init__(self, original: nn.Module, example: Tensor, precision: Precision, again: Again) -> None:
        self.original, self.precision, self._again = original, precision, again
        self.rows: int | None = None
        self.rows_asked = False
        self.only_rows: int | None = None
        self._example = example
        self._kind = (tuple(example.shape[1:]), example.dtype, example.device)
        self._state: ModelState | None = None
        self._graph: nn.Module | None = None
        self.program: Program | None = None
        self.gains: Gains | None = None
        self.memory: FreedMemory | None = None  # which its passes need again
        self.replays: Replays | None = None
        self.way = WAYS[0]
        self.reason: str | None = None
        self.comparison: Comparison | None = None
        self.default_layer: Choice | None = None
        self._layers: dict[Hashable, Choice] = {}
        self._incremental: Incremental | None = None
        self._forwards: Forwards | None = None
        self._notes: dict[str, str] = {}  # of the report, by what they are about

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "original" not in self.__dict__:  # what copying and pickling ask for is not the model's
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.original, name)

    def __copy__(self) -> "PreparedModel":
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> "PreparedModel":
        _, (_, *rest) = self.__reduce__()
        return self._again(copy.deepcopy(self.original, memo), *rest)

    def __reduce__(self) -> tuple[Any, ...]:
        # weights that are arranged for this machine cannot be written down, and would be of no use on another one
        return self._again, (self.original, self._example, self.precision, self.rows, self.rows_asked, self.gains)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the model's output.

        Raises:
            ValueError: the original has changed since, see `check_unchanged`; writes past autograd are not looked for.
        """
        if len(args) != 1 or kwargs or not self.takes(args[0]):
            return self.original(*args, **kwargs)
        (images,) = args
        differentiated = images.requires_grad and torch.is_grad_enabled()
        runtime = None
        if self._forwards is not None and not differentiated:
            if self.gains is not None and self._forwards.due(self.gains):
                self.expect_forwards(len(images))
            runtime = self._forwards.runtime_for(images, unchanged=self._state is not None)
        if runtime is None and (self.program if differentiated else self._graph) is None:
            return self.original(images)
        if self._state is not None:
            self._check("pysal.PreparedModel", values=False)
        if runtime is not None:
            return runtime(images)
        if differentiated:
            return Recorded.apply(images, self.program)  # type: ignore[no-untyped-call]
        assert self._graph is not None
        return self._graph(images)

    def takes(self, images: object) -> bool:
        """Say whether there are images, of the shape, dtype and device of the example.

        Those that torch.func transforms, that carry a tangent or are traced are for the original, which torch can look into.
        """
        if not isinstance(images, Tensor) or not images.ndim or not len(images) or is_transformed(images):
            return False
        if self.only_rows not in (None, len(images)):
            return False
        return (tuple(images.shape[1:]), images.dtype, images.device) == self._kind

    def expect_forwards(self, images: int) -> None:
        """Say that so many images are about to be run without gradients; the methods say it themselves.

        Once all that was asked for makes up for exporting the model, and ONNX Runtime is installed, the model is exported to
        it, compared and measured. If that is faster, `report()` says so, and it runs these passes from then on, for as long as
        torch has the same number of threads. Only float32 on the CPU is run so.

        Args:
            images: how many, of the size of the example.
        """
        if self._forwards is None:
            return
        gains = self.gains or AS_IT_IS
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        found = self._forwards.expect(images, gains, self, layout)
        if found is not gains:
            self.gains = found
            if self.reason is None:
                self._notes["gains"] = found.report()
        if self.reason is not None and self._forwards.runs:
            self._notes["gains"] = f"forward {found.runtime:.1f} times as fast as the model, by ONNX Runtime"

    def settle(self, times: int) -> None:
        """Decide what runs passes without gradients if all that was asked for so far comes again, and keep to it from then on.

        Args:
            times: how often it comes.
        """
        if self._forwards is not None:
            self.expect_forwards(self._forwards.asked * times)
            self._forwards.measures = False

    @property
    def faster_whole(self) -> float:
        """How many times as fast passes of whole images are as the graph that leave-one-out runs in parts."""
        if self._forwards is None or self.gains is None or not self._forwards.runs:
            return 1.0
        return max(1.0, WHOLE_IMAGES * self.gains.runtime_over_own)

    def program_for(self, images: Tensor) -> Program | None:
        """Return what records the passes that are differentiated, for images like these; None where autograd does."""
        return self.program if self.takes(images) else None

    def rows_for(self, images: Tensor) -> int | None:
        """Return how many images of this size run in a pass, None where nobody has said or measured it."""
        return self.rows if self.rows_asked or tuple(images.shape[1:]) == self._kind[0] else None

    def default_layer_for(self, images: Tensor, classes: Hashable) -> Choice | None:
        """Return the layer Grad-CAM takes by default, None where it is to be looked for.

        Args:
            images: as they will be explained.
            classes: the kind of score and the classes of the first image, None where they are open or there are none.
        """
        shape = tuple(images.shape[1:])
        return (self.default_layer if shape == self._kind[0] else None) or self._layers.get((shape, classes))

    def remember_default_layer(self, images: Tensor, classes: Hashable, choice: Choice) -> None:
        """Note the layer that was found for the score of a class."""
        self._layers[tuple(images.shape[1:]), classes] = choice

    @property
    def channels_last(self) -> bool:
        """Whether images are best handed over channels_last: where none of its passes is the model's own."""
        return self._graph is not None and self.program is not None and self.way.channels_last

    @property
    def fused(self) -> bool:
        """Whether anything was gained: False where the model runs as it is."""
        return self._graph is not None or self.program is not None

    def incremental(self, images: Tensor) -> Incremental | None:
        """Return what recomputes only what a change inside a box reaches; None where model or images do not allow it."""
        engine = self._incremental
        if engine is None or not self.takes(images) or self.precision == "bf16":
            return None
        return engine if engine.takes(images) else None

    def __repr__(self) -> str:
        return self.report()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write what was found out about the model, for `pysal.load_prepared`: numbers and words, none of its weights.

        Args:
            path: of a file, which is written over.

        Raises:
            ValueError: the model has changed since it was prepared.
            OSError: the file cannot be written.
        """
        where = "pysal.PreparedModel.save"
        self.check_unchanged(where)
        write(where, path, self.record())

    def record(self) -> Record:
        """Return what `save` writes."""
        shape, dtype, device = self._kind
        return Record(
            torch=str(torch.__version__),
            pysal=_library.version(),
            processor=processor(device),
            precision=self.precision,
            shape=shape,
            dtype=str(dtype).removeprefix("torch."),
            weights=fingerprint(getattr(self.original, "_orig_mod", self.original)),
            rows=self.rows,
            rows_asked=self.rows_asked,
            reason=self.reason,
            gains=self.gains,
            comparison=self.comparison,
        )

    def report(self) -> str:
        """Return what was done to the model, and what was not, one line each."""
        notes = list(self._notes.values())
        if self.replays is not None:
            refused = self.replays.refused
            notes.append(
                "passes that come again with the same shape are replayed as CUDA graphs"
                if refused is None
                else f"no pass is replayed as a CUDA graph: {refused}"
            )
        return "\n".join(notes)

    def check_unchanged(self, where: str) -> None:
        """Refuse to go on if the original has changed since: its modules, hooks, attributes, classes, weights or buffers.

        Every tensor's place, autograd's count of its changes and 64 of its values, evenly spread, are compared: only a
        change of single values past autograd, through `.data`, may go unseen. A model that runs as it is may change.

        A part in training mode that computes something else there is refused, too.

        Raises:
            ValueError: names the first one that has.
        """
        self._check(where, values=True)

    def _check(self, where: str, *, values: bool) -> None:
        state = self._state
        if state is None:
            check_eval(where, self.original)
            if values and self._forwards is not None:  # a model that runs as it is may change, what was exported may not
                self._forwards.notice_changes(values=True)
            return
        if any(getattr(module, "training", False) for _, module in state.modules):
            check_eval(where, self.original)
        found = state.changed(values=values)
        if found is not None:
            kind, what = found
            refuse(where, "model", f"be prepared again after its {kind} have changed", what)
