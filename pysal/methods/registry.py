"""The methods by name: what `explain` and the command line offer, and how each map is drawn."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from pysal.engine.attribution import Attribution
from pysal.engine.target import ScoreKind
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
        attribute: the core, `attribute(plan, **options) -> Attribution`.
        score: which score it explains unless told.
        reduction: how its channels become one picture: "none" where there is one, "max_abs" or "sum".
        signed: whether that picture has a sign.
        summary: what the map says, in a line.
        cost: model passes per image, in words.
    """

    name: str
    title: str
    attribute: Callable[..., Attribution]
    score: ScoreKind
    reduction: Literal["none", "max_abs", "sum"]
    signed: bool
    summary: str
    cost: str


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            "leave_one_out",
            "Leave-one-out",
            leave_one_out.attribute,
            "probability",
            "none",
            True,
            "how much the probability drops when a segment is filled in",
            "1 forward per segment, + 1",
        ),
        Method(
            "gradient",
            "Gradient",
            gradient.attribute,
            "logit",
            "max_abs",
            False,
            "how strongly the score reacts to each pixel",
            "1 forward and backward",
        ),
        Method(
            "guided_backprop",
            "Guided backprop",
            guided_backprop.attribute,
            "logit",
            "max_abs",
            False,
            "the gradient through what excites the score only",
            "1 forward and backward",
        ),
        Method(
            "grad_cam",
            "Grad-CAM",
            grad_cam.attribute,
            "logit",
            "none",
            False,
            "where a layer's features speak for the class",
            "1 forward, backward to the layer",
        ),
        Method(
            "guided_grad_cam",
            "Guided Grad-CAM",
            grad_cam.attribute_guided,
            "logit",
            "max_abs",
            False,
            "guided backprop where Grad-CAM looks",
            "1 forward, 2 backward",
        ),
        Method(
            "smooth_grad",
            "SmoothGrad",
            smooth_grad.attribute,
            "logit",
            "max_abs",
            False,
            "the mean gradient over noisy copies",
            "1 forward and backward per sample (50)",
        ),
        Method(
            "integrated_gradients",
            "Integrated Gradients",
            integrated_gradients.attribute,
            "logit",
            "sum",
            True,
            "each pixel's share of the score, from a black image",
            "1 forward and backward per step (50)",
        ),
        Method(
            "blur_integrated_gradients",
            "Blur Integrated Gradients",
            blur_integrated_gradients.attribute,
            "logit",
            "sum",
            True,
            "each pixel's share of the score, from a blurred image",
            "1 forward and backward per step (100)",
        ),
    )
}
