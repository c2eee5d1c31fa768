"""A snapshot of a model that runs forward and input gradient as fast as this machine allows, and says what was done for it."""

import time
from typing import Any

import torch
from torch import Tensor, nn

from pysal._checks import FLOATING, check_tensor, refuse
from pysal.engine.fold import fold
from pysal.engine.lowered import FusedConvolution, lower
from pysal.engine.precision import PRECISIONS, Precision
from pysal.engine.tape import Program, Recorded

# Images per pass that are tried out; the best is kept. More lose on a CPU.
CPU_CHUNKS = (1, 2, 4, 8)
GPU_CHUNKS = (8, 16, 32, 64, 128)
# Folding changes the rounding of every layer. A graph further than this from the model, relative to its largest output, is
# not the same function, and is not used.
FORWARD_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-9}


class PreparedModel:
    """What `prepare` returns: call it, or hand it to any method in the model's place.

    Attributes:
        original: the model it was made from.
        precision: the arithmetic of its passes.
        rows: images per pass that were fastest when it was made.
    """

    def __init__(self, original: nn.Module, example: Tensor, precision: Precision) -> None:
        self.original, self.precision = original, precision
        self.rows: int | None = None
        self._shape = tuple(example.shape[1:])
        self._fingerprint = _fingerprint(original)
        self._graph: nn.Module | None = None
        self.program: Program | None = None
        self._notes: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["original"], name)

    def __call__(self, images: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return the model's output."""
        if self._graph is None or args or kwargs or tuple(images.shape[1:]) != self._shape:
            return self.original(images, *args, **kwargs)
        if self.program is not None and images.requires_grad and torch.is_grad_enabled():
            return Recorded.apply(images, self.program)  # type: ignore[no-untyped-call]
        return self._graph(images)

    @property
    def fused(self) -> bool:
        """Whether anything was gained: False where the model runs as it is."""
        return self._graph is not None

    def report(self) -> str:
        """Return what was done to the model, and what was not, one line each."""
        return "\n".join(self._notes)

    def check_unchanged(self, where: str) -> None:
        """Refuse to go on if a weight or buffer of the original has changed since.

        Raises:
            ValueError: names the first one that has.
        """
        for name, mark in _fingerprint(self.original).items():
            if self._fingerprint.get(name) != mark:
                refuse(where, "model", "be prepared again after its weights have changed", f"a new value of {name!r}")


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
        precision: "float32"; "mixed", a float32 forward, which fixes the ReLU gates, with a bf16 backward; "tf32"; "bf16".
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
    if any(module.training for module in model.modules()):
        raise ValueError(f"{where}: model must be in eval mode, got one in training mode: call model.eval() first")
    check_tensor(where, "example", example, ndim=4, dtypes=FLOATING)
    if precision not in PRECISIONS:
        refuse(where, "precision", f"be one of {', '.join(map(repr, PRECISIONS))}", repr(precision))
    with torch.inference_mode(False):  # whose tensors could not be differentiated later
        example = example[:1].detach().clone()
        prepared = PreparedModel(model, example, precision)
        _build(prepared, example)
        prepared.rows = batch_size or _fastest_rows(prepared, example)
    prepared._notes.append(f"{prepared.rows} images per pass" + ("" if batch_size else " were fastest"))
    return prepared


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
    with torch.no_grad():
        expected, got = prepared.original(example.clone()), graph(example)
    if not isinstance(expected, Tensor) or not isinstance(got, Tensor):
        notes.append("runs as it is: its output is not one tensor")
        return
    tolerance = FORWARD_TOLERANCE.get(example.dtype, 3e-2)
    difference = float((got - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
    if not difference <= tolerance:
        notes.append(f"runs as it is: the folded graph is {difference:.1e} away from it")
        return
    prepared._graph = graph
    prepared.program = Program(graph, torch.bfloat16 if mixed else None)
    onednn = sum(isinstance(module, FusedConvolution) and module.onednn for module in graph.modules())
    word = "convolution runs" if lowered == 1 else "convolutions run"
    notes.append(f"{lowered} {word} fused, with batch norm, padding, shortcut and ReLU where they follow")
    notes.append(f"{onednn} of them through oneDNN with weights arranged for it, channels_last")
    notes.append("the backward pass is for the input alone and keeps one bit per ReLU element")
    notes.append(f"output within {difference:.1e} of the model's, relative to its largest")
    if mixed:
        notes.append("the backward pass runs in bf16; ReLU gates are those of the float32 forward pass")


def _fastest_rows(prepared: PreparedModel, example: Tensor) -> int:
    """Return the number of images per pass with the least time per image, forward and backward."""
    best, fastest = 1, float("inf")
    for rows in CPU_CHUNKS if example.device.type == "cpu" else GPU_CHUNKS:
        batch = example.expand(rows, -1, -1, -1).contiguous(memory_format=torch.channels_last)
        try:
            seconds = min(_seconds(prepared, batch) for _ in range(2)) / rows
        except torch.OutOfMemoryError:
            break
        if seconds < 0.97 * fastest:  # a smaller chunk needs less memory: a larger one has to be worth it
            best, fastest = rows, seconds
    return best


def _seconds(prepared: PreparedModel, batch: Tensor) -> float:
    with torch.inference_mode(False), torch.enable_grad():
        leaf = batch.detach().requires_grad_()
        started = time.perf_counter()
        output = prepared(leaf)
        if isinstance(output, Tensor) and output.requires_grad:
            torch.autograd.grad(output.sum(), leaf, allow_unused=True)
        if batch.device.type == "cuda":
            torch.cuda.synchronize(batch.device)
        return time.perf_counter() - started


def _fingerprint(model: nn.Module) -> dict[str, tuple[int, int, str]]:
    """Return marks that change with the weights: where they are, how often they were written, their sum."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        return {
            name: (tensor.data_ptr(), tensor._version, float(tensor.sum(dtype=torch.float64)).hex())  # hex: NaN equals itself
            for name, tensor in tensors.items()
        }


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
