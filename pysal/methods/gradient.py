"""The gradient of the score with respect to the image."""

import torch
from torch import Tensor

from pysal.engine.attribution import Attribution
from pysal.engine.plan import ExtraInputs, Model, Plan
from pysal.engine.precision import Precision
from pysal.engine.sweeps import Sweep
from pysal.engine.target import ScoreKind, Target


def gradient(
    model: Model,
    inputs: Tensor,
    target: Target = None,
    *,
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
        target: class index, one per image, a callable `output -> (N,)`, or None for each image's highest class.
        score: "logit", "probability" or "log_probability" of the target class.
        extra_inputs: further arguments of the model; tensors whose first dimension is B go with their image.
        batch_size: most images per model pass; None = as many as memory allows. Never changes the result beyond rounding.
        precision: "float32", "tf32", "mixed" (float32 forward, bf16 backward) or "bf16" (moves ReLU gates).
        dtype: of the result; None = float32, float64 for float64 inputs.

    Returns:
        (B, C, H, W). The usual saliency map is the maximum over channels of its absolute value.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, value, target, or a model in training mode.

    Source:
        Simonyan, Vedaldi and Zisserman 2013, arXiv:1312.6034, section 3.1.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 10)).eval()
        >>> gradient(model, torch.rand(1, 3, 8, 8), target=3).shape
        torch.Size([1, 3, 8, 8])
    """
    plan = Plan(
        "pysal.gradient",
        model,
        inputs,
        target,
        score=score,
        extra_inputs=extra_inputs,
        batch_size=batch_size,
        precision=precision,
        dtype=dtype,
    )
    return attribute(plan).map


def attribute(plan: Plan) -> Attribution:
    """Return the gradient of every image of a plan."""
    ((result,),) = plan.sweeps(Sweep())
    return Attribution(result.to(plan.dtype), passes=1)
