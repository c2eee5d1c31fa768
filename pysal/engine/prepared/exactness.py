"""Whether a fused graph computes what the model does, held against the model in its own dtype and in float64."""

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, fx, nn

from pysal._checks import first_line
from pysal.engine.boxes.clean import NotIncremental
from pysal.engine.boxes.incremental import Incremental
from pysal.engine.graph.depthwise import DepthwiseByTaps
from pysal.engine.graph.distance import distance
from pysal.engine.graph.fold import NotTraceable, fold_graph
from pysal.engine.graph.graph_module import line_of
from pysal.engine.graph.lowered import lower
from pysal.engine.graph.same_function import EXACT, TRACED, Pass, in_float64, run, seed_of
from pysal.engine.model.model_state import HOOKS, ModelState, global_hooks, own_hooks_apart, unusual
from pysal.engine.running.chunks import is_out_of_memory
from pysal.engine.tape.tape import Program

# Folding changes the rounding of every layer, and rounding moves gates, of which each changes the gradient: by .01 in a random
# ResNet-50 in float32. What is right in float64 may be this far from it in its own dtype, or twice as far as the model is.
FORWARD_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-9}
HALF_TOLERANCE = 3e-2  # of outputs in 16 bits
GRADIENT_TOLERANCE = 0.1
# Where a model cannot run in float64 a gradient has to be as near as rounding alone leaves it.
UNWITNESSED_TOLERANCE = 1e-5
NOTHING_FUSED = "it has no convolution that could be fused, and no linear layer on many tokens"


class RunsAsItIs(Exception):
    """A model is not prepared; the message says why."""


def check_ordinary(model: nn.Module) -> None:
    """Refuse to trace a model of which a part would be lost.

    Raises:
        RunsAsItIs: it has a hook, a forward method of one module alone, or tensors that cannot be watched or copied.
    """
    state = ModelState(model)
    for name, tensor in state.tensors.items():
        reason = unusual(tensor)
        if reason is not None:
            raise RunsAsItIs(f"its tensor {name!r} is {reason}")
    for prefix, module in state.modules:
        name = f"module {prefix[:-1]!r}" if prefix else "it"
        if isinstance(module, torch.jit.ScriptModule):
            raise RunsAsItIs(f"{name} is of TorchScript, which is not traced again")
        if any(own_hooks_apart(getattr(module, kind)) for kind in HOOKS):
            raise RunsAsItIs(f"{name} has hooks, which fused layers would not run")
        if "forward" in module.__dict__ and not _checks_of_program(prefix, module):
            raise RunsAsItIs(f"{name} has a forward method of its own, in the place of that of its class")
    if any(own_hooks_apart(hooks) for hooks in global_hooks().values()):
        raise RunsAsItIs("there are hooks on every module, which fused layers would not run")


def reason_of(error: Exception) -> str:
    """Return in a user's words why a model is not prepared: what torch says of a graph is about one that nobody has seen."""
    if isinstance(error, (RunsAsItIs, NotTraceable)):
        return str(error)
    if is_out_of_memory(error):
        return "there is too little memory to prepare it"
    at = line_of(error)
    return f"its own code does not run as a part of what is prepared{at}" if at else "a part of it cannot be prepared"


def why_whole(error: Exception) -> str:
    """Return in a user's words why leave-one-out runs whole images."""
    return str(error) if isinstance(error, NotIncremental) else "a layer of it cannot run on a part of an image"


def _checks_of_program(prefix: str, module: nn.Module) -> bool:
    """Say whether a module only looks at the shapes of what a program of torch.export is given."""
    return prefix.endswith("_guards_fn.") and not ModelState(module).tensors


def own_pass(model: nn.Module, images: Tensor, *, without_gradients: bool = True) -> Pass:
    """Return what the model itself gives for images, and see whether it gives the same without gradients.

    Raises:
        RunsAsItIs: it gives nothing that could be compared.
    """
    try:
        found = run(model, images)
    except Exception as error:
        raise RunsAsItIs(f"it does not run on a batch of {len(images)} like the example ({first_line(error)})") from error
    output = found.output
    if not isinstance(output, Tensor):
        advice = "a module that returns its scores alone can be prepared"
        raise RunsAsItIs(f"its output is not one tensor, but of class {type(output).__name__}; {advice}")
    if not output.is_floating_point() or output.ndim == 0:
        raise RunsAsItIs("its output is not a tensor of floating-point numbers with a row for each image")
    if not without_gradients:
        return found
    before = _versions(model)  # after a pass: what a first one stores for those that follow is the same in each of them
    try:
        with torch.no_grad():
            plain = model(images.clone())
    except Exception as error:
        raise RunsAsItIs(f"it does not run without gradients ({first_line(error)})") from error
    written = [name for name, version in _versions(model).items() if before.get(name) != version]
    if written:
        raise RunsAsItIs(f"its forward pass writes its own tensor {written[0]!r} each time")
    difference = distance(plain, output, float("inf"))
    if not difference <= max(TRACED[images.dtype], FORWARD_TOLERANCE.get(images.dtype, HALF_TOLERANCE)):
        raise RunsAsItIs(f"two passes on the same images, one without gradients, are {difference:.1e} apart")
    return found


def _versions(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Return which weights and buffers a model has, and how often each was written."""
    tensors = itertools.chain(model.named_parameters(), model.named_buffers())
    return {name: (id(tensor), tensor._version) for name, tensor in tensors}


class Exact:
    """What the model gives in float64, how far from its gradient the fused graph is, and whether it runs in parts."""

    def __init__(self, found: Pass, apart: float, not_incremental: str | None) -> None:
        self.found, self.apart, self.not_incremental = found, apart, not_incremental


def exact_pass(traced: fx.GraphModule, images: Tensor, example: Tensor) -> Exact | None:
    """Hold the fused graph against the model's in float64; None where the model cannot run in it.

    Raises:
        RunsAsItIs: they differ.
    """
    wide, example = images.double(), example.double()
    try:
        graph = in_float64(traced)
        with DepthwiseByTaps():
            expected = run(graph, wide)
        if not isinstance(expected.output, Tensor) or expected.output.dtype != torch.float64:
            return None
    except Exception:  # of a dtype that the model's code fixes, or of a device without float64
        return None
    if not lower(fold_graph(graph), example, torch.float64):
        raise RunsAsItIs(NOTHING_FUSED)
    output, gradient = recorded(Program(graph), wide).apart(expected)
    if not max(output, gradient) <= EXACT:
        what = "output" if output > EXACT else "gradient"
        raise RunsAsItIs(f"the fused graph's {what} would be {max(output, gradient):.1e} away from it in float64")
    return Exact(expected, gradient, _not_incremental(graph, example, wide[:1], expected.output[:1]))


def _not_incremental(graph: fx.GraphModule, example: Tensor, noise: Tensor, expected: Tensor) -> str | None:
    """Return what keeps a graph from running on boxes: a part of an image is changed to noise, whose outputs are known.

    Args:
        graph: the graph.
        example: (1, C, H, W), whose values are in that part before.
        noise: (1, C, H, W).
        expected: what the model gives for it.
    """
    height, width = example.shape[2:]
    box = np.array([[height // 3, width // 4, height // 3 + max(1, height // 4), width // 4 + max(1, width // 3)]])
    top, left, bottom, right = box[0]
    image = noise.clone()
    image[:, :, top:bottom, left:right] = example[:, :, top:bottom, left:right]
    try:
        engine = Incremental(graph, image, keep=True)
        assert engine.clean is not None
        with torch.no_grad():
            geometry = engine.groups.geometry(box, example.device)
            (top, left), (height, width) = geometry.origins[0, 0], geometry.sizes[0]
            patch = noise[:, :, top : top + height, left : left + width].contiguous(memory_format=torch.channels_last)
            difference = distance(engine.run(engine.clean, patch, geometry), expected, float("inf"))
    except Exception as error:
        return why_whole(error)
    return None if difference <= EXACT else f"its parts would be {difference:.1e} away from the whole"


def recorded(program: Program, images: Tensor) -> Pass:
    """Return what a program gives for images."""
    tape = program.record(images.clone())
    return Pass(tape.output, tape.sweep(seed_of(tape.output))[0])


def compared(
    graph: fx.GraphModule, program: Program, images: Sequence[Tensor], own: Sequence[Pass], exact: Exact | None
) -> tuple[float, float]:
    """Return how far the fused graph is from the model, output and gradient, in its own dtype.

    The first batch is held against float64, too, where there is that; any other has to be as near to the model.

    Raises:
        RunsAsItIs: it is further than rounding takes it.
    """
    limits = [
        FORWARD_TOLERANCE.get(images[0].dtype, HALF_TOLERANCE),
        UNWITNESSED_TOLERANCE if exact is None else GRADIENT_TOLERANCE,
    ]
    apart = []
    for number, (batch, expected) in enumerate(zip(images, own, strict=True)):
        found = recorded(program, batch)
        apart.append(found.apart(expected))
        measured = list(apart[-1])
        if number == 0:
            with torch.no_grad():
                # the graph as it runs without gradients, and as it is recorded: the two part where something else sees a tensor
                # that a ReLU overwrites
                plain = graph(batch.clone())
            measured[0] = max(measured[0], distance(plain, expected.output, float("inf")))
            if exact is not None:
                rounding = expected.apart(exact.found)
                limits = [max(limit, 2 * own) for limit, own in zip(limits, rounding, strict=True)]
                measured = list(found.apart(exact.found))
                measured[0] = max(measured[0], distance(plain, exact.found.output, float("inf")))
        allowed = limits if number == 0 else [2 * limit for limit in limits]  # each of the two may be away from float64
        for what, size, limit in zip(("output", "gradient"), measured, allowed, strict=True):
            if not size <= limit:
                raise RunsAsItIs(f"the fused graph's {what} is {size:.1e} away from it")
    return max(output for output, _ in apart), max(gradient for _, gradient in apart)
