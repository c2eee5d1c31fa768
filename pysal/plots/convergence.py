"""Convergence with steps: how far a path method's maps of few steps are from that of many."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure
from torch import Tensor

from pysal._checks import check_tensor, refuse, refuse_unknown
from pysal.engine.request.attribution import checked_options
from pysal.engine.request.extra_inputs import ExtraInputs
from pysal.engine.request.plan import Model, Plan
from pysal.engine.request.running import Running
from pysal.engine.request.score import ScoreKind
from pysal.engine.request.target import Target
from pysal.engine.running.precision import Precision
from pysal.methods.registry import EVERY
from pysal.methods.traits import PATHS
from pysal.plots.axes import HEADER, LOOKS, OTHER, draw_key, drawable, frame, log_ticks, titled_page, x_ticks, y_ticks
from pysal.viz import GREY, number


@dataclass(frozen=True)
class Convergence:
    """How a path method's map of one image approaches the map of many more steps.

    Attributes:
        method: "integrated_gradients" or "blur_integrated_gradients".
        steps: gradients per map, rising.
        errors: of each number of steps: the l2 norm of the map's difference from the reference, over that of the reference.
        residuals: of each number of steps: by how much the map's sum misses the change of the score, signed.
        reference: steps of the reference.
        change: of the score from the path's beginning to the image, what the map should add up to.
    """

    method: str
    steps: tuple[int, ...]
    errors: tuple[float, ...]
    residuals: tuple[float, ...]
    reference: int
    change: float


def converge(
    model: Model,
    image: Tensor,
    target: Target = None,
    *,
    method: str = "integrated_gradients",
    steps: Sequence[int] = (8, 16, 32, 64, 128),
    reference: int = 512,
    method_options: Mapping[str, Any] | None = None,
    score: ScoreKind = "logit",
    extra_inputs: ExtraInputs = (),
    batch_size: int | None = None,
    precision: Precision = "float32",
) -> Convergence:
    """Return how far the maps of few steps are from that of many, and from adding up.

    It takes `sum(steps) + reference` gradients of the model, 760 by default.

    Args:
        model: see `pysal.integrated_gradients`; a prepared one saves most of the time.
        image: (1, C, H, W).
        target: a class by index, or by name if the model carries names; a `pysal.Margin`; one of `pysal.targets`; a callable
            `output -> (N,)` that scores each row by that row alone; a list with one of these per image; a `pysal.RowTarget`,
            which is told the image of each row; or None for each image's highest class.
        method: "integrated_gradients" or "blur_integrated_gradients".
        steps: numbers of gradients, rising, each at least 1.
        reference: more than the most of `steps`; four times as many leave the reference an error well below theirs.
        method_options: the method's own options but the number of steps: {"baseline": "blur"}.
        score: which number of the target's column is explained. "logit" or "raw": the output as it is. "auto": the target's
            probability if the output tells one, else the output as it is. "probability" and "log_probability": the same, but
            one number per image outside [0, 1] is refused. "softmax", "log_softmax" (classes exclude each other), "sigmoid",
            "log_sigmoid" (independent labels, or a binary logit): that function, whatever the output is. What the output is
            (numbers, probabilities, logits) is found out from all images of the call together.
        extra_inputs: further arguments of the model, by position (a sequence) or by name (a mapping). Mark one that is as long
            as there are images: `pysal.PerImage(x)` has a row for each image, `pysal.Shared(x)` is the same for all.
        batch_size: most rows per model pass; None = chosen by speed and memory. Changes the result by rounding only. The model
            must answer for each row as if it were alone, which is checked by passes of two rows and of one. With `batch_size=B`
            it need not: every pass then holds the whole batch in its order.
        precision: "float32", "tf32", "mixed" (float32 forward, bf16 backward) or "bf16" (rounding switches some ReLUs).

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: another method, steps that do not rise to the reference, an unknown option, several images, or what the
            method refuses.
    """
    where = "pysal.plots.converge"
    if method not in PATHS:
        refuse_unknown(where, "method", f"be {' or '.join(map(repr, PATHS))}", method, PATHS)
    ladder = [*steps, reference]
    whole = all(isinstance(step, int) and not isinstance(step, bool) and step > 0 for step in ladder)
    if len(ladder) < 2 or not whole or any(b <= a for a, b in itertools.pairwise(ladder)):
        refuse(where, "steps", "be whole numbers above 0 that rise towards the reference", f"{list(steps)} and {reference}")
    if len(check_tensor(where, "image", image, ndim=4)) != 1:
        refuse(where, "image", "be one image (1, C, H, W)", f"shape {tuple(image.shape)}")
    options = checked_options(where, "method_options", EVERY[method].prepare, method_options)
    for name in ("steps", "tolerance", "max_steps"):
        if name in options:
            refuse(where, "method_options", "leave the number of steps to this function", repr(name))
    plan = Plan(where, model, image, target, Running(score, extra_inputs, batch_size, precision, None))
    found = {count: EVERY[method].attribute(plan.renamed(where, score), steps=count, **options) for count in ladder}
    maps = {count: one.map.cpu().double() for count, one in found.items()}
    residuals = {count: float(one.details["residual"][0]) for count, one in found.items()}
    size = float(maps[reference].norm())
    return Convergence(
        method=method,
        steps=tuple(steps),
        errors=tuple(float((maps[count] - maps[reference]).norm()) / size if size else math.nan for count in steps),
        residuals=tuple(residuals[count] for count in steps),
        reference=reference,
        change=float(maps[reference].sum()) - residuals[reference],
    )


def convergence(
    found: Sequence[Convergence], *, title: str = "Convergence with steps", subtitle: str = "", unit: str = "score"
) -> Figure:
    """Return two plots over the number of steps: the error of the map, and by how much it misses the change of the score.

    Args:
        found: one per method, from `converge`.
        title: what the plot shows.
        subtitle: one line under the title.
        unit: what the score is called, "logit".

    Returns:
        A figure with an Agg canvas, on white, not known to pyplot.

    Raises:
        ValueError: nothing to draw.
    """
    if not found:
        refuse("pysal.plots.convergence", "found", "hold at least one method", "none")
    wide, tall, left, between = 3.4, 2.7, 0.85, 1.05
    page = titled_page((left + 2 * wide + between + 0.45, HEADER + 0.5 + tall + 0.95), title, subtitle)
    steps = sorted({count for one in found for count in one.steps})
    spread = (steps[0] / 1.25, steps[-1] * 1.25)
    reference = ", ".join(str(count) for count in sorted({one.reference for one in found}))
    for side, heading in enumerate(("Error of the map", "Completeness residual")):
        corner = left + side * (wide + between)
        page.text(heading, corner, HEADER + 0.02, 9.5, weight="bold")
        if side == 0:
            small = f"relative l2 difference from {reference} steps"
            lines = [one.errors for one in found]
        else:
            small = f"|residual|, {unit}; dashed: the change to be explained"
            lines = [tuple(abs(value) for value in one.residuals) for one in found]
        page.text(small, corner, HEADER + 0.2, 7.5, GREY, room=wide + 0.4)
        changes = [abs(one.change) for one in found] if side else []
        shown = [value for value in itertools.chain(*lines, changes) if drawable(value)]
        span = (min(shown) / 1.4, max(shown) * 1.4) if shown else (0.3, 3.0)
        axes = frame(page, corner, HEADER + 0.35, wide, tall, spread, span, log=True)
        x_ticks(page, axes, steps, lambda step: str(int(step)))
        y_ticks(page, axes, log_ticks(*span), number if side else lambda value: f"{number(100 * value)} %")
        page.text("gradients per map", corner + wide / 2, HEADER + 0.35 + tall + 0.42, 8, GREY, align="center")
        for one, line in zip(found, lines, strict=True):
            colour, marker = LOOKS.get(one.method, OTHER)
            kept = [(step, value) for step, value in zip(one.steps, line, strict=True) if drawable(value)]
            if kept:
                axes.plot(*zip(*kept, strict=True), color=colour, marker=marker, markersize=5, linewidth=1.6)
            if side and drawable(abs(one.change)):
                axes.axhline(abs(one.change), color=colour, linewidth=1, marker="None", linestyle=(0, (4, 3)))
    place = left
    for one in found:
        place += draw_key(page, one.method, place, HEADER + 0.35 + tall + 0.72) + 0.3
    return page.figure
