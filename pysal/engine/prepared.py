"""A snapshot of a model that runs forward and input gradient as fast as this machine allows, and says what was done for it."""

import contextlib
import time
from typing import Any

import torch
from torch import Tensor, nn

from pysal._checks import FLOATING, check_tensor, refuse
from pysal.engine.chunks import fast_rows
from pysal.engine.cuda_graphs import Replays
from pysal.engine.distance import distance
from pysal.engine.features import Layer, default_layer
from pysal.engine.fold import fold
from pysal.engine.incremental import Incremental, NotIncremental
from pysal.engine.lowered import FusedConvolution, lower
from pysal.engine.not_applicable import NotApplicable
from pysal.engine.precision import PRECISIONS, Precision, precision_mode
from pysal.engine.tape import Program, Recorded, Tape
from pysal.engine.training import training_part

# Images per pass that are tried out; the best is kept. More lose on a CPU, unless they are small.
CPU_CHUNKS = (1, 2, 4, 8)
GPU_CHUNKS = (8, 16, 32, 64, 128)
# Rounds in which each is tried; on a GPU the first of them make a pass, its graph and that of its sweep.
TRIALS, GPU_TRIALS = 4, 7
# Folding changes the rounding of every layer. A graph further than this from the model, relative to its largest output, is
# not the same function, and is not used.
FORWARD_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-9}
# Values of each weight that are compared before every use; all of them would take as long as a forward pass.
SAMPLES = 64
# A gradient further than this from the model's, in l2, is not that of the same function. Rounding alone moves some gates of
# a deep network, and each of them changes the gradient: by .01 in a random ResNet-50 in float32.
GRADIENT_TOLERANCE = 0.1


class PreparedModel:
    """What `prepare` returns: call it, or hand it to any method in the model's place.

    Attributes:
        original: the model it was made from.
        precision: the arithmetic of its passes.
        rows: images per pass that were fastest when it was made.
        rows_asked: whether they were asked for, not measured.
        program: records passes; None where the model runs as it is.
        replays: replays them as CUDA graphs; None on a CPU.
    """

    def __init__(self, original: nn.Module, example: Tensor, precision: Precision) -> None:
        self.original, self.precision = original, precision
        self.rows: int | None = None
        self.rows_asked = False
        self._shape = tuple(example.shape[1:])
        self._weights = _Weights(original)
        self._graph: nn.Module | None = None
        self.program: Program | None = None
        self.replays: Replays | None = None
        self.default_layer: Layer | None = None
        self._incremental: Incremental | None = None
        self._notes: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["original"], name)

    def __call__(self, images: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return the model's output."""
        program = self.program_for(images)
        if self._graph is None or program is None or args or kwargs:
            return self.original(images, *args, **kwargs)
        if images.requires_grad and torch.is_grad_enabled():
            return Recorded.apply(images, program)  # type: ignore[no-untyped-call]
        return self._graph(images)

    def program_for(self, images: Tensor) -> Program | None:
        """Return what computes the model's output for images of this size, None where the original does."""
        return self.program if tuple(images.shape[1:]) == self._shape else None

    def rows_for(self, images: Tensor) -> int | None:
        """Return how many images of this size run in a pass, None where nobody has said or measured it."""
        return self.rows if self.rows_asked or tuple(images.shape[1:]) == self._shape else None

    def default_layer_for(self, images: Tensor) -> Layer | None:
        """Return the last layer with a spatial map for images of this size, None where that is not known."""
        return self.default_layer if tuple(images.shape[1:]) == self._shape else None

    @property
    def fused(self) -> bool:
        """Whether anything was gained: False where the model runs as it is."""
        return self._graph is not None

    def incremental(self, images: Tensor) -> Incremental | None:
        """Return what recomputes only what a change inside a box reaches; None where model or images do not allow it."""
        engine = self._incremental
        if engine is None or tuple(images.shape[1:]) != self._shape or self.precision == "bf16":
            return None
        return engine if engine.takes(images) else None

    def report(self) -> str:
        """Return what was done to the model, and what was not, one line each."""
        notes = list(self._notes)
        if self.replays is not None:
            refused = self.replays.refused
            notes.append(
                "passes that come again with the same shape are replayed as CUDA graphs"
                if refused is None
                else f"no pass is replayed as a CUDA graph: {refused}"
            )
        return "\n".join(notes)

    def check_unchanged(self, where: str) -> None:
        """Refuse to go on if a weight or buffer of the original has changed since.

        Every tensor's place, autograd's count of its changes and 64 of its values, evenly spread, are compared: only a
        change of single values past autograd, through `.data`, may go unseen.

        A part in training mode that computes something else there is refused, too.

        Raises:
            ValueError: names the first one that has.
        """
        parts = _parts(self.original)
        if any(module.training for _, module in parts):
            check_eval(where, self.original)
        name = self._weights.changed(_tensors(parts))
        if name is not None:
            refuse(where, "model", "be prepared again after its weights have changed", f"a new value of {name!r}")


class _Weights:
    """What tells whether the tensors of a model have changed: where they are, how often they were written, some values."""

    def __init__(self, model: nn.Module) -> None:
        tensors = _tensors(_parts(model))
        self._marks = {name: (tensor.data_ptr(), tensor._version) for name, tensor in tensors.items()}
        samples = {name: _sample(tensor) for name, tensor in tensors.items()}
        kinds = dict.fromkeys((sample.device, sample.dtype) for sample in samples.values())
        self._samples = [{name: one for name, one in samples.items() if (one.device, one.dtype) == kind} for kind in kinds]
        self._values = self._read()

    def _read(self) -> list[Tensor]:
        return [torch.cat(list(some.values())).nan_to_num() for some in self._samples]

    def changed(self, tensors: dict[str, Tensor]) -> str | None:
        """Return the name of a tensor of the model that has changed."""
        marks = {name: (tensor.data_ptr(), tensor._version) for name, tensor in tensors.items()}
        for name in marks.keys() | self._marks.keys():
            if marks.get(name) != self._marks.get(name):
                return name
        for some, now, then in zip(self._samples, self._read(), self._values, strict=True):
            if not torch.equal(now, then):
                sizes = [len(one) for one in some.values()]
                pairs = zip(some, now.split(sizes), then.split(sizes), strict=True)
                return next(name for name, new, old in pairs if not torch.equal(new, old))
        return None


def _parts(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the modules with the beginning of their tensors' names; `named_modules` takes a millisecond of every call."""
    found, seen = [("", model)], {model}
    for prefix, module in found:
        for name, child in module._modules.items():
            if child is not None and child not in seen:
                seen.add(child)
                found.append((f"{prefix}{name}.", child))
    return found


def _tensors(parts: list[tuple[str, nn.Module]]) -> dict[str, Tensor]:
    return {
        prefix + name: tensor
        for prefix, module in parts
        for held in (module._parameters, module._buffers)
        for name, tensor in held.items()
        if tensor is not None
    }


def _sample(tensor: Tensor) -> Tensor:
    """Return a view of some of a tensor's values, evenly spread over its memory."""
    if tensor.layout != torch.strided or tensor.numel() == 0:
        return torch.zeros(0, dtype=tensor.dtype, device=tensor.device)
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    step = max(1, span // SAMPLES)
    return tensor.detach().as_strided((-(-span // step),), (step,), tensor.storage_offset())


def prepare(
    model: nn.Module, example: Tensor, *, precision: Precision = "float32", batch_size: int | None = None
) -> PreparedModel:
    """Return a snapshot of a model for the methods to run on: the same function, several times faster.

    The snapshot has batch norm and padding folded into convolutions, convolution, shortcut and ReLU in one pass, and a backward
    pass for the input alone, which keeps one bit per ReLU element. What cannot be traced runs as the model runs it. The model
    itself is not changed; when its weights change later, the snapshot is refused.

    Args:
        model: an nn.Module in eval mode.
        example: (B, C, H, W), an image or more as the methods will get; others of another size run the original model.
        precision: "float32"; "mixed", a float32 forward (TF32 on a GPU), which fixes the ReLU gates, with a bf16 backward;
            "tf32"; "bf16".
        batch_size: images per pass; None = what is fastest on this machine, measured.

    Raises:
        TypeError: the model is no nn.Module, or the example of a wrong type.
        ValueError: a model in training mode, an example of a wrong shape, an unknown precision.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU()).eval()
        >>> fast = prepare(model, torch.rand(1, 3, 16, 16), batch_size=4)
        >>> print(fast.report().splitlines()[0])
        1 convolution runs fused, with batch norm, padding, shortcut and ReLU where they follow
    """
    where = "pysal.prepare"
    if not isinstance(model, nn.Module):
        refuse(where, "model", "be an nn.Module", type(model).__name__, TypeError)
    check_eval(where, model)
    check_tensor(where, "example", example, ndim=4, dtypes=FLOATING)
    if precision not in PRECISIONS:
        refuse(where, "precision", f"be one of {', '.join(map(repr, PRECISIONS))}", repr(precision))
    with torch.inference_mode(False):  # whose tensors could not be differentiated later
        example = example[:1].detach().clone()
        prepared = PreparedModel(model, example, precision)
        # compared in full float32: TF32, which torch allows cuDNN, would be further away than a wrong graph may be
        with precision_mode("float32", example.device, backward=False):
            _build(prepared, example)
        fixed = getattr(model, "rows_per_pass", None)  # of a model that takes so many rows at a time
        prepared.rows = fixed or batch_size or _fastest_rows(prepared, example)
        prepared.rows_asked = bool(fixed or batch_size)
    prepared._notes.append(f"{prepared.rows} images per pass" + ("" if batch_size else " were fastest"))
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


def _build(prepared: PreparedModel, example: Tensor) -> None:
    """Trace, fold and lower the model, and keep the result if it computes the same."""
    notes = prepared._notes
    try:
        graph = fold(prepared.original)
    except Exception as error:  # tracing runs the model's own code, which may fail in any way
        notes.append(f"runs as it is: it cannot be traced ({_first_line(error)})")
        return
    mixed = prepared.precision == "mixed"
    lowered = lower(graph, example, torch.bfloat16 if mixed else example.dtype)
    if not lowered:
        notes.append("runs as it is: it has no convolution that could be fused")
        return
    answers: list[Any] = []

    def look(grad: bool) -> Any:
        with torch.set_grad_enabled(grad):
            answers.append(prepared.original(example.clone().requires_grad_(grad).clone()))
        return answers[-1]

    with torch.enable_grad(), contextlib.suppress(NotApplicable):
        prepared.default_layer = default_layer("pysal.prepare", prepared.original, example, look)
    with torch.no_grad():
        expected = answers[0]
        if not isinstance(expected, Tensor) or expected.ndim == 0:
            notes.append("runs as it is: its output is not one tensor")
            return
        program = Program(graph, torch.bfloat16 if mixed else None)
        tape = program.record(example)
        # the graph as it runs without gradients, and as it is recorded: the two part where something else sees a tensor that a
        # ReLU overwrites
        difference = max(distance(graph(example), expected, float("inf")), distance(tape.output, expected, float("inf")))
    if not difference <= FORWARD_TOLERANCE.get(example.dtype, 3e-2):
        notes.append(f"runs as it is: the folded graph is {difference:.1e} away from it")
        return
    gradient_difference = _gradient_distance(prepared.original, tape, example)
    if not gradient_difference <= GRADIENT_TOLERANCE:
        notes.append(f"runs as it is: the folded graph's gradient is {gradient_difference:.1e} away from its gradient")
        return
    prepared._graph, prepared.program = graph, program
    prepared.replays = Replays(program) if example.is_cuda else None
    fused = [module for module in graph.modules() if isinstance(module, FusedConvolution)]
    matrix = sum(module.matrix is not None for module in fused)
    onednn = sum(module.onednn and module.matrix is None for module in fused)
    word = "convolution runs" if lowered == 1 else "convolutions run"
    notes.append(f"{lowered} {word} fused, with batch norm, padding, shortcut and ReLU where they follow")
    if onednn:
        notes.append(f"{onednn} of them through oneDNN with weights arranged for it, channels_last")
    if matrix:
        notes.append(f"{matrix} of them on the matrix unit, in three parts of bf16 that make up float32")
    if blocks := len(program.blocks):
        word = "block runs" if blocks == 1 else "blocks run"
        notes.append(
            f"{blocks} inverted residual {word} in one pass over memory, what lies between their convolutions in a cache"
        )
    notes.append("the backward pass is for the input alone and keeps one bit per ReLU element")
    notes.append(f"output within {difference:.1e} of the model's, relative to its largest")
    notes.append(f"gradient within {gradient_difference:.1e} of the model's, in l2")
    try:
        prepared._incremental = Incremental(graph, example)
        notes.append(f"leave-one-out recomputes what a segment reaches: {prepared._incremental.followed} layers follow boxes")
    except NotIncremental as reason:
        notes.append(f"leave-one-out runs whole images: {reason}")
    if mixed:
        forward = "TF32" if example.is_cuda else "float32"
        notes.append(f"the backward pass runs in bf16; ReLU gates are those of the {forward} forward pass")


def _gradient_distance(model: nn.Module, tape: Tape, example: Tensor) -> float:
    """Return how far a recorded pass's gradient of the largest output is from the model's, relative to its size."""
    with torch.enable_grad():
        leaf = example.clone().requires_grad_()
        output = model(leaf.clone())
        if not output.requires_grad:
            return 0.0
        seed = torch.nn.functional.one_hot(output.argmax(), output.numel()).view_as(output).to(output.dtype)
        (expected,) = torch.autograd.grad(output, leaf, seed, allow_unused=True)
    got, _ = tape.sweep(seed)
    if expected is None or got is None:
        return 0.0 if expected is None and got is None else float("inf")
    return distance(got, expected)


def _fastest_rows(prepared: PreparedModel, example: Tensor) -> int:
    """Return the number of images per pass with the least time per image, forward and backward.

    The numbers take turns, so that whatever else the machine does meets all of them, and the least time of each counts. On a
    GPU they come one after the other, because the graphs of all would need memory at once.
    """
    batches = {
        rows: example.expand(rows, -1, -1, -1).contiguous(memory_format=torch.channels_last)
        for rows in (_cpu_chunks(example) if example.device.type == "cpu" else GPU_CHUNKS)
    }
    least = dict.fromkeys(batches, float("inf"))
    # a pass of many rows is a mean by itself
    turns = [[rows for rows in batches if turn < 2 or rows <= CPU_CHUNKS[-1]] for turn in range(TRIALS)]
    rounds = turns if prepared.replays is None else [[rows] * GPU_TRIALS for rows in batches]
    for numbers in rounds:
        for rows in numbers:
            if rows not in least:
                break
            try:
                least[rows] = min(least[rows], _seconds(prepared, batches[rows]) / rows)
            except torch.OutOfMemoryError:
                least = {fewer: seconds for fewer, seconds in least.items() if fewer < rows}
        if prepared.replays is not None:
            prepared.replays.clear()
    best = min(least, default=1)
    for rows, seconds in least.items():
        if seconds < 0.97 * least[best]:  # a smaller chunk needs less memory: a larger one has to be worth it
            best = rows
    return best


def _cpu_chunks(example: Tensor) -> list[int]:
    """Return the numbers of images that are tried: the usual ones and, for small images, fourfold steps beyond them."""
    most = fast_rows(example.device, example.numel() * example.element_size())
    tried = list(CPU_CHUNKS)
    while 4 * tried[-1] < most:
        tried.append(4 * tried[-1])
    return [*tried, *[most] * (most > tried[-1])]


def _seconds(prepared: PreparedModel, batch: Tensor) -> float:
    """Return the time of a pass as methods make it: of this process alone on a CPU, which others may be using, too."""
    clock = time.perf_counter if batch.device.type == "cuda" or torch.get_num_threads() > 1 else time.process_time

    def now() -> float:
        if batch.device.type == "cuda":
            torch.cuda.synchronize(batch.device)
        return clock()

    arithmetic = precision_mode(prepared.precision, batch.device, backward=True)
    with torch.inference_mode(False), torch.enable_grad(), arithmetic:
        leaf = batch.detach().requires_grad_()
        started = now()
        if prepared.replays is not None:
            with prepared.replays.recording(batch) as tape:
                tape.sweep(torch.ones_like(tape.output))
            return now() - started
        output = prepared(leaf)
        if isinstance(output, Tensor) and output.requires_grad:
            torch.autograd.grad(output.sum(), leaf, allow_unused=True)
        return now() - started


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
