"""Gradients that carry autograd's graph, to the model's weights and to the images: for losses that hold attributions."""

from typing import Any

import torch
from torch import Tensor

from pysal._checks import refuse
from pysal.engine.layers.features import Layer, capture
from pysal.engine.model.attention import SpelledOut
from pysal.engine.model.gradient_layouts import END, lay_out
from pysal.engine.model.not_applicable import NotApplicable, not_differentiable
from pysal.engine.prepared.model import PreparedModel
from pysal.engine.request.extra_inputs import ordinary
from pysal.engine.request.passes import Passes
from pysal.engine.request.request import Model
from pysal.engine.running.states import Hooks, restoring

# What autograd calls a derivative that has none of its own: of an operator of torch, of a function of somebody's.
_WITHOUT = {
    "torch::autograd::NotImplemented": "an operator of torch whose derivative has none of its own",
    "torch::autograd::Error": "an autograd.Function that is once_differentiable",
}
ARITHMETIC = ("float32", "tf32", "as set")


def check_graph(plan: Passes) -> None:
    """Refuse what gradients with a graph are not made of.

    Raises:
        NotApplicable: a prepared model.
        ValueError: a backward pass in other arithmetic than the forward pass.
    """
    if isinstance(plan.model, PreparedModel):
        got = "a prepared one, which keeps no graph: pass the model that was prepared"
        raise NotApplicable(f"{plan.where}: model must be one that autograd runs where create_graph is True, got {got}")
    if plan.precision not in ARITHMETIC:
        refuse(plan.where, "precision", "be 'float32' or 'tf32' where create_graph is True", repr(plan.precision))


@restoring
def gradients_with_graph(plan: Passes, batch: Tensor, rows: Tensor) -> Tensor:
    """Return df/dx (N, C, H, W) at each row of a batch, with its graph.

    Attention runs as its formula, since that which torch runs in one piece has no second derivative.

    Args:
        plan: runs the model.
        batch: (N, C, H, W); the graph goes on behind it where it has one.
        rows: (N,), the image each belongs to.

    Raises:
        NotApplicable: the model is not differentiable twice, or nothing that the gradient depends on requires its own.
    """
    found = plan.differentiated(lambda: _gradients(plan, batch, rows))
    plan.check_rows(rows)
    return found


@restoring
def layer_gradients_with_graph(plan: Passes, batch: Tensor, rows: Tensor, layer: Layer) -> tuple[Tensor, Tensor]:
    """Return a layer's activation A and df/dA, both with their graph; otherwise as `gradients_with_graph`."""

    def find() -> tuple[Tensor, Tensor]:
        features = capture(plan.where, layer, Hooks(), cut=False)
        scores, leaf = _scores(plan, plan.layered_model, batch, rows)
        activation = features.captured()
        found = features.used(_gradient(scores, activation))
        _check_twice(plan, found, None if leaf is batch else leaf)
        return activation, found

    found = plan.differentiated(find)
    plan.check_rows(rows)
    return found


def _gradients(plan: Passes, batch: Tensor, rows: Tensor) -> Tensor:
    scores, leaf = _scores(plan, plan.eager_model, batch, rows)
    found = _gradient(scores, leaf)
    if found is None:
        raise not_differentiable(plan.where)
    _check_twice(plan, found, None if leaf is batch else leaf)
    return found


def _scores(plan: Passes, model: Model, batch: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scores (N,) and the images that they are those of."""
    plan.modes(grad=True).set()
    leaf = batch if batch.requires_grad else ordinary(batch).detach().requires_grad_()
    with SpelledOut():
        _, scores = plan.score_of(plan.forward(model, leaf.clone(), rows), rows)
    lay_out(scores, len(rows))
    return scores, leaf


def _gradient(scores: Tensor, source: Tensor) -> Tensor | None:
    if not scores.requires_grad:
        return None
    return torch.autograd.grad(scores.sum(), source, create_graph=True, allow_unused=True)[0]


def _check_twice(plan: Passes, gradient: Tensor, own: Tensor | None) -> None:
    """Refuse a gradient that has no derivative with respect to anything of the caller's; `own`: what is not, None = nothing.

    Raises:
        NotApplicable: as said.
    """
    if "has a graph" in plan.root._shared:
        return
    where = plan.where
    nodes: list[Any] = [gradient.grad_fn]
    seen: set[Any] = {None, *nodes}
    depends = own is None
    for node in nodes:  # which grows
        if node is None:
            continue
        if node.name() in _WITHOUT:
            requirement = "be differentiable twice where create_graph is True"
            raise NotApplicable(f"{where}: model must {requirement}, got {_WITHOUT[node.name()]}")
        depends |= type(node) is END and node.variable is not own
        nodes += (one for one, _ in node.next_functions if one not in seen)
        seen.update(one for one, _ in node.next_functions)
    if not depends:
        requirement = "have weights, or inputs, that require gradients and change the gradient, where create_graph is True"
        raise NotApplicable(f"{where}: model must {requirement}, got none")
    plan.root._shared["has a graph"] = True
