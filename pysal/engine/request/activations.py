"""What a layer returns in passes without gradients, and what the score is with something else in its place."""

from collections.abc import Callable
from dataclasses import replace as with_changes
from typing import Any

from torch import Tensor

from pysal.engine.layers.features import Layer, capture
from pysal.engine.request.extra_inputs import ordinary
from pysal.engine.request.plan import Plan
from pysal.engine.running.states import Hooks, Restored, restoring


@restoring
def activations(plan: Plan, batch: Tensor, rows: Tensor, layer: Layer) -> tuple[Tensor, Layer]:
    """Return a layer's activation for rows of a plan's images, and the layer with the number of the run it comes from.

    Args:
        plan: runs the model.
        batch: (N, C, H, W).
        rows: (N,), the image each belongs to.
        layer: which.
    """
    with plan.modes(grad=False):
        features = capture(plan.where, layer, Hooks(), cut=False)
        plan.forward(plan.layered_model, ordinary(batch.clone()), rows)
        found = features.captured().detach()
    plan.check_rows(rows)
    return found, with_changes(layer, run=features.runs - 1) if layer.run == "last" else layer


@restoring
def scores_with(plan: Plan, batch: Tensor, rows: Tensor, layer: Layer, replace: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the score (N,) of rows of a plan's images with something else in the place of a layer's activation.

    Args:
        plan: runs the model.
        batch: (N, C, H, W); the model may overwrite it. Fewer images run up to the layer alone, and `replace` makes N out of
            nothing: where a model hands on more than this activation, that fails, or makes other scores.
        rows: (N,), the image each belongs to.
        layer: which; its run is a number, or None for its only one.
        replace: the activation -> what is passed on.
    """

    def model(*args: Any, **kwargs: Any) -> Any:
        with Restored():
            capture(plan.where, layer, Hooks(), cut=False, replace=replace)
            return plan.layered_model(*args, **kwargs)

    scores, _ = plan.scores(batch, rows, model)
    plan.check_rows(rows)
    return scores
