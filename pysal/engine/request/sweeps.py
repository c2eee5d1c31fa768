"""Backward passes over the same forward pass: several methods, or several classes, for the price of one forward."""

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pysal._checks import refuse
from pysal.engine.layers.features import Features, Layer, capture
from pysal.engine.model.gradient_layouts import lay_out, lay_out_at, nodes_behind
from pysal.engine.model.gradients import gradients
from pysal.engine.model.model_state import parts
from pysal.engine.model.not_applicable import NotApplicable, not_differentiable, reentrant
from pysal.engine.model.relu_rules import OtherActivations, ReluRule, ReluRules
from pysal.engine.prepared.model import PreparedModel
from pysal.engine.request.passes import Passes
from pysal.engine.running.states import Hooks, restoring
from pysal.engine.tape.tape import Place, Program, Tape

# Bytes of a pass that is over before a mode of Python's has seen its calls: four images of 64 x 64 pixels.
UNRECORDED = 4 * 3 * 64 * 64 * 4
_OF_A_DERIVATIVE = re.compile("Backward.*Backward")
UNREACHED = "the model's activations must run where the rule of ReLUs reaches them"

# What a sweep found: the gradient of the images alone, or what `reduce` made of a layer's activation and gradient.
Found = tuple[Tensor, ...]


@dataclass(frozen=True)
class Sweep:
    """A backward pass that a method wants. Equal sweeps are made once.

    Attributes:
        rule: of the ReLUs.
        other: what to do with activations the rule does not define.
        layer: where the gradient is wanted; None = at the images.
        reduce: (activation, gradient) of the layer -> what is kept of them, (N, ...) each.
        curvature: of a layer; c > 0 has `reduce` be told G - c H A in the gradient's place, H being the score's second
            derivative at the activation A.
        where: public name of the method whose layer it is, for errors.
    """

    rule: ReluRule = "plain"
    other: OtherActivations = "error"
    layer: Layer | None = None
    reduce: Callable[[Tensor, Tensor], Found] | None = None
    curvature: float = 0.0
    where: str = field(default="pysal", compare=False)
    _hash: int = field(init=False, repr=False, compare=False)  # asked for several times in each call

    def __post_init__(self) -> None:
        """Note the hash."""
        object.__setattr__(self, "_hash", hash((self.rule, self.other, self.layer, self.reduce, self.curvature)))

    def __hash__(self) -> int:
        """Return the hash of what is compared."""
        return self._hash


PLAIN = Sweep()
"""The gradient at the images."""


@dataclass(frozen=True)
class Swept:
    """What one forward pass and its sweeps found: class scores (N, K) or None, scores (N,), and each sweep's result."""

    table: Tensor | None
    scores: Tensor
    found: dict[Sweep, Found]


@restoring
def sweep(plan: Passes, batch: Tensor, rows: Tensor, wanted: Sequence[Sweep], *, required: bool = True) -> Swept:
    """Run the model once on rows of a plan's images and sweep back as often as asked.

    Args:
        plan: runs the model.
        batch: (N, C, H, W).
        rows: (N,), the image each belongs to.
        wanted: sweeps; those under a rule have the same `other`.
        required: whether to refuse a rule that does not apply to the model; else its sweeps are left out.

    Raises:
        NotApplicable: a rule does not apply, or the model is not differentiable.
    """
    others = list(dict.fromkeys(one.other for one in wanted if one.rule != "plain")) if len(wanted) > 1 else ()
    if len(others) > 1:
        groups = [[one for one in wanted if one.rule == "plain" or one.other == others[0]]]
        groups += [[one for one in wanted if one.rule != "plain" and one.other == other] for other in others[1:]]
        parts = [sweep(plan, batch, rows, group, required=required) for group in groups]
        return Swept(parts[0].table, parts[0].scores, {one: found for part in parts for one, found in part.found.items()})
    swept = plan.differentiated(lambda: _sweep(plan, batch, rows, wanted, required))
    plan.check_rows(rows)
    return swept


def _sweep(plan: Passes, batch: Tensor, rows: Tensor, wanted: Sequence[Sweep], required: bool) -> Swept:
    """Make sweeps with one `other`."""
    program = taped(plan, batch)
    plan.modes(grad=True).set()  # until `sweep` ends
    if program is None:
        alone = len(wanted) == 1 and wanted[0] is PLAIN
        return _plainly(plan, batch, rows) if alone else _by_autograd(plan, batch, rows, wanted, required)
    places: dict[Layer, Place] = {}
    for one in wanted:
        place = program.layer(one.layer) if one.layer is not None else None
        if one.layer is not None and place is not None:
            places[one.layer] = place
    first_order = [one for one in wanted if not one.curvature]
    on_tape = [one for one in first_order if one.layer is None or one.layer in places]
    with_autograd = [one for one in wanted if one not in on_tape]
    results: list[Swept] = []
    if on_tape:
        results.append(_on_tape(plan, program, batch, rows, on_tape, places, required))
    if with_autograd:
        results.append(_by_autograd(plan, batch, rows, with_autograd, required))
    found = {one: result for part in results for one, result in part.found.items()}
    return Swept(results[0].table, results[0].scores, found)


@restoring
def class_gradients(plan: Passes, batch: Tensor, rows: Tensor, classes: Tensor, *, largest: int, at_once: int) -> Tensor:
    """Return the gradients (N, T, C, H, W) of the scores of T classes per row from one forward pass.

    Args:
        plan: runs the model.
        batch: (N, C, H, W).
        rows: (N,), the image each belongs to.
        classes: (N, T).
        largest: of the classes of all rows.
        at_once: most gradients in one sweep of a prepared model.
    """
    found = plan.differentiated(lambda: _class_gradients(plan, batch, rows, classes, largest, at_once))
    plan.check_rows(rows)
    return found


def _class_gradients(plan: Passes, batch: Tensor, rows: Tensor, classes: Tensor, largest: int, at_once: int) -> Tensor:
    program = taped(plan, batch)
    columns = range(classes.shape[1])
    with contextlib.ExitStack() as stack:
        stack.enter_context(plan.modes(grad=True))
        if program is None:
            leaf = _leaf(batch)
            output = plan.forward(plan.model, leaf.clone(), rows)
        else:
            tape = stack.enter_context(_recorded(plan, program, batch))
            output = leaf = tape.output.detach().requires_grad_()
        table = plan.score.table(output, rows)
        assert table is not None  # the target is a class
        if plan.score.look.open:
            plan.score.look_at(table)
        if largest >= table.shape[1]:
            refuse(plan.where, "classes", f"be below the model's {table.shape[1]} classes", largest)
        scores = plan.score.scaled(table).gather(1, classes).sum(0)  # of each class, over the images
        if not scores.requires_grad:
            raise not_differentiable(plan.where)
        lay_out(scores, len(rows))
        pulled = (torch.autograd.grad(scores[t], leaf, retain_graph=True, allow_unused=True)[0] for t in columns)
        if program is None:
            found = [_found(plan, one) for one in pulled]
        else:
            number = max(1, at_once // len(batch))
            seeds = torch.stack([_found(plan, one) for one in pulled]).split(number)
            swept = [tape.sweep(some.flatten(0, 1))[0] for some in seeds]
            found = [part for one in swept for part in _found(plan, one).unflatten(0, (-1, len(batch)))]
        return torch.stack(found, 1)


def taped(plan: Passes, batch: Tensor) -> Program | None:
    """Return the program to record for a batch, None where the model is to be run as it is."""
    model = plan.model
    return model.program_for(batch) if isinstance(model, PreparedModel) and not plan.extra_inputs else None


def _recorded(
    plan: Passes, program: Program, batch: Tensor, layers: Sequence[Place] = ()
) -> contextlib.AbstractContextManager[Tape]:
    """Return the context of a recorded pass, which may be a replay of an earlier one with the same shape."""
    replays = plan.model.replays if isinstance(plan.model, PreparedModel) else None
    return contextlib.nullcontext(program.record(batch, layers)) if replays is None else replays.recording(batch, layers)


def _rules(plan: Passes, wanted: Sequence[Sweep]) -> ReluRules | None:
    """Return what records the forward pass, where a sweep follows a rule."""
    ruled = [one for one in wanted if one.rule != "plain"]
    return ReluRules(plan.where, ruled[0].rule, ruled[0].other, {one.rule for one in wanted}) if ruled else None


def _applicable(
    rules: ReluRules | None, check: Callable[[ReluRules], None], wanted: Sequence[Sweep], required: bool
) -> list[Sweep]:
    """Return the sweeps that can be made."""
    if rules is not None:
        try:
            check(rules)
        except NotApplicable:
            if required:
                raise
            return [one for one in wanted if one.rule == "plain"]
    return list(wanted)


def _on_tape(
    plan: Passes,
    program: Program,
    batch: Tensor,
    rows: Tensor,
    wanted: Sequence[Sweep],
    places: dict[Layer, Place],
    required: bool,
) -> Swept:
    rules, layers = _rules(plan, wanted), list(dict.fromkeys(places.values()))
    if rules is None:
        with _recorded(plan, program, batch, layers) as tape:
            return _swept(plan, tape, rows, wanted, places, None, required)
    with rules.recording():  # which hooks what it meets: a pass that is replayed would keep the hooks
        tape = program.record(batch, layers)
    return _swept(plan, tape, rows, wanted, places, rules, required)


def _swept(
    plan: Passes,
    tape: Tape,
    rows: Tensor,
    wanted: Sequence[Sweep],
    places: dict[Layer, Place],
    rules: ReluRules | None,
    required: bool,
) -> Swept:
    output = tape.output.detach().requires_grad_()
    table, scores = plan.score_of(output, rows)
    (seed,) = torch.autograd.grad(scores.sum(), output, allow_unused=True) if scores.requires_grad else (None,)
    found: dict[Sweep, Found] = {}
    wanted = _applicable(rules, lambda rules: rules.finish_tape(tape), wanted, required)
    for rule in dict.fromkeys(one.rule for one in wanted):
        if rules is not None:
            rules.rule = rule
        some = [one for one in wanted if one.rule == rule]
        at = {one.layer: places[one.layer] for one in some if one.layer is not None}
        grad, grads = tape.sweep(
            _found(plan, seed), rule, layers=list(dict.fromkeys(at.values())), to_input=any(one.layer is None for one in some)
        )
        for one in some:
            if one.layer is None:
                found[one] = (_found(plan, grad),)
            else:
                used = Features(one.where, one.layer).used(grads.get(at[one.layer]))
                found[one] = _reduced(one, tape.values[at[one.layer]], used)
    return Swept(None if table is None else table.detach().clone(), scores.detach(), found)


def _plainly(plan: Passes, batch: Tensor, rows: Tensor) -> Swept:
    """Find the gradient at the images, which is what most calls are about: what sweeps need besides costs time."""
    leaf = _leaf(batch)
    table, scores = plan.score_of(plan.forward(plan.model, leaf.clone(), rows), rows, leaf)
    if not scores.requires_grad:
        raise not_differentiable(plan.where)
    lay_out(scores, len(rows))
    (grad,) = gradients(scores, (leaf,))
    return Swept(None if table is None else table.detach().clone(), scores.detach(), {PLAIN: (_found(plan, grad),)})


class _OtherWay(Exception):
    """Rules may reach activations if the pass is watched and this one was not, or the other way round."""


def _by_autograd(plan: Passes, batch: Tensor, rows: Tensor, wanted: Sequence[Sweep], required: bool) -> Swept:
    """Make sweeps of a pass that is watched for ReLUs if that is worth its time; in the other way where that shows too few."""
    ruled = [one for one in wanted if one.rule != "plain"]
    general = any(one.other == "generalised" for one in ruled)
    watched = bool(ruled) and (general or is_watched(plan.device, batch.nbytes))
    watched = plan.root._shared.get("watched for ReLUs", watched) if ruled and not general else watched
    cause: _OtherWay | None = None
    for way in (watched, not watched) if ruled and not general else (watched,):
        try:
            # of two the first must leave no hooks behind
            attempt = _one_way if ruled and any(one.layer is not None for one in wanted) else _with_autograd
            return attempt(plan, batch, rows, wanted, required, recorded=way)
        except _OtherWay as error:
            cause = error
            plan.root._shared["watched for ReLUs"] = not way  # the passes to come need not be made twice
    raise NotApplicable(f"{plan.where}: {UNREACHED}, got some inside torch.func: run the members one by one") from cause


def _with_autograd(
    plan: Passes,
    batch: Tensor,
    rows: Tensor,
    wanted: Sequence[Sweep],
    required: bool,
    *,
    recorded: bool,
    may_cut: bool = True,
) -> Swept:
    layers = {one.layer: one.where for one in wanted if one.layer is not None}
    rules = _rules(plan, wanted)
    # nothing below a single layer is kept where nothing else is wanted; its input may be used by others, and hooks on the way
    # back are handed gradients of modules' inputs
    cut = (
        may_cut
        and len(layers) == 1
        and all(one.layer is not None for one in wanted)
        and not any(getattr(layer, "at_input", False) for layer in layers)
        and not has_backward_hooks(plan.layered_model)
    )
    hooks = Hooks() if layers else None  # gone, as what they change, when the state is put back
    with torch.set_grad_enabled(not cut), _seeing_all(recorded) if rules else contextlib.nullcontext():
        features = {layer: capture(where, layer, hooks, cut=cut) for layer, where in layers.items() if hooks}
        leaf = _leaf(batch).requires_grad_(not cut)
        with rules.recording() if rules and recorded else contextlib.nullcontext():
            model = plan.layered_model if layers else plan.eager_model if rules else plan.model
            table, scores = plan.score_of(plan.forward(model, leaf.clone(), rows), rows, leaf)
        if cut and not torch.is_grad_enabled():  # the layer is in a block of the model's own that sets it, and put it back
            if hooks is not None:
                hooks.close()
            return _with_autograd(plan, batch, rows, wanted, required, recorded=recorded, may_cut=False)
        nodes = nodes_behind(scores) if rules is not None or len(rows) == 1 else []
        if len(rows) == 1:
            lay_out_at(nodes)
        if rules is not None:
            if any(type(node).__name__.startswith("CheckpointFunction") for node in nodes):  # run only on the way back
                raise reentrant(plan.where)
            if not recorded and hides_relus(nodes):
                raise _OtherWay
        activations = {layer: features[layer].captured() for layer in layers}
        found: dict[Sweep, Found] = {}
        if rules is not None:
            with rules.recording() if recorded else contextlib.nullcontext():  # of what a checkpoint runs to show what it kept
                wanted = _applicable(rules, lambda rules: rules.finish(scores, leaf), wanted, required)
        kinds = list(dict.fromkeys(one.rule for one in wanted))
        for rule in kinds:
            if rules is not None:
                rules.rule = rule
            some = [one for one in wanted if one.rule == rule]
            ends = {one.layer: leaf if one.layer is None else activations[one.layer] for one in some}
            grads: Sequence[Tensor | None] = [None] * len(ends)
            if scores.requires_grad:
                again, sources = rule != kinds[-1], tuple(ends.values())
                if rules is not None and recorded:
                    grads = rules.gradients(scores.sum(), sources, retain_graph=again)
                elif any(one.curvature for one in some):
                    grads = torch.autograd.grad(scores.sum(), sources, create_graph=True, allow_unused=True)
                else:
                    grads = gradients(scores, sources, keep_graph=again)
            at = dict(zip(ends, grads, strict=True))
            for one in some:
                if one.layer is None:
                    found[one] = (_found(plan, at[None]),)
                else:
                    used = features[one.layer].used(at[one.layer])
                    if one.curvature:
                        used = used - one.curvature * _bent(used, activations[one.layer])
                    found[one] = _reduced(one, activations[one.layer].detach(), used.detach())
        return Swept(None if table is None else table.detach().clone(), scores.detach(), found)


_one_way = restoring(_with_autograd)


def _bent(gradient: Tensor, activation: Tensor) -> Tensor | float:
    """Return the second derivative of the score at an activation, times that: 0 of what is linear in it."""
    if not gradient.requires_grad:
        return 0.0
    along = activation.detach()
    (found,) = torch.autograd.grad(gradient, activation, along, retain_graph=True, allow_unused=True)
    return 0.0 if found is None else found


def has_backward_hooks(model: object) -> bool:
    """Whether hooks on the way back are handed the gradients of a model's parts, which must then have them."""
    while not isinstance(model, nn.Module):
        if not hasattr(model, "__wrapped__"):
            return False
        model = model.__wrapped__
    return any(module._backward_hooks or module._backward_pre_hooks for _, module in parts(model))


def is_watched(device: torch.device, size: int) -> bool:
    """Whether it is worth its time to watch a pass of so many bytes for ReLUs."""
    return device.type != "cpu" or size > UNRECORDED


@contextlib.contextmanager
def _seeing_all(recorded: bool) -> Iterator[None]:
    """Have the pass made in the other way where this one fails: what is watched inside torch.func, or has lost its gates."""
    try:
        yield
    except RuntimeError as error:
        if ("functorch transforms" if recorded else "modified by an inplace operation") in str(error):
            raise _OtherWay from error
        raise


def hides_relus(nodes: Sequence[Any]) -> bool:
    """Whether ReLUs may hide among autograd nodes: in place in a part of a tensor, or in a derivative that the model takes."""
    names = {type(node).__name__ for node in nodes} | {node.name() for node in nodes if type(node).__name__ == "CppFunction"}
    return any("CopySlices" in name or _OF_A_DERIVATIVE.search(name) for name in names)


def _reduced(one: Sweep, activation: Tensor, gradient: Tensor) -> Found:
    return (activation, gradient) if one.reduce is None else one.reduce(activation, gradient)


def _leaf(batch: Tensor) -> Tensor:
    return (batch.clone() if batch.is_inference() else batch).detach().requires_grad_()


def _found(plan: Passes, gradient: Tensor | None) -> Tensor:
    if gradient is None:
        raise not_differentiable(plan.where)
    return gradient
