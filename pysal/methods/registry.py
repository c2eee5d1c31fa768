"""The methods by name: what `explain` and the command line offer, and how each map is drawn."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from pysal.engine.request.attribution import Attribution, default_of, with_defaults
from pysal.engine.request.plan import Plan
from pysal.engine.request.score import ScoreKind
from pysal.engine.request.work import Work
from pysal.methods import (
    blur_integrated_gradients,
    grad_cam,
    gradient,
    guided_backprop,
    integrated_gradients,
    leave_one_out,
    smooth_grad,
)


@dataclass(frozen=True)
class Method:
    """A method as `explain` sees it.

    Attributes:
        name: the public function's.
        title: for people.
        prepare: the core, `prepare(plan, **options) -> Work`, with the public function's defaults.
        score: which score it explains unless told.
        reduction: how its channels become one picture: "none" where there is one, "max_abs" or "sum".
        signed: whether that picture has a sign.
        summary: what the map says, in a line.
        cost: model passes per image, in words.
    """

    name: str
    title: str
    prepare: Callable[..., Work]
    score: ScoreKind
    reduction: Literal["none", "max_abs", "sum"]
    signed: bool
    summary: str
    cost: str

    def attribute(self, plan: Plan, **options: Any) -> Attribution:
        """Return what the method finds on a plan's images, with all that it reports."""
        return self.prepare(plan, **options).run(report=True)


_CORES = {**smooth_grad.BASES, "smooth_grad": with_defaults(smooth_grad.prepare, smooth_grad.smooth_grad)}


def _method(
    public: Callable[..., Tensor],
    title: str,
    reduction: Literal["none", "max_abs", "sum"],
    signed: bool,
    summary: str,
    cost: str,
    per: str | None = None,
) -> Method:
    """Return a method by its public function, whose defaults it has; `per` names the option that the cost is multiplied by."""
    name = public.__name__
    if per is not None:
        cost = f"{cost} ({default_of(public, per)})"
    return Method(name, title, _CORES[name], default_of(public, "score"), reduction, signed, summary, cost)


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        _method(
            leave_one_out.leave_one_out,
            "Leave-one-out",
            "none",
            True,
            "how much the score drops when a segment is filled in",
            "1 forward per segment, + 1",
        ),
        _method(
            gradient.gradient,
            "Gradient",
            "max_abs",
            False,
            "how strongly the score reacts to each pixel",
            "1 forward and backward",
        ),
        _method(
            guided_backprop.guided_backprop,
            "Guided backprop",
            "max_abs",
            False,
            "the gradient through what excites the score only",
            "1 forward and backward",
        ),
        _method(
            grad_cam.grad_cam,
            "Grad-CAM",
            "none",
            False,
            "where a layer's features speak for the class",
            "1 forward, backward to the layer",
        ),
        _method(
            grad_cam.guided_grad_cam,
            "Guided Grad-CAM",
            "max_abs",
            False,
            "guided backprop where Grad-CAM looks",
            "1 forward, 2 backward",
        ),
        _method(
            smooth_grad.smooth_grad,
            "SmoothGrad",
            "max_abs",
            False,
            "the mean gradient over noisy copies",
            "1 forward and backward per sample",
            per="samples",
        ),
        _method(
            integrated_gradients.integrated_gradients,
            "Integrated Gradients",
            "sum",
            True,
            "each pixel's share of the score, from a black image",
            "1 forward and backward per step",
            per="steps",
        ),
        _method(
            blur_integrated_gradients.blur_integrated_gradients,
            "Blur Integrated Gradients",
            "sum",
            True,
            "each pixel's share of the score, from a blurred image",
            "1 forward and backward per step",
            per="steps",
        ),
    )
}
