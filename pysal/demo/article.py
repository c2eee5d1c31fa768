"""The eight steps from hiding parts of a photo to sharing its score out: which two pictures to compare, and article.md."""

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from pysal.demo.session import Options

# Few enough passes for a picture within seconds, enough to see what the method does.
QUICK = Options(samples=8, steps=16)


@dataclass(frozen=True)
class Side:
    """One picture of a comparison: a method, its options and what to call it."""

    method: str
    title: str
    options: Options = QUICK


@dataclass(frozen=True)
class Knob:
    """The one thing that a step lets the reader move.

    Attributes:
        option: the field of Options.
        label: what the reader sees.
        low: least value.
        high: largest value.
        step: of the slider.
        value: to begin with.
    """

    option: str
    label: str
    low: float
    high: float
    step: float
    value: float


@dataclass(frozen=True)
class Step:
    """A step of the walk: the picture before it, the picture after it, and what can be moved, if anything."""

    left: Side
    right: Side
    knob: Knob | None = None

    def sides(self, value: float | None) -> tuple[Side, Side]:
        """Return both pictures with the knob at `value`; None leaves them as they are."""
        if self.knob is None or value is None:
            return self.left, self.right
        option = self.knob.option
        kind = type(getattr(QUICK, option))
        left, right = (
            replace(side, options=replace(side.options, **{option: kind(value)})) for side in (self.left, self.right)
        )
        return left, right


FEW = replace(QUICK, cut="grid", segments=16)
SUPERPIXELS = Side("leave_one_out", "Leave-one-out, superpixels")
GRADIENT = Side("gradient", "Gradient")
GUIDED = Side("guided_backprop", "Guided backprop")
SMOOTH_GUIDED = Side("smooth_grad", "SmoothGrad of guided backprop", replace(QUICK, smoothed="guided_backprop"))
SMOOTH_IG = Side("smooth_grad", "SmoothGrad of Integrated Gradients", replace(QUICK, smoothed="integrated_gradients"))
SMOOTH_BLUR = Side("smooth_grad", "SmoothGrad of Blur IG", replace(QUICK, smoothed="blur_integrated_gradients"))

STEPS = (
    Step(
        Side("leave_one_out", "Leave-one-out, grid", replace(QUICK, cut="grid")),
        SUPERPIXELS,
        Knob("segments", "Segments", 9, 196, 1, 49),
    ),
    Step(SUPERPIXELS, GRADIENT),
    Step(GRADIENT, GUIDED),
    Step(Side("grad_cam", "Grad-CAM"), Side("guided_grad_cam", "Guided Grad-CAM")),
    Step(GUIDED, SMOOTH_GUIDED, Knob("noise", "Noise, share of the photo's range", 0.0, 0.5, 0.01, 0.15)),
    Step(GUIDED, SMOOTH_IG, Knob("steps", "Steps on the path", 2, 50, 1, 16)),
    Step(SMOOTH_IG, SMOOTH_BLUR, Knob("sigma", "Blur where the path begins, pixels", 2, 80, 1, 50)),
    Step(
        Side("leave_one_out", "Leave-one-out, grid", FEW),
        Side("shapley", "Shapley values, the same grid", FEW),
        Knob("segments", "Segments", 4, 64, 1, 16),
    ),
)


@cache
def sections() -> tuple[tuple[str, str], ...]:
    """Return the title and the text (Markdown) of each step."""
    parts = (Path(__file__).parent / "article.md").read_text("utf-8").split("## ")[1:]
    return tuple((title, text.strip()) for title, _, text in (part.partition("\n") for part in parts))
