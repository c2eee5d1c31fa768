"""Backward passes over the same forward pass: several methods, or several classes, for the price of one forward."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pysal._checks import refuse
from pysal.engine.layers.features import Features, Layer, capture
from pysal.engine.model.gradient_layouts import lay_out
from pysal.engine.model.gradients import gradients
from pysal.engine.model.model_state import parts
from pysal.engine.model.not_applicable import NotApplicable, not_differentiable, reentrant
from pysal.engine.model.relu_rules import OtherActivations, ReluRule, ReluRules
from pysal.engine.prepared.model import PreparedModel
from pysal.engine.request.passes import Passes
from pysal.engine.running.states import Hooks, restoring
from pysal.engine.tape.tape import Place, Program, Tape

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
        return _plainly(plan, batch, rows) if alone else _with_autograd(plan, batch, rows, wanted, required)
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
        results.append(_with_autograd(plan, batch, rows, with_autograd, required))
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
    return ReluRules(plan.where, ruled[0].rule, ruled[0].other) if ruled else None


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
    table, scores = plan.score_of(plan.forward(plan.model, leaf.clone(), rows), rows)
    if not scores.requires_grad:
        raise not_differentiable(plan.where)
    lay_out(scores, len(rows))
    (grad,) = gradients(scores, (leaf,))
    return Swept(None if table is None else table.detach().clone(), scores.detach(), {PLAIN: (_found(plan, grad),)})


def _with_autograd(
    plan: Passes, batch: Tensor, rows: Tensor, wanted: Sequence[Sweep], required: bool, *, may_cut: bool = True
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
        and not _has_backward_hooks(plan.layered_model)
    )
    hooks = Hooks()  # gone, as what they change, when the state is put back
    with torch.set_grad_enabled(not cut), _reaching_all(plan, rules):
        features = {layer: capture(where, layer, hooks, cut=cut) for layer, where in layers.items()}
        leaf = _leaf(batch).requires_grad_(not cut)
        with rules.recording() if rules else contextlib.nullcontext():
            model = plan.layered_model if layers else plan.eager_model if rules else plan.model
            table, scores = plan.score_of(plan.forward(model, leaf.clone(), rows), rows)
        if cut and not torch.is_grad_enabled():  # the layer is in a block of the model's own that sets it, and put it back
            hooks.close()
            return _with_autograd(plan, batch, rows, wanted, required, may_cut=False)
        lay_out(scores, len(rows))
        if rules is not None and _has_checkpoint(scores):
            raise reentrant(plan.where)
        activations = {layer: features[layer].captured() for layer in layers}
        found: dict[Sweep, Found] = {}
        with rules.recording() if rules else contextlib.nullcontext():  # of what a checkpoint runs to show what it kept
            wanted = _applicable(rules, lambda rules: rules.finish(scores, leaf), wanted, required)
        kinds = list(dict.fromkeys(one.rule for one in wanted))
        for rule in kinds:
            if rules is not None:
                rules.rule = rule
            some = [one for one in wanted if one.rule == rule]
            ends = {one.layer: leaf if one.layer is None else activations[one.layer] for one in some}
            grads: Sequence[Tensor | None] = [None] * len(ends)
            if scores.requires_grad:
                again = rule != kinds[-1]
                total, sources = scores.sum(), list(ends.values())
                if rules is None:
                    curved = any(one.curvature for one in some)
                    grads = torch.autograd.grad(
                        total, sources, retain_graph=again or curved, allow_unused=True, create_graph=curved
                    )
                else:
                    grads = rules.gradients(total, sources, retain_graph=again)
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


def _bent(gradient: Tensor, activation: Tensor) -> Tensor | float:
    """Return the second derivative of the score at an activation, times that: 0 of what is linear in it."""
    if not gradient.requires_grad:
        return 0.0
    along = activation.detach()
    (found,) = torch.autograd.grad(gradient, activation, along, retain_graph=True, allow_unused=True)
    return 0.0 if found is None else found


def _has_backward_hooks(model: object) -> bool:
    while not isinstance(model, nn.Module):
        if not hasattr(model, "__wrapped__"):
            return False
        model = model.__wrapped__
    return any(module._backward_hooks or module._backward_pre_hooks for _, module in parts(model))


@contextlib.contextmanager
def _reaching_all(plan: Passes, rules: ReluRules | None) -> Iterator[None]:
    """Say in one sentence where rules do not reach what torch runs in its own way."""
    try:
        yield
    except RuntimeError as error:
        if rules is None:
            raise
        if "functorch transforms" in str(error):
            raise NotApplicable(f"{plan.where}: {UNREACHED}, got some inside torch.func: run the members one by one") from error
        raise


def _has_checkpoint(scores: Tensor) -> bool:
    """Say whether a part of the graph behind scores is run only on the way back, by a reentrant checkpoint."""
    seen, left = set(), [scores.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        if node.name().startswith("CheckpointFunction"):
            return True
        seen.add(node)
        left += [one for one, _ in node.next_functions]
    return False


def _reduced(one: Sweep, activation: Tensor, gradient: Tensor) -> Found:
    return (activation, gradient) if one.reduce is None else one.reduce(activation, gradient)


def _leaf(batch: Tensor) -> Tensor:
    return (batch.clone() if batch.is_inference() else batch).detach().requires_grad_()


def _found(plan: Passes, gradient: Tensor | None) -> Tensor:
    if gradient is None:
        raise not_differentiable(plan.where)
    return gradient
