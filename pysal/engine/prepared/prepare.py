"""Makes a snapshot of a model that runs forward and input gradient as fast as this machine allows, and says what was done."""

import contextlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from pysal._checks import FLOATING, check_tensor, first_line, refuse, refuse_unknown
from pysal.engine.boxes.clean import NotIncremental
from pysal.engine.boxes.incremental import Incremental
from pysal.engine.graph.exported import capture
from pysal.engine.graph.fold import NotTraceable, fold_graph, trace
from pysal.engine.graph.fused_convolution import FusedConvolution
from pysal.engine.graph.fused_linear import FusedLinear
from pysal.engine.graph.lowered import lower
from pysal.engine.graph.programs import LayeredProgram, is_graph_of_program
from pysal.engine.graph.same_function import TRACED, Pass, batches, run
from pysal.engine.graph.shapes import note_shapes
from pysal.engine.layers.default_layer import Choice, Look, default_layer
from pysal.engine.model.model_state import ModelState
from pysal.engine.model.placement import check_fits
from pysal.engine.model.training import check_eval
from pysal.engine.prepared.exactness import (
    NOTHING_FUSED,
    RunsAsItIs,
    check_ordinary,
    compared,
    exact_pass,
    own_pass,
)
from pysal.engine.prepared.gains import Budget, Gains, pays
from pysal.engine.prepared.model import PreparedModel
from pysal.engine.prepared.trial import fastest_rows, measure_gains
from pysal.engine.running.precision import PRECISIONS, Precision, precision_mode
from pysal.engine.running.states import keep_random_numbers, leave_inference_mode, restoring
from pysal.engine.tape.cuda_graphs import Replays
from pysal.engine.tape.operators import BlockOperator
from pysal.engine.tape.tape import Program


@restoring
def prepare(
    model: nn.Module | ExportedProgram,
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
        model: an nn.Module in eval mode, or a program of torch.export. Of a module that torch.compile returned, what it was
            made from is prepared.
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
    if isinstance(model, ExportedProgram):
        model = model.module()
    if isinstance(model, nn.Module) and is_graph_of_program(model):
        model = LayeredProgram(model)
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
        prepared = PreparedModel(model, example, precision, _again)
        try:
            # compared in full float32: TF32, which torch allows cuDNN, would be further away than a wrong graph may be
            with precision_mode("float32", example.device, backward=False):
                _build(prepared, example)
            _keep_what_gains(prepared, gains or measure_gains(prepared, example, budget))
        except Exception as error:  # of the model's own code, or of an op, that meets what its author did not foresee
            reason = str(error) if isinstance(error, RunsAsItIs) else first_line(error)
            prepared = PreparedModel(model, example, precision, _again)
            prepared._notes["as it is"] = f"runs as it is: {reason}"
        if given is not model:
            if prepared.fused or prepared._incremental is not None:
                prepared._notes["compiled"] = "made from what torch.compile was given, which also runs what this does not"
            else:
                prepared.original = given
        fixed = getattr(model, "rows_per_pass", None)  # of a model that takes so many rows at a time
        prepared.only_rows = fixed
        prepared.rows = fixed or batch_size or fastest_rows(prepared, example, budget)
        prepared.rows_asked = bool(fixed or batch_size)
    if prepared.rows is not None:
        why = ", which is all that it takes" if fixed else "" if batch_size else " were fastest"
        prepared._notes["rows"] = f"{prepared.rows} images per pass{why}"
    return prepared


def _again(
    original: nn.Module, example: Tensor, precision: Precision, rows: int | None, asked: bool, gains: Gains | None
) -> PreparedModel:
    """Prepare a copy of a model, as what it is a copy of was."""
    prepared = prepare(original, example, precision=precision, batch_size=rows, gains=gains)
    prepared.rows_asked = asked
    return prepared


def _build(prepared: PreparedModel, example: Tensor) -> None:
    """Trace, fold and lower the model, and keep the result if it computes the same.

    Raises:
        Exception: anything; the model runs as it is then.
    """
    model, notes = prepared.original, prepared._notes
    check_ordinary(model)
    rows = getattr(model, "rows_per_pass", None)
    images = list(batches(example, rows))
    own = [own_pass(model, images[0])]  # ends without gradients: what it leaves on the model is copied with it
    traced, written = _captured(model, images, own, any_number=rows is None)
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
    if fused:
        word = "convolution runs" if len(fused) == 1 else "convolutions run"
        notes["convolutions"] = f"{len(fused)} {word} fused, with batch norm, padding, shortcut and ReLU where they follow"
    if onednn:
        notes["onednn"] = f"{onednn} of them through oneDNN with weights arranged for it, channels_last"
    if matrix:
        notes["matrix unit"] = f"{matrix} of them on the matrix unit, in three parts of bf16 that make up float32"
    if linear := sum(isinstance(module, FusedLinear) for module in graph.modules()):
        word = "linear layer has its" if linear == 1 else "linear layers have their"
        notes["linear"] = f"{linear} {word} weights arranged once, and send a gradient to their input alone"
    if blocks := sum(isinstance(block, BlockOperator) for block in program.blocks.values()):
        word = "block runs" if blocks == 1 else "blocks run"
        notes["blocks"] = (
            f"{blocks} inverted residual {word} in one pass over memory, what lies between their convolutions in a cache"
        )
    if squeezes := len(program.blocks) - blocks:
        notes["gates"] = (
            f"{squeezes} squeeze-and-excitation run with the activation before them, whose result is never written down"
        )
    notes["backward"] = (
        "the backward pass is for the input alone and keeps one bit per ReLU element, the input of other activations"
    )
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


def _captured(
    model: nn.Module, images: Sequence[Tensor], own: list[Pass], *, any_number: bool
) -> tuple[fx.GraphModule, list[tuple[str, str]]]:
    """Return a graph that computes what the model does, and what the model's forward pass writes.

    torch.fx comes first: it takes a tenth of the time, and sees where gradients stop and modules are called.

    Args:
        model: the model.
        images: batches on which both are compared.
        own: the model's passes on the first of them; those on the others are appended.
        any_number: whether the model takes any number of images.

    Raises:
        RunsAsItIs: neither it nor torch.export gives such a graph.
    """
    ways: list[Callable[[], tuple[fx.GraphModule, list[tuple[str, str]]]]] = [
        lambda: trace(model),
        lambda: capture(model, images[-1], any_number=any_number),
    ]
    if isinstance(model, LayeredProgram):  # which says itself what torch.fx would not find in it
        ways.reverse()
    for way in ways:
        try:
            traced, written = way()
            own += [own_pass(model, batch, without_gradients=False) for batch in images[len(own) :]]
            _check_same(traced, images, own)
        except (NotTraceable, RunsAsItIs) as found:
            reason = found
        else:
            return traced, written
    raise RunsAsItIs(str(reason)) from reason


def _check_same(traced: fx.GraphModule, images: Sequence[Tensor], own: Sequence[Pass]) -> None:
    """Hold a graph as it was captured, which calls the model's own operations, against the model.

    Raises:
        RunsAsItIs: it computes something else.
    """
    for batch, expected in zip(images, own, strict=True):
        # what is the same for all images shows in the shapes of the last batch
        output, gradient = run(note_shapes(traced).run if batch is images[-1] else traced, batch).apart(expected)
        if not max(output, gradient) <= TRACED[batch.dtype]:
            what = "output" if output > TRACED[batch.dtype] else "gradient"
            raise RunsAsItIs(
                f"its traced graph's {what} is {max(output, gradient):.1e} away from its own: it "
                "decides something anew in every pass, or acts on gradients where tracing does not see it"
            )


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
