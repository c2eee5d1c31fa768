"""Makes a snapshot of a model that runs forward and input gradient as fast as this machine allows, and says what was done."""

import contextlib
import math
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from pysal import _library
from pysal._checks import FLOATING, check_tensor, refuse, refuse_unknown
from pysal.engine.boxes.clean import NotIncremental
from pysal.engine.boxes.incremental import Incremental
from pysal.engine.graph.distance import distance
from pysal.engine.graph.exported import capture
from pysal.engine.graph.fold import fold_graph, trace
from pysal.engine.graph.fused_convolution import FusedConvolution
from pysal.engine.graph.fused_linear import FusedLinear
from pysal.engine.graph.lowered import InDtype, lower
from pysal.engine.graph.programs import LayeredProgram, is_graph_of_program
from pysal.engine.graph.same_function import TRACED, Pass, batches, in_bfloat16, run
from pysal.engine.graph.shapes import note_shapes, shapes_of
from pysal.engine.layers.default_layer import Choice, Look, default_layer
from pysal.engine.model.model_state import ModelState
from pysal.engine.model.placement import check_fits
from pysal.engine.model.training import check_eval
from pysal.engine.prepared.exactness import (
    GRADIENT_TOLERANCE,
    HALF_TOLERANCE,
    NOTHING_FUSED,
    Exact,
    RunsAsItIs,
    check_ordinary,
    compared,
    exact_pass,
    own_pass,
    reason_of,
    recorded,
    why_whole,
)
from pysal.engine.prepared.forwards import Forwards
from pysal.engine.prepared.gains import Budget, Gains, Way, least_seconds, pays
from pysal.engine.prepared.model import PreparedModel
from pysal.engine.prepared.record import (
    Comparison,
    Record,
    fingerprint,
    graph_fingerprint,
    processor,
    read,
)
from pysal.engine.prepared.trial import fastest_rows, measure_gains, most_rows
from pysal.engine.prepared.ways import take_fastest, take_known
from pysal.engine.running.heap import FreedMemory
from pysal.engine.running.precision import PRECISIONS, Precision, precision_mode
from pysal.engine.running.states import keep_random_numbers, leave_inference_mode, restoring
from pysal.engine.tape.cuda_graphs import Replays
from pysal.engine.tape.forward import forward_graph
from pysal.engine.tape.operators import BlockOperator
from pysal.engine.tape.smooth import SmoothBlockOperator, SqueezeOperator
from pysal.engine.tape.tape import Program

# A gradient this far from that of float32, in l2, is correlated with it by less than .999.
GATES_MOVED = 0.045
# A graph, and what a forward pass of its model writes: (module's name, attribute).
Captured: TypeAlias = tuple[fx.GraphModule, list[tuple[str, str]]]


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
    gradients of the model.

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
    model = _network(where, model)
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
    return _prepared(model, example, precision, batch_size, gains, None)


def _prepared(
    given: nn.Module,
    example: Tensor,
    precision: Precision,
    batch_size: int | None,
    gains: Gains | None,
    known: Record | None,
) -> PreparedModel:
    """Return what `prepare` returns, of arguments that are checked.

    Args:
        given: the model.
        example: see `prepare`.
        precision: see `prepare`.
        batch_size: see `prepare`.
        gains: see `prepare`.
        known: what was found out about this very model before; None = find it out.

    Raises:
        Changed: the model does not have the graph that is known.
    """
    leave_inference_mode()  # whose tensors could not be differentiated later
    keep_random_numbers(example.device)
    model = getattr(given, "_orig_mod", given)  # of torch.compile, whose graphs cannot be taken apart
    with torch.enable_grad():
        budget = Budget(example.device)
        example = example[:1].detach().clone()
        prepared = PreparedModel(model, example, precision, _again)
        try:
            # compared in full float32: TF32, which torch allows cuDNN, would be further away than a wrong graph may be
            if known is not None and known.reason is not None:
                raise RunsAsItIs(known.reason)
            with precision_mode("float32", example.device, backward=False):
                _build(prepared, example, None if known is None else known.comparison, budget, batch_size)
            if prepared._forwards is not None and prepared._state is not None:
                prepared._forwards.state = prepared._state  # one for both
            if example.is_cuda:
                take_known(prepared, gains.way) if gains is not None else take_fastest(prepared, example, budget)
            _keep_what_gains(prepared, gains or measure_gains(prepared, example, budget))
            if not prepared.fused and prepared._incremental is None:
                prepared.memory = None
        except Changed:
            raise
        except Exception as error:  # of the model's own code, or of an op, that meets what its author did not foresee
            reason = reason_of(error)
            forwards = prepared._forwards  # of a graph that was captured, and could not be fused
            prepared = PreparedModel(model, example, precision, _again)
            prepared.reason, prepared._forwards = reason, forwards
            prepared.gains = gains if forwards is not None else None
            prepared._notes["as it is"] = f"runs as it is: {reason}"
        if prepared._forwards is not None:
            prepared._forwards.measures = gains is None
        if given is not model:
            if prepared.fused or prepared._incremental is not None:
                prepared._notes["compiled"] = "made from what torch.compile was given, which also runs what this does not"
            else:
                prepared.original = given
        fixed = getattr(model, "rows_per_pass", None)  # of a model that takes so many rows at a time
        prepared.only_rows = fixed
        prepared.rows = fixed or batch_size or (fastest_rows(prepared, example, budget) if known is None else known.rows)
        prepared.rows_asked = bool(fixed or batch_size)
    if prepared.rows is not None:
        why = ", which is all that it takes" if fixed else "" if batch_size else " were fastest"
        prepared._notes["rows"] = f"{prepared.rows} images per pass{why}"
    return prepared


@restoring
def load_prepared(path: str | os.PathLike[str], model: nn.Module | ExportedProgram) -> PreparedModel:
    """Return what `PreparedModel.save` was called on, for the same model: nothing is compared or measured again.

    The model is captured and its weights are arranged anew, in the time of some five gradients. The file has numbers and words
    alone, and nothing in it is run.

    Args:
        path: the file.
        model: the very model, with the same weights, on the same kind of processor, in eval mode.

    Raises:
        OSError: the file cannot be read.
        TypeError: the model is not an nn.Module, or `path` no name of a file.
        ValueError: the file is damaged or none of `save`; weights, graph, dtype or processor of the model, or the version of
            torch or pysal, are others than those of the file; or the model is in training mode.

    Example:
        >>> import tempfile, os
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU()).eval()
        >>> file = os.path.join(tempfile.mkdtemp(), "model.json")
        >>> prepare(model, torch.rand(1, 3, 16, 16), batch_size=4).save(file)
        >>> load_prepared(file, model).rows
        4
    """
    where = "pysal.load_prepared"
    model = _network(where, model)
    prepared = prepared_again(where, model, read(where, path), str(path))
    if prepared._forwards is not None:
        prepared._forwards.measures = True  # what the file does not know yet
    return prepared


def prepared_again(where: str, model: nn.Module, record: Record, source: str) -> PreparedModel:
    """Return what a record was made of, for the same model; see `load_prepared`.

    Args:
        where: the public name that was called, for errors.
        model: in eval mode.
        record: what was found out about it.
        source: of the record, for errors.
    """
    parameter = next((one for one in model.parameters() if one.dtype.is_floating_point), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    dtype = str(torch.float32 if parameter is None else parameter.dtype).removeprefix("torch.")
    if parameter is not None and dtype != record.dtype:
        refuse(where, "model", f"have the dtype {record.dtype} that {source} was made for", dtype)
    now = {"torch": str(torch.__version__), "pysal": _library.version(), "processor": processor(device)}
    for name, here in now.items():
        if (then := getattr(record, name)) != here:
            refuse(where, "path", f"be of this {name}, {here}", f"{source} of {then}: prepare the model again")
    if fingerprint(getattr(model, "_orig_mod", model)) != record.weights:
        refuse(where, "model", f"have the weights that {source} was made for", "others: prepare the model again")
    generator = torch.Generator(device="cpu").manual_seed(0)
    example = torch.rand((1, *record.shape), generator=generator, dtype=torch.float32, device="cpu")
    example = example.to(device, getattr(torch, record.dtype))
    precision: Any = record.precision
    try:
        return _prepared(model, example, precision, record.rows if record.rows_asked else None, record.gains, record)
    except Changed:
        refuse(where, "model", f"have the graph that {source} was made for", "another: prepare the model again")


def _network(where: str, model: object) -> nn.Module:
    """Return a model in eval mode as a module, of a program of torch.export with its layers.

    Raises:
        TypeError: it is none.
        ValueError: it is in training mode.
    """
    if isinstance(model, ExportedProgram):
        model = model.module()
    if isinstance(model, nn.Module) and is_graph_of_program(model):
        model = LayeredProgram(model)
    if not isinstance(model, nn.Module):
        refuse(where, "model", "be an nn.Module", type(model).__name__, TypeError)
    check_eval(where, model)
    return model


def _again(
    original: nn.Module, example: Tensor, precision: Precision, rows: int | None, asked: bool, gains: Gains | None
) -> PreparedModel:
    """Prepare a copy of a model, as what it is a copy of was."""
    prepared = prepare(original, example, precision=precision, batch_size=rows, gains=gains)
    prepared.rows_asked = asked
    return prepared


class Changed(Exception):
    """A model does not have the graph that was found before."""


def _build(prepared: PreparedModel, example: Tensor, known: Comparison | None, budget: Budget, batch_size: int | None) -> None:
    """Trace, fold and lower the model, and keep the result if it computes the same.

    Args:
        prepared: what is to be made.
        example: an image.
        known: what came of the comparison, where it was made before.
        budget: what measures, where that decides.
        batch_size: images per pass, where that was said.

    Raises:
        Changed: the comparison was of another graph.
        Exception: anything; the model runs as it is then.
    """
    model, notes = prepared.original, prepared._notes
    check_ordinary(model)
    if isinstance(model, LayeredProgram) and (reason := model.refuses(example)) is not None:
        raise RunsAsItIs(reason)
    rows = getattr(model, "rows_per_pass", None)
    images = list(batches(example, rows))
    mixed = prepared.precision == "mixed"
    exact: Exact | None = None
    if known is None:
        own = [own_pass(model, images[0])]  # ends without gradients: what it leaves on the model is copied with it
        way, traced, written = _captured(model, images, own, any_number=rows is None)
        digest = graph_fingerprint(traced)
        if _is_exported(prepared, example):
            prepared._forwards = Forwards(model, example, ModelState(model, written))
        exact = exact_pass(traced, images[0], example)
    else:
        way, (traced, written) = known.way, _ways(model, images[-1], any_number=rows is None)[known.way]()
        digest = graph_fingerprint(traced)
        if digest != known.graph:
            raise Changed
        if _is_exported(prepared, example):
            prepared._forwards = Forwards(model, example, ModelState(model, written))
        with torch.no_grad():
            note_shapes(traced).run(images[-1])
    graph = fold_graph(traced)
    narrow = in_bfloat16(graph) if prepared.precision == "bf16" and example.dtype == torch.float32 else None
    lowered = lower(graph, example, torch.bfloat16 if mixed else example.dtype)
    if not lowered:
        raise RunsAsItIs(NOTHING_FUSED)
    program = Program(graph, torch.bfloat16 if mixed else None)
    if example.device.type == "cpu":
        prepared.memory = FreedMemory(_bytes_of_passes(graph, example, batch_size or 0))
    if known is None:
        difference, gradient_difference = compared(graph, program, images, own, exact)
        float64, whole = (None, None) if exact is None else (exact.apart, exact.not_incremental)
        known = Comparison(way, digest, difference, gradient_difference, float64, whole)
    prepared.comparison = known
    state = ModelState(model, written)
    state.remember_values()
    prepared._state, prepared._graph, prepared.program = state, graph, program
    if narrow is not None:
        _lower_to_bfloat16(prepared, narrow, images[0], budget)
    else:
        prepared._graph = forward_graph(graph, program)
    prepared.replays = Replays(prepared.program) if example.is_cuda else None
    prepared.default_layer = _default_layer(model, example)
    fused = [module for module in graph.modules() if isinstance(module, FusedConvolution)]
    matrix = sum(module.matrix is not None for module in fused)
    winograd = sum(module.winograd is not None for module in fused)
    onednn = sum(module.onednn and module.matrix is None and module.winograd is None for module in fused)
    if fused:
        word = "convolution runs" if len(fused) == 1 else "convolutions run"
        notes["convolutions"] = f"{len(fused)} {word} fused, with batch norm, padding, shortcut and ReLU where they follow"
    if onednn:
        notes["onednn"] = f"{onednn} of them through oneDNN with weights arranged for it, channels_last"
    if matrix:
        notes["matrix unit"] = f"{matrix} of them on the matrix unit, in three parts of bf16 that make up float32"
    if winograd:
        notes["winograd"] = f"{winograd} of them by Winograd's algorithm, with a quarter of the multiplications"
    if linear := sum(isinstance(module, FusedLinear) for module in graph.modules()):
        word = "linear layer has its" if linear == 1 else "linear layers have their"
        notes["linear"] = f"{linear} {word} weights arranged once, and send a gradient to their input alone"
    if blocks := sum(isinstance(block, BlockOperator) for block in program.blocks.values()):
        word = "block runs" if blocks == 1 else "blocks run"
        notes["blocks"] = (
            f"{blocks} inverted residual {word} in one pass over memory, what lies between their convolutions in a cache"
        )
    if smooth := sum(isinstance(block, SmoothBlockOperator) for block in program.blocks.values()):
        word = "block runs" if smooth == 1 else "blocks run"
        notes["smooth blocks"] = (
            f"{smooth} inverted residual {word} in two passes over memory, what lies between their convolutions in a cache"
        )
    if squeezes := sum(isinstance(block, SqueezeOperator) for block in program.blocks.values()):
        notes["gates"] = (
            f"{squeezes} squeeze-and-excitation run with the activation before them, whose result is never written down"
        )
    notes["backward"] = (
        "the backward pass is for the input alone and keeps one bit per ReLU element, the input of other activations"
    )
    notes["output"] = f"output within {known.output:.1e} of the model's, relative to its largest"
    notes["gradient"] = f"gradient within {known.gradient:.1e} of the model's, in l2"
    if known.float64 is not None:
        notes["float64"] = f"in float64, where rounding moves no gate, gradient within {known.float64:.1e} of the model's"
    try:
        if known.whole is not None:
            raise NotIncremental(known.whole)
        at_once = [operator.block for operator in program.blocks.values() if isinstance(operator, BlockOperator)]
        prepared._incremental = Incremental(graph, example, blocks=at_once)
        notes["boxes"] = (
            f"leave-one-out recomputes what a segment reaches: {prepared._incremental.followed} layers follow boxes"
        )
    except Exception as reason:  # of NotIncremental, or of an op that cannot be run in parts
        notes["boxes"] = f"leave-one-out runs whole images: {why_whole(reason)}"
    if mixed:
        forward = "TF32" if example.is_cuda else "float32"
        notes["mixed"] = f"the backward pass runs in bf16; ReLU gates are those of the {forward} forward pass"


def _bytes_of_passes(graph: fx.GraphModule, example: Tensor, rows: int) -> int:
    """Return the bytes of all values of a graph and of their gradients, in passes of so many rows or the largest tried."""
    numbers = sum(math.prod(shape[1:]) for shape in shapes_of(graph, example).values())
    return 2 * max(rows, most_rows(example)) * numbers * example.element_size()


def _lower_to_bfloat16(prepared: PreparedModel, narrow: fx.GraphModule, noise: Tensor, budget: Budget) -> None:
    """Let bf16 passes run on weights, maps and gradients in bf16, where they are as near to float32 as the model's own are.

    Autocast converts the weights and the gradients of every layer in every pass. On a CPU that multiplies float32 faster, or
    where bf16 is too far away, all is float32.

    Args:
        prepared: with the program in the example's dtype, which has been compared.
        narrow: the folded graph in bf16.
        noise: (N, C, H, W), on which the two are compared.
        budget: what measures.
    """
    program, graph, device = prepared.program, prepared._graph, noise.device
    assert program is not None
    assert isinstance(graph, fx.GraphModule)
    wide, reason = Program(graph, None, noise.dtype), ""
    try:
        lower(narrow, noise[:1].bfloat16(), torch.bfloat16)
        candidate, forward = Program(narrow, torch.bfloat16, torch.bfloat16), InDtype(narrow, torch.bfloat16)
        exact = recorded(program, noise)
        with precision_mode("bf16", device, backward=True):
            found, usual = recorded(candidate, noise).apart(exact), run(prepared.original, noise).apart(exact)
            with torch.no_grad():
                plain = distance(forward(noise), exact.output, float("inf"))
            told = f"gradient {found[1]:.2g} from that of float32 in l2, the model's under autocast {usual[1]:.2g}"
            # the graph is the one that was compared; rounding moves other gates in each of the two
            if max(found[0], plain) > max(HALF_TOLERANCE, 2 * usual[0]) or found[1] > max(GRADIENT_TOLERANCE, 2 * usual[1]):
                reason = f"all in bf16 it would be further away, {told}"
            elif device.type == "cpu":
                ways: dict[str, Way] = {"bf16": lambda: recorded(candidate, noise), "float32": lambda: recorded(wide, noise)}
                least = least_seconds(ways, {"float32": "bf16"}, budget)
                if least["bf16"] > least["float32"]:
                    reason = "in bf16 it would be slower on this processor"
    except Exception as error:  # of the model's own code, which may want another dtype
        reason = reason_of(error)
    if not reason:
        prepared._graph, prepared.program = forward, candidate
        more = ": precision='mixed' keeps the gates of ReLUs" if found[1] > GATES_MOVED else ""
        prepared._notes["bf16"] = f"weights, maps and gradients are in bf16, none is converted between layers; {told}{more}"
    elif device.type == "cpu":
        prepared._graph, prepared.program = InDtype(graph, noise.dtype), wide
        prepared._notes["bf16"] = f"runs in {str(noise.dtype).removeprefix('torch.')}: {reason}"
    else:
        prepared._notes["bf16"] = f"bf16 by autocast, layer by layer: {reason}"


def _ways(model: nn.Module, images: Tensor, *, any_number: bool) -> dict[str, Callable[[], Captured]]:
    """Return what captures a model, by name, in the order in which it is tried."""
    ways: dict[str, Callable[[], Captured]] = {
        "torch.fx": lambda: trace(model),
        "torch.export": lambda: capture(model, images, any_number=any_number),
    }
    # a program says itself what torch.fx would not find in it
    return dict(reversed(ways.items())) if isinstance(model, LayeredProgram) else ways


def _captured(
    model: nn.Module, images: Sequence[Tensor], own: list[Pass], *, any_number: bool
) -> tuple[str, fx.GraphModule, list[tuple[str, str]]]:
    """Return how a graph was captured that computes what the model does, the graph, and what the model's forward pass writes.

    torch.fx comes first: it takes a tenth of the time, and sees where gradients stop and modules are called.

    Args:
        model: the model.
        images: batches on which both are compared.
        own: the model's passes on the first of them; those on the others are appended.
        any_number: whether the model takes any number of images.

    Raises:
        RunsAsItIs: neither it nor torch.export gives such a graph.
    """
    for way, make in _ways(model, images[-1], any_number=any_number).items():
        try:
            traced, written = make()
            own += [own_pass(model, batch, without_gradients=False) for batch in images[len(own) :]]
            _check_same(traced, images, own)
        except Exception as found:  # of what was captured, too, when it is run
            reason = reason_of(found)
        else:
            return way, traced, written
    raise RunsAsItIs(reason)


def _check_same(traced: fx.GraphModule, images: Sequence[Tensor], own: Sequence[Pass]) -> None:
    """Hold a graph as it was captured, which calls the model's own operations, against the model.

    Raises:
        RunsAsItIs: it computes something else.
    """
    for batch, expected in zip(images, own, strict=True):
        if batch is images[-1]:  # what is the same for all images shows in its shapes
            found = run(note_shapes(traced).run, batch)
        else:  # an image alone, which is in the last batch, too: there its gradient is compared
            with torch.no_grad():
                found = Pass(traced(batch.clone()), expected.gradient)
        output, gradient = found.apart(expected)
        if not max(output, gradient) <= TRACED[batch.dtype]:
            what = "output" if output > TRACED[batch.dtype] else "gradient"
            raise RunsAsItIs(
                f"its traced graph's {what} is {max(output, gradient):.1e} away from its own: it "
                "decides something anew in every pass, or acts on gradients where tracing does not see it"
            )


def _is_exported(prepared: PreparedModel, example: Tensor) -> bool:
    """Say whether ONNX Runtime could run the passes without gradients: float32 on a CPU, of any number of images."""
    fixed = getattr(prepared.original, "rows_per_pass", None)
    return fixed is None and example.device.type == "cpu" and example.dtype == torch.float32 and prepared.precision != "bf16"


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
