"""The gradient of the score with respect to the image."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pysal._checks import check_dense, check_flag, refuse
from pysal.engine.request import sweeps
from pysal.engine.request.class_targets import shown
from pysal.engine.request.extra_inputs import ExtraInputs
from pysal.engine.request.plan import Model, Plan
from pysal.engine.request.running import Running
from pysal.engine.request.score import ScoreKind
from pysal.engine.request.sweeps import PLAIN
from pysal.engine.request.target import Class, Target
from pysal.engine.request.work import Work, sweeping
from pysal.engine.running.precision import Precision
from pysal.engine.running.states import outside_inference, recorded


def gradient(
    model: Model,
    inputs: Tensor,
    target: Target = None,
    *,
    create_graph: bool = False,
    score: ScoreKind = "logit",
    extra_inputs: ExtraInputs = (),
    batch_size: int | None = None,
    precision: Precision = "float32",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return df/dx, signed, per channel.

    Args:
        model: an nn.Module in eval mode, or any differentiable callable.
        inputs: (B, C, H, W), floating point.
        target: a class by index, or by name if the model carries names; a `pysal.Margin`; one of `pysal.targets`; a callable
            `output -> (N,)` that scores each row by that row alone; a list with one of these per image; a `pysal.RowTarget`,
            which is told the image of each row; or None for each image's highest class.
        create_graph: whether the map carries autograd's graph, to the model's weights and to `inputs`, for a loss that holds
            attributions. The graph of all passes stays in memory. No prepared model, "mixed" or "bf16".
        score: which number of the target's column is explained. "logit" or "raw": the output as it is. "auto": the target's
            probability if the output tells one, else the output as it is. "probability" and "log_probability": the same, but
            one number per image outside [0, 1] is refused. "softmax", "log_softmax" (classes exclude each other), "sigmoid",
            "log_sigmoid" (independent labels, or a binary logit): that function, whatever the output is. What the output is
            (numbers, probabilities, logits) is found out from all images of the call together.
        extra_inputs: further arguments of the model, by position (a sequence) or by name (a mapping). Mark one that is as long
            as there are images: `pysal.PerImage(x)` has a row for each image, `pysal.Shared(x)` is the same for all.
        batch_size: most rows per model pass; None = chosen by speed and memory. Changes the result by rounding only. The model
            must answer for each row as if it were alone, which is checked by passes of two rows and of one. With
            `batch_size=B` it need not: every pass then holds the whole batch in its order.
        precision: "float32", "tf32", "mixed" (float32 forward, bf16 backward) or "bf16" (rounding switches some ReLUs).
        dtype: dtype of the result; None = float32, or float64 for float64 inputs.

    Returns:
        (B, C, H, W). The usual saliency map is the maximum over channels of its absolute value.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, value, target, a model in training mode, or one whose rows depend on each other, or, with
            `create_graph`, which has no second derivative.

    Source:
        Simonyan, Vedaldi and Zisserman 2013, arXiv:1312.6034, section 3.1.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 10)).eval()
        >>> gradient(model, torch.rand(1, 3, 8, 8), target=3).shape
        torch.Size([1, 3, 8, 8])
    """
    plan = Plan("pysal.gradient", model, inputs, target, Running(score, extra_inputs, batch_size, precision, dtype))
    if check_flag(plan.where, "create_graph", create_graph):
        return recorded(plan.connected(inputs).image_gradients)
    return plan.image_gradients()


def class_gradients(
    model: Model,
    inputs: Tensor,
    classes: Sequence[Class] | Sequence[Sequence[Class]] | Tensor,
    *,
    score: ScoreKind = "logit",
    extra_inputs: ExtraInputs = (),
    batch_size: int | None = None,
    precision: Precision = "float32",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return the gradients of several classes' scores, from one forward pass per image.

    Map t of an image is `gradient` with target `classes[t]`. A prepared model sweeps back for many classes at once.

    Args:
        model: see `gradient`.
        inputs: (B, C, H, W), floating point.
        classes: (T,) class indices or names for every image, or (B, T) for each its own.
        score: which number of the target's column is explained. "logit" or "raw": the output as it is. "auto": the target's
            probability if the output tells one, else the output as it is. "probability" and "log_probability": the same, but
            one number per image outside [0, 1] is refused. "softmax", "log_softmax" (classes exclude each other), "sigmoid",
            "log_sigmoid" (independent labels, or a binary logit): that function, whatever the output is. What the output is
            (numbers, probabilities, logits) is found out from all images of the call together.
        extra_inputs: further arguments of the model, by position (a sequence) or by name (a mapping). Mark one that is as long
            as there are images: `pysal.PerImage(x)` has a row for each image, `pysal.Shared(x)` is the same for all.
        batch_size: most rows per model pass; None = chosen by speed and memory. Changes the result by rounding only. The model
            must answer for each row as if it were alone, which is checked by passes of two rows and of one. With `batch_size=B`
            it need not: every pass then holds the whole batch in its order. A prepared model also makes at most as many
            gradients in one sweep.
        precision: "float32", "tf32", "mixed" (float32 forward, bf16 backward) or "bf16" (rounding switches some ReLUs).
        dtype: dtype of the result; None = float32, or float64 for float64 inputs.

    Returns:
        (B, T, C, H, W).

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape or value, a class the model does not have, or a model in training mode.

    Source:
        Simonyan, Vedaldi and Zisserman 2013, arXiv:1312.6034, section 3.1.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 10)).eval()
        >>> class_gradients(model, torch.rand(2, 3, 8, 8), [3, 5, 8]).shape
        torch.Size([2, 3, 3, 8, 8])
    """
    where = "pysal.class_gradients"
    plan = Plan(where, model, inputs, 0, Running(score, extra_inputs, batch_size, precision, dtype))
    chosen = _classes(plan, classes)
    largest = int(chosen.max())
    result = torch.empty((plan.images, chosen.shape[1], *plan.inputs.shape[1:]), dtype=plan.dtype, device=plan.device)

    def body(start: int, stop: int) -> None:
        rows = torch.arange(start, stop, device=plan.device)
        some = plan.inputs[start:stop]
        result[start:stop] = sweeps.class_gradients(
            plan, some, rows, chosen[start:stop], largest=largest, at_once=plan.rows_at_once
        )

    plan.over_images(body)
    return result


def _by_index(plan: Plan, value: Any) -> Any:
    """Return classes with the indices of those that are given by name."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "UO":
        value = value.tolist()
    if isinstance(value, str):
        return plan.score.find("classes", value)
    return [_by_index(plan, one) for one in value] if isinstance(value, (list, tuple)) else value


def _classes(plan: Plan, classes: object) -> Tensor:
    """Return class indices (B, T)."""
    requirement = "be class indices or names (T,) or (B, T)"
    if isinstance(classes, str):
        refuse(plan.where, "classes", requirement, repr(classes), TypeError)
    indices = _by_index(plan, classes)
    if isinstance(indices, Tensor):
        check_dense(plan.where, "classes", indices)
    device = indices.device if isinstance(indices, Tensor) else "cpu"
    try:
        given = outside_inference(
            lambda: torch.as_tensor(indices, device=device).to(plan.device, copy=True)
        )  # autograd keeps them
    except (TypeError, ValueError, RuntimeError, OverflowError):
        refuse(plan.where, "classes", requirement, shown(classes), TypeError)
    if given.ndim not in (1, 2) or given.numel() == 0 or (given.ndim == 2 and len(given) != plan.images):
        refuse(plan.where, "classes", f"have shape (T,) or ({plan.images}, T), T of 1 or more", f"shape {tuple(given.shape)}")
    if given.dtype.is_floating_point or given.dtype.is_complex or given.dtype == torch.bool:
        refuse(plan.where, "classes", "be whole numbers", str(given.dtype).removeprefix("torch."), TypeError)
    given = outside_inference(lambda: given.long().expand(plan.images, -1))
    if int(given.min()) < 0:
        refuse(plan.where, "classes", "be 0 or more", int(given.min()))
    return given


def prepare(plan: Plan) -> Work:
    """Return the work that finds the gradient of every image of a plan."""
    return sweeping(plan, PLAIN)
