"""The figures by name: what an audit can ask for of each image and map."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from pysal._checks import refuse, refuse_unknown
from pysal.engine.request.attribution import default_of, with_defaults
from pysal.engine.request.extra_inputs import ExtraInputs
from pysal.engine.request.plan import Model, Plan
from pysal.engine.request.running import Running
from pysal.engine.request.score import ScoreKind
from pysal.engine.request.target import Target
from pysal.engine.running.precision import Precision
from pysal.methods.registry import EVERY, check_method
from pysal.metrics._maps import check_maps
from pysal.metrics.agreement import reduction_of
from pysal.metrics.average_drop import (
    average_drop,
    average_drop_of,
    increase_in_confidence,
    increase_in_confidence_of,
)
from pysal.metrics.curves import Curve, deletion, deletion_curve, insertion, insertion_curve
from pysal.metrics.infidelity import infidelity, infidelity_of
from pysal.metrics.localisation import mass_in_mask, pointing_game
from pysal.metrics.max_sensitivity import max_sensitivity, max_sensitivity_of
from pysal.metrics.pic import pic, pic_of
from pysal.metrics.road import Road, road, road_of

WHERE = "pysal.metrics.per_image"


@dataclass(frozen=True)
class Metric:
    """A figure of one image and map.

    Attributes:
        name: what `per_image` knows it by.
        title: for people.
        better: "lower" or "higher".
        low: the least it can be.
        high: the most it can be with the usual score and options; None = no bound.
        needs: what `per_image` must be given besides the maps: "nothing", "masks" or "method".
        summary: what it measures, in a line.
        cost: model passes per image with the usual options, in words.
    """

    name: str
    title: str
    better: Literal["lower", "higher"]
    low: float
    high: float | None
    needs: Literal["nothing", "masks", "method"]
    summary: str
    cost: str


_CURVE_COST = f"{default_of(deletion, 'steps')} forward, + 1"

METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(
            "deletion",
            "Deletion",
            "lower",
            0.0,
            1.0,
            "nothing",
            "mean score while the pixels ranked highest are blackened first",
            _CURVE_COST,
        ),
        Metric(
            "insertion",
            "Insertion",
            "higher",
            0.0,
            1.0,
            "nothing",
            "mean score while the pixels ranked highest are shown first, on the blurred image",
            _CURVE_COST,
        ),
        Metric(
            "deletion_blur",
            "Deletion by blur",
            "lower",
            0.0,
            1.0,
            "nothing",
            "mean score while the pixels ranked highest are blurred first",
            _CURVE_COST,
        ),
        Metric(
            "insertion_zero",
            "Insertion on black",
            "higher",
            0.0,
            1.0,
            "nothing",
            "mean score while the pixels ranked highest are shown first, on black",
            _CURVE_COST,
        ),
        Metric(
            "road",
            "ROAD",
            "higher",
            -1.0,
            1.0,
            "nothing",
            "mean score without the least important pixels, less that without the most important ones, filled in from around",
            f"{2 * len(default_of(road, 'shares'))} forward, + 1, and as many systems of linear equations",
        ),
        Metric(
            "pic",
            "Information curve",
            "higher",
            0.0,
            1.0,
            "nothing",
            "how much of the score is back for how many bytes, while the pixels ranked highest are shown on a blurred image",
            f"{len(default_of(pic, 'shares')) + 2} forward, + 1, and as many interpolations",
        ),
        Metric(
            "average_drop",
            "Average drop",
            "lower",
            0.0,
            1.0,
            "nothing",
            "by what share of itself the score falls when the image is multiplied by its map",
            "1 forward, + 1",
        ),
        Metric(
            "increase_in_confidence",
            "Increase in confidence",
            "higher",
            0.0,
            1.0,
            "nothing",
            "whether the score rises when the image is multiplied by its map",
            "1 forward, + 1",
        ),
        Metric(
            "infidelity",
            "Infidelity",
            "lower",
            0.0,
            1.0,
            "nothing",
            "squared error of the score changes that the map predicts for squares filled in",
            f"{default_of(infidelity, 'samples')} forward, + 1",
        ),
        Metric(
            "max_sensitivity",
            "Max-sensitivity",
            "lower",
            0.0,
            None,
            "method",
            f"largest relative change of the map when each pixel moves by at most {default_of(max_sensitivity, 'radius')}",
            f"{default_of(max_sensitivity, 'samples')} times the method",
        ),
        Metric(
            "pointing_game",
            "Pointing game",
            "higher",
            0.0,
            1.0,
            "masks",
            f"whether the highest point of the map is within {default_of(pointing_game, 'tolerance'):g} pixels of the object",
            "none",
        ),
        Metric(
            "mass_in_mask",
            "Mass in mask",
            "higher",
            0.0,
            1.0,
            "masks",
            "share of the positive attribution that lies on the object",
            "none",
        ),
    )
}
"""Metric name -> what there is to say of it: title, which is better, range, what it needs and what it costs."""

PER_IMAGE: tuple[str, ...] = tuple(METRICS)
"""The names `per_image` knows."""


def per_image(
    name: str,
    model: Model,
    inputs: Tensor,
    maps: Tensor,
    target: Target = None,
    *,
    seed: int = 0,
    image_ids: Sequence[int] | Tensor | None = None,
    method: str | None = None,
    method_options: Mapping[str, Any] | None = None,
    masks: Tensor | None = None,
    options: Mapping[str, Any] | None = None,
    score: ScoreKind | None = None,
    extra_inputs: ExtraInputs = (),
    batch_size: int | None = None,
    precision: Precision = "float32",
) -> Tensor:
    """Return one figure of each image and its map.

    An image's figure depends on the image, its map, its target, its id and the seed, not on the others of its batch, but for
    the rounding of the model's own arithmetic.

    Args:
        name: one of `PER_IMAGE`; `METRICS` says which is better, its range, what it needs and what it costs.
        model: see `deletion`.
        inputs: (B, C, H, W), floating point.
        maps: (B, 1 or C, H, W), floating point, on the inputs' device.
        target: a class by index, or by name if the model carries names; a `pysal.Margin`; one of `pysal.targets`; a callable
            `output -> (N,)` that scores each row by that row alone; a list with one of these per image; a `pysal.RowTarget`,
            which is told the image of each row; or None for each image's highest class.
        seed: of what is drawn.
        image_ids: one whole number of at least 0 per image, which picks what is drawn for it; None = its row in this call.
        method: the method the maps are from, as `pysal.explain` names it. Its channels rank pixels as `explain` draws them,
            and "infidelity" takes its numbers for what they are; where it is None, channels are summed, and numbers are
            shares of the score. "max_sensitivity" needs it.
        method_options: the options the maps were made with, for "max_sensitivity".
        masks: (B, H, W), bool, for "pointing_game" and "mass_in_mask".
        options: the figure's own options, by the name its function has for them: `{"steps": 28}`.
        score: which number of the target's column is explained. "logit" or "raw": the output as it is. "auto": the target's
            probability if the output tells one, else the output as it is. "probability" and "log_probability": the same, but
            one number per image outside [0, 1] is refused. "softmax", "log_softmax" (classes exclude each other), "sigmoid",
            "log_sigmoid" (independent labels, or a binary logit): that function, whatever the output is. What the output is
            (numbers, probabilities, logits) is found out from all images of the call together.
            None = "auto", so that methods compare, and for "max_sensitivity" what the method explains.
        extra_inputs: further arguments of the model, by position (a sequence) or by name (a mapping). Mark one that is as long
            as there are images: `pysal.PerImage(x)` has a row for each image, `pysal.Shared(x)` is the same for all.
        batch_size: most rows per model pass; None = chosen by speed and memory. Changes the result by rounding only. The model
            must answer for each row as if it were alone, which is checked by passes of two rows and of one. With `batch_size=B`
            it need not: every pass then holds the whole batch in its order.
        precision: "float32", "tf32", "mixed" (float32 forward, bf16 backward) or "bf16" (rounding switches some ReLUs).

    Returns:
        (B,) float64 on the inputs' device; NaN where an image has no such figure, as for a map that is not finite.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: an unknown name, a wrong shape, value, target or option, or something the figure needs is missing.
        NotApplicable: the method cannot explain this model.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 2)).eval()
        >>> image = torch.rand(2, 3, 8, 8)
        >>> per_image("deletion", model, image, torch.rand(2, 1, 8, 8), torch.tensor([0, 1])).shape
        torch.Size([2])
    """
    if not isinstance(name, str) or name not in METRICS:
        refuse_unknown(WHERE, "name", f"be one of {', '.join(METRICS)}", name, METRICS)
    if method is not None:
        check_method(WHERE, method)
    check_figure(name, method, masks is not None, options)
    kind = usual_score(name, method) if score is None else score
    plan = Plan(f"pysal.metrics.{name}", model, inputs, target, Running(kind, extra_inputs, batch_size, precision, None))
    return figure_of(
        name,
        plan,
        maps,
        seed=seed,
        image_ids=image_ids,
        method=method,
        method_options=method_options,
        masks=masks,
        options=options,
    )


def usual_score(name: str, method: str | None) -> ScoreKind:
    """Return the kind of score that a figure of a method's maps is of unless told."""
    return EVERY[method].score if name == "max_sensitivity" and method is not None else "auto"


def figure_of(
    name: str,
    plan: Plan,
    maps: Tensor,
    *,
    seed: int,
    image_ids: Sequence[int] | Tensor | None,
    method: str | None,
    method_options: Mapping[str, Any] | None,
    masks: Tensor | None,
    options: Mapping[str, Any] | None,
) -> Tensor:
    """Return one figure of each image of a plan and its map; see `per_image`.

    Figures of several maps of one image, of plans renamed after one another, share the passes that no map changes.
    """
    own = check_figure(name, method, masks is not None, options)
    if name in _CURVES:
        return _CURVES[name](plan, maps, **{"reduction": reduction_of(method), **_SUBSTRATES.get(name, {}), **own}).auc
    if name in _THROUGH_MAPS:
        return _THROUGH_MAPS[name](plan, maps, **{"reduction": reduction_of(method), **own})
    if name in ("road", "pic"):
        drawn: dict[str, Any] = {"reduction": reduction_of(method), "seed": seed, "image_ids": image_ids, **own}
        return _ROAD(plan, maps, **drawn).difference if name == "road" else _PIC(plan, maps, **drawn).auc
    if name == "infidelity":
        meaning = "slopes" if method in EVERY and EVERY[method].slopes else "shares"
        return _INFIDELITY(plan, maps, seed=seed, image_ids=image_ids, **{"meaning": meaning, **own})
    if name == "max_sensitivity":
        assert method is not None
        return _MAX_SENSITIVITY(
            plan,
            check_maps(plan.where, maps, plan.inputs),
            method=method,
            method_options=method_options,
            seed=seed,
            image_ids=image_ids,
            **own,
        )
    found = check_maps(plan.where, maps, plan.inputs)
    assert masks is not None
    return _LOCAL[name](found, masks, **{"reduction": reduction_of(method), **own})


_CURVES: dict[str, Callable[..., Curve]] = {
    "deletion": with_defaults(deletion_curve, deletion),
    "insertion": with_defaults(insertion_curve, insertion),
    "deletion_blur": with_defaults(deletion_curve, deletion),
    "insertion_zero": with_defaults(insertion_curve, insertion),
}
_SUBSTRATES: dict[str, dict[str, Any]] = {
    "deletion_blur": {"substrate": "blur"},
    "insertion_zero": {"substrate": "zero"},
}
_THROUGH_MAPS: dict[str, Callable[..., Tensor]] = {
    "average_drop": with_defaults(average_drop_of, average_drop),
    "increase_in_confidence": with_defaults(increase_in_confidence_of, increase_in_confidence),
}
_ROAD: Callable[..., Road] = with_defaults(road_of, road)
_PIC: Callable[..., Curve] = with_defaults(pic_of, pic)
_INFIDELITY = with_defaults(infidelity_of, infidelity)
_MAX_SENSITIVITY = with_defaults(max_sensitivity_of, max_sensitivity)
_LOCAL: dict[str, Callable[..., Tensor]] = {"pointing_game": pointing_game, "mass_in_mask": mass_in_mask}
_OPTIONS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(_CURVES, ("steps", "substrate", "reduction")),
    "road": ("shares", "noise", "reduction"),
    "pic": ("shares", "seen", "points", "reduction"),
    "average_drop": ("reduction",),
    "increase_in_confidence": ("reduction",),
    "infidelity": ("perturbation", "meaning", "fill", "noise", "samples", "scaled"),
    "max_sensitivity": ("radius", "samples"),
    "pointing_game": ("tolerance", "reduction"),
    "mass_in_mask": ("reduction",),
}


def check_figure(name: str, method: str | None, has_masks: bool, options: object) -> dict[str, Any]:
    """Return the options of a figure, once it is known that it has all that it needs."""
    needs = METRICS[name].needs
    if needs == "masks" and not has_masks:
        refuse(WHERE, "masks", f"be given for {name}", "None")
    if needs == "method" and method is None:
        refuse(WHERE, "method", f"be given for {name}", "None")
    return check_options(name, options)


def check_options(name: str, options: object, where: str = WHERE, argument: str = "options") -> dict[str, Any]:
    """Return a figure's own options, {} for None.

    Raises:
        TypeError: no mapping.
        ValueError: one that the figure does not have.
    """
    if options is None:
        return {}
    if not isinstance(options, Mapping):
        refuse(where, argument, "be a mapping of option names to values", repr(options), TypeError)
    for option in options:
        if option not in _OPTIONS[name]:
            refuse_unknown(where, argument, f"hold options of {name}: {', '.join(_OPTIONS[name])}", option, _OPTIONS[name])
    return dict(options)
