"""Max-sensitivity: how much a method's map can change while the image hardly does."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pysal._checks import MOST, check_count, check_ids, check_number, check_seed, finite_rows
from pysal._library import widened, widest
from pysal.engine.request.attribution import checked_options
from pysal.engine.request.extra_inputs import ExtraInputs
from pysal.engine.request.plan import Model, Plan
from pysal.engine.request.running import Running
from pysal.engine.request.score import ScoreKind
from pysal.engine.request.target import Target
from pysal.engine.running.precision import Precision
from pysal.methods.registry import EVERY, check_method
from pysal.metrics._maps import check_maps, uniform


def max_sensitivity(
    model: Model,
    inputs: Tensor,
    target: Target = None,
    *,
    method: str = "gradient",
    method_options: Mapping[str, Any] | None = None,
    radius: float = 0.02,
    samples: int = 10,
    seed: int = 0,
    image_ids: Sequence[int] | Tensor | None = None,
    score: ScoreKind | None = None,
    extra_inputs: ExtraInputs = (),
    batch_size: int | None = None,
    precision: Precision = "float32",
) -> Tensor:
    """Return the largest relative change of a method's map over images drawn around each one.

    max over samples of |map(x + u) - map(x)| / |map(x)|, u uniform in [-radius, radius], Euclidean norms. The draws depend
    on (seed, id, sample, element) alone. The target and superpixels stay those of the unchanged image, and SmoothGrad draws
    the same noise for the image and those around it.

    Args:
        model: see `deletion`.
        inputs: (B, C, H, W), floating point.
        target: a class by index, or by name if the model carries names; a `pysal.Margin`; one of `pysal.targets`; a callable
            `output -> (N,)` that scores each row by that row alone; a list with one of these per image; a `pysal.RowTarget`,
            which is told the image of each row; or None for each image's highest class.
        method: a name as `pysal.explain` takes it.
        method_options: that method's own options.
        radius: in units of the inputs, above 0.
        samples: images drawn around each one.
        seed: whole number in [-2^63, 2^63).
        image_ids: one whole number of at least 0 per image, which picks its draws; None = its row in this call.
        score: which number of the target's column is explained. "logit" or "raw": the output as it is. "auto": the target's
            probability if the output tells one, else the output as it is. "probability" and "log_probability": the same, but
            one number per image outside [0, 1] is refused. "softmax", "log_softmax" (classes exclude each other), "sigmoid",
            "log_sigmoid" (independent labels, or a binary logit): that function, whatever the output is. What the output is
            (numbers, probabilities, logits) is found out from all images of the call together.
            None = the method's usual one: "auto" for leave-one-out, else "logit".
        extra_inputs: further arguments of the model, by position (a sequence) or by name (a mapping). Mark one that is as long
            as there are images: `pysal.PerImage(x)` has a row for each image, `pysal.Shared(x)` is the same for all.
        batch_size: most rows per model pass; None = chosen by speed and memory. Changes the result by rounding only. The model
            must answer for each row as if it were alone, which is checked by passes of two rows and of one. With `batch_size=B`
            it need not: every pass then holds the whole batch in its order. It is also the most images explained at once.
        precision: "float32", "tf32", "mixed" (float32 forward, bf16 backward) or "bf16" (rounding switches some ReLUs).

    Returns:
        (B,) float64 on the inputs' device, at least 0; lower is better. NaN where the map of the unchanged image is zero or
        not finite.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, value, target, method or option.
        NotApplicable: the method cannot explain this model.

    Source:
        Yeh, Hsieh, Suggala, Inouye and Ravikumar 2019, arXiv:1901.09392, definition 3.1, divided by the norm of the map as
        in their experiments.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 2)).eval()
        >>> max_sensitivity(model, torch.rand(1, 3, 8, 8), target=0)  # a linear model has one gradient
        tensor([0.], dtype=torch.float64)
    """
    where = "pysal.metrics.max_sensitivity"
    name = check_method(where, method)
    kind = EVERY[name].score if score is None else score
    plan = Plan(where, model, inputs, target, Running(kind, extra_inputs, batch_size, precision, None))
    return max_sensitivity_of(
        plan, None, method=method, method_options=method_options, radius=radius, samples=samples, seed=seed, image_ids=image_ids
    )


def max_sensitivity_of(
    plan: Plan,
    maps: Tensor | None,
    *,
    method: str,
    method_options: Mapping[str, Any] | None,
    radius: float,
    samples: int,
    seed: int,
    image_ids: Sequence[int] | Tensor | None,
) -> Tensor:
    """Return the sensitivity of a method on a plan's images, whose maps are made here unless they are given."""
    where = plan.where
    chosen = EVERY[method]
    radius = check_number(where, "radius", radius, above=True)
    check_count(where, "samples", samples, most=MOST)
    check_seed(where, seed)
    own_ids = check_ids(where, "image_ids", image_ids, plan.images, plan.device)
    options = checked_options(where, "method_options", chosen.prepare, method_options)
    noise_ids = None
    if chosen.noisy:
        given = options.get("image_ids")
        noise_ids = check_ids(where, "image_ids", given, plan.images, plan.device) if given is not None else own_ids
        options["image_ids"] = noise_ids
    work = chosen.prepare(plan, **options)
    plan.fix_target()
    clean = widened(work.run(report=True).map) if maps is None else check_maps(where, maps, plan.inputs)
    changes = torch.zeros(plan.images, samples, dtype=widest(plan.device), device=plan.device)
    elements = plan.inputs[0].numel()

    def body(start: int, stop: int) -> None:
        rows, draws = plan.places(start, stop, samples)
        shifts = radius * (2 * uniform(seed, own_ids[rows], draws, elements) - 1)
        around = (widened(plan.inputs[rows]) + shifts.view(-1, *plan.inputs.shape[1:])).to(plan.inputs.dtype)
        own = options if noise_ids is None else {**options, "image_ids": noise_ids[rows]}
        found = widened(chosen.attribute(plan.derive(around, rows), **own).map)
        changes[rows, draws] = (found - clean[rows]).flatten(1).norm(dim=1)

    plan.run(plan.images * samples, body)
    norms = clean.flatten(1).norm(dim=1)
    result: Tensor = (changes.amax(1) / norms).masked_fill(~finite_rows(clean) | (norms == 0), torch.nan)
    return result
