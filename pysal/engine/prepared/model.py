"""A snapshot of a model that runs forward and input gradient as fast as this machine allows, and says what was done for it."""

import contextlib
import copy
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pysal._checks import FLOATING, check_tensor, first_line, refuse, refuse_unknown
from pysal.engine.boxes.clean import NotIncremental
from pysal.engine.boxes.incremental import Incremental
from pysal.engine.graph.fold import NotTraceable, fold_graph, trace
from pysal.engine.graph.fused_convolution import FusedConvolution
from pysal.engine.graph.lowered import lower
from pysal.engine.graph.same_function import TRACED, batches, run
from pysal.engine.graph.shapes import note_shapes
from pysal.engine.layers.default_layer import Choice, Look, default_layer
from pysal.engine.model.model_state import ModelState
from pysal.engine.model.training import training_part
from pysal.engine.prepared.exactness import (
    NOTHING_FUSED,
    RunsAsItIs,
    check_ordinary,
    compared,
    exact_pass,
    own_pass,
)
from pysal.engine.prepared.gains import GPU_TURNS, Budget, Gains, Way, least_seconds, pays, ratio
from pysal.engine.running.chunks import CPU_ROWS, fast_rows
from pysal.engine.running.precision import PRECISIONS, Precision, precision_mode
from pysal.engine.running.states import keep_random_numbers, leave_inference_mode, restoring
from pysal.engine.tape.cuda_graphs import Replays
from pysal.engine.tape.tape import Program, Recorded

# Images per pass that are tried out; the best is kept. More lose on a CPU, unless they are small.
CPU_CHUNKS = (1, 2, 4, 8)
GPU_CHUNKS = (8, 16, 32, 64, 128)
# Rounds in which each is tried on a CPU, as far as time allows.
TRIALS = 4


class PreparedModel:
    """What `prepare` returns. Call it, or pass it to any method in place of the model.

    Attributes:
        original: the model it was made from.
        precision: the arithmetic of its passes.
        rows: images per pass that were fastest when it was made.
        rows_asked: whether they were asked for, not measured.
        program: records passes; None where the model's gradient is taken as it is.
        gains: how many times as fast as the model it is; None where there was nothing to measure.
        replays: replays them as CUDA graphs; None on a CPU.
    """

    def __init__(self, original: nn.Module, example: Tensor, precision: Precision) -> None:
        self.original, self.precision = original, precision
        self.rows: int | None = None
        self.rows_asked = False
        self._example = example
        self._kind = (tuple(example.shape[1:]), example.dtype, example.device)
        self._state: ModelState | None = None
        self._graph: nn.Module | None = None
        self.program: Program | None = None
        self.gains: Gains | None = None
        self.replays: Replays | None = None
        self.default_layer: Choice | None = None
        self._layers: dict[Hashable, Choice] = {}
        self._incremental: Incremental | None = None
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
        return _again(copy.deepcopy(self.original, memo), *rest)

    def __reduce__(self) -> tuple[Any, ...]:
        # weights that are arranged for this machine cannot be written down, and would be of no use on another one
        return _again, (self.original, self._example, self.precision, self.rows, self.rows_asked, self.gains)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the model's output.

        Raises:
            ValueError: the original has changed since, see `check_unchanged`; writes past autograd are not looked for.
        """
        if len(args) != 1 or kwargs or not self._takes(args[0]):
            return self.original(*args, **kwargs)
        (images,) = args
        differentiated = images.requires_grad and torch.is_grad_enabled()
        if (self.program if differentiated else self._graph) is None:
            return self.original(images)
        self._check("pysal.PreparedModel", values=False)
        if differentiated:
            return Recorded.apply(images, self.program)  # type: ignore[no-untyped-call]
        assert self._graph is not None
        return self._graph(images)

    def _takes(self, images: object) -> bool:
        """Say whether there are images, of the shape, dtype and device of the example."""
        if not isinstance(images, Tensor) or not images.ndim or not len(images):
            return False
        return (tuple(images.shape[1:]), images.dtype, images.device) == self._kind

    def program_for(self, images: Tensor) -> Program | None:
        """Return what records the passes that are differentiated, for images like these; None where autograd does."""
        return self.program if self._takes(images) else None

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
        return self._graph is not None and self.program is not None

    @property
    def fused(self) -> bool:
        """Whether anything was gained: False where the model runs as it is."""
        return self._graph is not None or self.program is not None

    def incremental(self, images: Tensor) -> Incremental | None:
        """Return what recomputes only what a change inside a box reaches; None where model or images do not allow it."""
        engine = self._incremental
        if engine is None or not self._takes(images) or self.precision == "bf16":
            return None
        return engine if engine.takes(images) else None

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
            return
        if any(getattr(module, "training", False) for _, module in state.modules):
            check_eval(where, self.original)
        found = state.changed(values=values)
        if found is not None:
            kind, what = found
            refuse(where, "model", f"be prepared again after its {kind} have changed", what)


def _again(
    original: nn.Module, example: Tensor, precision: Precision, rows: int | None, asked: bool, gains: Gains | None
) -> PreparedModel:
    """Prepare a copy of a model, as what it is a copy of was."""
    prepared = prepare(original, example, precision=precision, batch_size=rows, gains=gains)
    prepared.rows_asked = asked
    return prepared


@restoring
def prepare(
    model: nn.Module,
    example: Tensor,
    *,
    precision: Precision = "float32",
    batch_size: int | None = None,
    gains: Gains | None = None,
) -> PreparedModel:
    """Return a snapshot of a model for the methods to run on: the same function in less time.

    The snapshot folds batch norm and padding into convolutions, runs convolution, shortcut and ReLU in one pass, and computes
    only the input's gradient, for which it keeps one bit per ReLU element. It is used only if its output and gradient are the
    model's, on the example and on noise, in float64, and only for what it is measured to be faster at: gradients, forward
    passes or both. Every other model runs as it is, and `report()` says why. On a CPU all of this takes as long as some 30
    to 50 gradients of the model.

    The model itself is not changed. If it changes later, in its weights, modules, hooks or attributes, the snapshot is refused.
    A copy or a pickle of the snapshot is prepared again.

    Args:
        model: an nn.Module in eval mode. Of one that torch.compile returned, what it was made from is prepared.
        example: (B, C, H, W), one or more images like those the methods will get. Images of another size run the original
            model.
        precision: arithmetic of the passes: "float32", "tf32", "bf16", or "mixed", which is a float32 forward pass (TF32 on a
            GPU), so that ReLUs switch where they should, and a bf16 backward pass.
        batch_size: images per pass; None = try some numbers on this machine and take the fastest.
        gains: what was measured of this model before, the attribute `gains` of what `prepare` returned: then nothing is
            measured, and the snapshot is used for the same as then. Of several processes, all compute the same bits if they
            also share `batch_size`. None = measure.

    Raises:
        TypeError: the model is not an nn.Module, `gains` is not of that class, or the example has the wrong type or another
            dtype than the model.
        ValueError: the model is in training mode, the example has a wrong shape or is on another device, or the precision is
            unknown.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU()).eval()
        >>> fast, images = prepare(model, torch.rand(1, 3, 16, 16), batch_size=4), torch.rand(2, 3, 16, 16)
        >>> bool((fast(images) - model(images)).abs().max() < 1e-5)
        True
    """
    where = "pysal.prepare"
    if not isinstance(model, nn.Module):
        refuse(where, "model", "be an nn.Module", type(model).__name__, TypeError)
    check_eval(where, model)
    check_tensor(where, "example", example, ndim=4, dtypes=FLOATING)
    if example.numel() == 0:
        refuse(where, "example", "hold at least one image", f"shape {tuple(example.shape)}")
    if example.shape[2] * example.shape[3] < 2:
        refuse(where, "example", "be images of more than one pixel", f"shape {tuple(example.shape)}")
    check_fits(where, model, "example", example)
    if precision not in PRECISIONS:
        refuse_unknown(where, "precision", f"be one of {', '.join(map(repr, PRECISIONS))}", precision, PRECISIONS)
    if gains is not None and not isinstance(gains, Gains):
        refuse(where, "gains", "be the `gains` of a prepared model or None", repr(gains), TypeError)
    leave_inference_mode()  # whose tensors could not be differentiated later
    keep_random_numbers(example.device)
    given, model = model, getattr(model, "_orig_mod", model)  # of torch.compile, whose graphs cannot be taken apart
    with torch.enable_grad():
        budget = Budget(example.device)
        example = example[:1].detach().clone()
        prepared = PreparedModel(model, example, precision)
        try:
            # compared in full float32: TF32, which torch allows cuDNN, would be further away than a wrong graph may be
            with precision_mode("float32", example.device, backward=False):
                _build(prepared, example)
            _keep_what_gains(prepared, gains or _gains(prepared, example, budget))
        except Exception as error:  # of the model's own code, or of an op, that meets what its author did not foresee
            reason = str(error) if isinstance(error, RunsAsItIs) else first_line(error)
            prepared = PreparedModel(model, example, precision)
            prepared._notes["as it is"] = f"runs as it is: {reason}"
        if given is not model:
            if prepared.fused or prepared._incremental is not None:
                prepared._notes["compiled"] = "made from what torch.compile was given, which also runs what this does not"
            else:
                prepared.original = given
        fixed = getattr(model, "rows_per_pass", None)  # of a model that takes so many rows at a time
        prepared.rows = fixed or batch_size or _fastest_rows(prepared, example, budget)
        prepared.rows_asked = bool(fixed or batch_size)
    if prepared.rows is not None:
        prepared._notes["rows"] = f"{prepared.rows} images per pass" + ("" if batch_size else " were fastest")
    return prepared


def check_eval(where: str, model: nn.Module) -> None:
    """Refuse a model of which a part computes something else because it is in training mode.

    Raises:
        ValueError: names the part.
    """
    found = training_part(model)
    if found is not None:
        name, module = found
        part = f"module {name!r} ({type(module).__name__})" if name else type(module).__name__
        raise ValueError(f"{where}: model must be in eval mode, got {part} in training mode: call model.eval() first")


def check_fits(where: str, model: nn.Module, argument: str, images: Tensor) -> None:
    """Refuse images that are not on the device of a model's weights or not of their dtype.

    Raises:
        TypeError: another dtype.
        ValueError: another device.
    """
    parameter = next((one for one in model.parameters() if one.dtype.is_floating_point), None)
    if parameter is None:
        return
    if parameter.device != images.device:
        refuse(where, argument, f"be on the model's device {parameter.device}", images.device)
    if parameter.dtype != images.dtype:
        names = [str(dtype).removeprefix("torch.") for dtype in (parameter.dtype, images.dtype)]
        refuse(where, argument, f"have the model's dtype {names[0]}", names[1], TypeError)


def _build(prepared: PreparedModel, example: Tensor) -> None:
    """Trace, fold and lower the model, and keep the result if it computes the same.

    Raises:
        Exception: anything; the model runs as it is then.
    """
    model, notes = prepared.original, prepared._notes
    check_ordinary(model)
    rows = getattr(model, "rows_per_pass", None)
    images = list(batches(example, rows))
    own = [own_pass(model, images[0])]
    try:
        traced, written = trace(model)
    except NotTraceable as reason:
        raise RunsAsItIs(str(reason)) from reason
    own += [own_pass(model, batch, without_gradients=False) for batch in images[1:]]
    for batch, expected in zip(images, own, strict=True):
        # what is the same for all images shows in the shapes of the last batch
        output, gradient = run(note_shapes(traced).run if batch is images[-1] else traced, batch).apart(expected)
        if not max(output, gradient) <= TRACED[example.dtype]:
            what = "output" if output > TRACED[example.dtype] else "gradient"
            raise RunsAsItIs(
                f"its traced graph's {what} is {max(output, gradient):.1e} away from its own: it "
                "decides something anew in every pass, or acts on gradients where tracing does not see it"
            )
    mixed = prepared.precision == "mixed"
    exact = exact_pass(traced, images[0], example)
    graph = fold_graph(traced)
    lowered = lower(graph, example, torch.bfloat16 if mixed else example.dtype)
    if not lowered:
        raise RunsAsItIs(NOTHING_FUSED)
    program = Program(graph, torch.bfloat16 if mixed else None)
    difference, gradient_difference = compared(graph, program, images, own, exact)
    state = ModelState(model, written)
    state.remember_values()
    prepared._state, prepared._graph, prepared.program = state, graph, program
    prepared.replays = Replays(program) if example.is_cuda else None
    prepared.default_layer = _default_layer(model, example)
    fused = [module for module in graph.modules() if isinstance(module, FusedConvolution)]
    matrix = sum(module.matrix is not None for module in fused)
    onednn = sum(module.onednn and module.matrix is None for module in fused)
    word = "convolution runs" if lowered == 1 else "convolutions run"
    notes["convolutions"] = f"{lowered} {word} fused, with batch norm, padding, shortcut and ReLU where they follow"
    if onednn:
        notes["onednn"] = f"{onednn} of them through oneDNN with weights arranged for it, channels_last"
    if matrix:
        notes["matrix unit"] = f"{matrix} of them on the matrix unit, in three parts of bf16 that make up float32"
    if blocks := len(program.blocks):
        word = "block runs" if blocks == 1 else "blocks run"
        notes["blocks"] = (
            f"{blocks} inverted residual {word} in one pass over memory, what lies between their convolutions in a cache"
        )
    notes["backward"] = "the backward pass is for the input alone and keeps one bit per ReLU element"
    notes["output"] = f"output within {difference:.1e} of the model's, relative to its largest"
    notes["gradient"] = f"gradient within {gradient_difference:.1e} of the model's, in l2"
    if exact is not None:
        notes["float64"] = f"in float64, where rounding moves no gate, gradient within {exact.apart:.1e} of the model's"
    try:
        if exact is not None and exact.not_incremental is not None:
            raise NotIncremental(exact.not_incremental)
        prepared._incremental = Incremental(graph, example)
        notes["boxes"] = (
            f"leave-one-out recomputes what a segment reaches: {prepared._incremental.followed} layers follow boxes"
        )
    except Exception as reason:  # of NotIncremental, or of an op that cannot be run in parts
        notes["boxes"] = f"leave-one-out runs whole images: {first_line(reason)}"
    if mixed:
        forward = "TF32" if example.is_cuda else "float32"
        notes["mixed"] = f"the backward pass runs in bf16; ReLU gates are those of the {forward} forward pass"


def _keep_what_gains(prepared: PreparedModel, gains: Gains) -> None:
    """Let what does not gain run as it is."""
    notes = prepared._notes
    notes["gains"] = gains.report()
    prepared.gains = gains
    if not pays(gains.gradient):
        prepared.program = prepared.replays = None
    if not pays(gains.forward):
        prepared._graph = None
        if not pays(gains.boxes):
            prepared._incremental = None
            notes.pop("boxes", None)
            notes["boxes"] = "leave-one-out runs whole images"
    if not prepared.fused and prepared._incremental is None:
        prepared._state, prepared._notes = None, {"gains": gains.report()}


def _gains(prepared: PreparedModel, example: Tensor, budget: Budget) -> Gains:
    """Measure gradient and forward pass of as many images as have the bytes of a common one, and of boxes where in question."""
    rows = getattr(prepared.original, "rows_per_pass", None) or max(1, _fast_rows(example) // CPU_ROWS)
    batch = example.expand(rows, -1, -1, -1).contiguous()
    arranged = batch.contiguous(memory_format=torch.channels_last)
    ways: dict[str, Way] = {
        "model's gradient": _gradient(prepared, prepared.original, batch),
        "gradient": _gradient(prepared, prepared, arranged),
        "model's forward": _forward(prepared, prepared.original, batch),
        "forward": _forward(prepared, prepared, arranged),
    }
    least = least_seconds(ways, {"model's gradient": "gradient", "model's forward": "forward"}, budget)
    gradient, forward = ratio(least, "model's gradient", "gradient"), ratio(least, "model's forward", "forward")
    return Gains(gradient, forward, None if pays(forward) else _gain_of_boxes(prepared, example, budget))


def _default_layer(model: nn.Module, example: Tensor) -> Choice | None:
    """Return the layer that serves every score that it moves, None where there is none."""

    def look() -> Look:
        with torch.enable_grad():
            leaf = example.clone().requires_grad_()
            output = model(leaf.clone())
            # a score that all classes have a share in: whatever layer moves one of them moves this
            shares = torch.linspace(1, 2, output.numel(), dtype=output.dtype, device=output.device)
            return Look(leaf, output, (output.flatten() * shares).sum().reshape(1))

    with contextlib.suppress(Exception):  # which a method that needs the layer will meet, and say
        choice = default_layer("pysal.prepare", model, look)
        return choice if choice.for_all and not choice.flat else None
    return None


def _gain_of_boxes(prepared: PreparedModel, example: Tensor, budget: Budget) -> float | None:
    """Measure leave-one-out of two small boxes against two passes of the model; None where no boxes are followed."""
    engine = prepared._incremental
    if engine is None:
        return None
    height, width = example.shape[2:]
    box = np.array([[height // 2, width // 2, height // 2 + math.ceil(height / 8), width // 2 + math.ceil(width / 8)]] * 2)
    if not engine.groups.pays(box):
        return None
    geometry, kept = engine.groups.geometry(box, example.device), engine.keep(example)
    (top, left), (rows, columns) = geometry.origins[0, 0], geometry.sizes[0]
    patches = example[:, :, top : top + rows, left : left + columns].expand(2, -1, -1, -1)
    patches = patches.contiguous(memory_format=torch.channels_last)
    ways = {
        "model's boxes": _forward(prepared, prepared.original, example.expand(2, -1, -1, -1).contiguous()),
        "boxes": _forward(prepared, lambda _: engine.run(kept, patches, geometry), patches),
    }
    return ratio(least_seconds(ways, {"model's boxes": "boxes"}, budget), "model's boxes", "boxes")


def _gradient(prepared: PreparedModel, function: Callable[[Tensor], Any], batch: Tensor) -> Way:
    """Return what makes a forward and backward pass as methods make it."""

    def way() -> None:
        with torch.enable_grad(), precision_mode(prepared.precision, batch.device, backward=True):
            leaf = batch.detach().requires_grad_()
            if function is prepared and prepared.replays is not None:
                with prepared.replays.recording(batch) as tape:
                    tape.sweep(torch.ones_like(tape.output))
                return
            output = function(leaf)
            if isinstance(output, Tensor) and output.requires_grad:
                torch.autograd.grad(output.sum(), leaf, allow_unused=True)

    return way


def _forward(prepared: PreparedModel, function: Callable[[Tensor], Any], batch: Tensor) -> Way:
    def way() -> None:
        with torch.no_grad(), precision_mode(prepared.precision, batch.device, backward=False):
            function(batch)

    return way


def _fast_rows(example: Tensor) -> int:
    return fast_rows(example.device, example.numel() * example.element_size())


def _fastest_rows(prepared: PreparedModel, example: Tensor, budget: Budget) -> int | None:
    """Return the number of images per pass with the least time per image, forward and backward.

    The numbers take turns, so that whatever else the machine does meets all of them, and the least time of each counts. On a
    GPU they come one after the other, because the graphs of all would need memory at once. On a CPU those nearest to what is
    fast elsewhere come first, as many as there is time for; None where there is no time, or the model runs as it is.
    """
    limited = example.device.type == "cpu" and prepared.replays is None
    usual = _fast_rows(example)
    if limited and (not prepared.fused or budget.left < 0):
        return None
    tried: Sequence[int] = _cpu_chunks(example) if example.device.type == "cpu" else GPU_CHUNKS
    if limited:
        tried = sorted(tried, key=lambda rows: (abs(math.log(rows / usual)), rows))
    batches = {rows: example.expand(rows, -1, -1, -1).contiguous(memory_format=torch.channels_last) for rows in tried}
    least = dict.fromkeys(batches, float("inf"))
    rounds = [tried] * TRIALS if prepared.replays is None else [[rows] * GPU_TURNS for rows in batches]
    for numbers in rounds:
        for rows in numbers:
            fastest = min(least.values(), default=float("inf"))
            if rows not in least or (limited and fastest < float("inf") and rows * fastest > budget.left):
                continue
            try:
                seconds = budget.seconds(f"{rows} rows", _gradient(prepared, prepared, batches[rows]))
                least[rows] = min(least[rows], seconds / rows)
            except Exception:  # too little memory, or a model that takes no such batch
                least = {fewer: seconds for fewer, seconds in least.items() if fewer < rows}
        if prepared.replays is not None:
            prepared.replays.clear()
    best = min((rows for rows in least if least[rows] < float("inf")), default=1)
    for rows in sorted(least):
        if least[rows] < 0.97 * least.get(best, float("inf")):  # a smaller chunk needs less memory: a larger one is worth it
            best = rows
    return best


def _cpu_chunks(example: Tensor) -> list[int]:
    """Return the numbers of images that are tried: the usual ones and, for small images, fourfold steps beyond them."""
    most = _fast_rows(example)
    tried = list(CPU_CHUNKS)
    while 4 * tried[-1] < most:
        tried.append(4 * tried[-1])
    return [*tried, *[most] * (most > tried[-1])]
