"""Guided backpropagation, and its relative the deconvnet."""

from typing import Literal

import torch
from torch import Tensor

from pysal._checks import refuse_unknown
from pysal.engine.model.relu_rules import OtherActivations, ReluRules
from pysal.engine.request.extra_inputs import ExtraInputs
from pysal.engine.request.plan import Model, Plan
from pysal.engine.request.running import Running
from pysal.engine.request.score import ScoreKind
from pysal.engine.request.sweeps import Sweep
from pysal.engine.request.target import Target
from pysal.engine.request.work import Work, sweeping
from pysal.engine.running.precision import Precision

WHERE = "pysal.guided_backprop"


def guided_backprop(
    model: Model,
    inputs: Tensor,
    target: Target = None,
    *,
    rule: Literal["guided", "deconvnet"] = "guided",
    other_activations: OtherActivations = "error",
    score: ScoreKind = "logit",
    extra_inputs: ExtraInputs = (),
    batch_size: int | None = None,
    precision: Precision = "float32",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return the gradient with the guided rule at every ReLU: grad_in = 1[x > 0] 1[grad_out > 0] grad_out.

    The rule applies to every ReLU, however it is written: nn.ReLU, functional and in-place ReLU, ReLU6, Hardtanh(0, m),
    clamp(min=0), a module used twice, a ReLU whose input is used elsewhere, and in scripted modules. Sigmoid, tanh and softmax
    keep their ordinary derivative.

    Args:
        model: an nn.Module in eval mode, or any differentiable callable.
        inputs: (B, C, H, W), floating point.
        target: a class by index, or by name if the model carries names; a `pysal.Margin`; one of `pysal.targets`; a callable
            `output -> (N,)` that scores each row by that row alone; a list with one of these per image; a `pysal.RowTarget`,
            which is told the image of each row; or None for each image's highest class.
        rule: "guided", or "deconvnet", which is 1[grad_out > 0] grad_out.
        other_activations: what to do at activations that the rule does not cover (GELU, SiLU, LeakyReLU, ...). "error" refuses
            the model. "plain" keeps their ordinary derivative. "generalised" multiplies it by the positive part of the incoming
            gradient where the activation's output is positive, and gives zero elsewhere.
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
        dtype: dtype of the result; None = float32, or float64 for float64 inputs.

    Returns:
        (B, C, H, W), signed.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, value or target; an activation the rule does not define; no ReLU in the network.

    Source:
        Springenberg et al. 2014, arXiv:1412.6806, section 3.4; deconvnet: Zeiler and Fergus 2013, arXiv:1311.2901.
    """
    plan = Plan(WHERE, model, inputs, target, Running(score, extra_inputs, batch_size, precision, dtype))
    return prepare(plan, rule=rule, other_activations=other_activations).run(report=False).map


def prepare(plan: Plan, *, rule: Literal["guided", "deconvnet"], other_activations: OtherActivations) -> Work:
    """Return the work that finds the guided gradient of every image of a plan."""
    return sweeping(plan, ruled(plan.where, rule, other_activations))


def ruled(where: str, rule: Literal["guided", "deconvnet"], other_activations: OtherActivations) -> Sweep:
    """Return the sweep to the images under a rule, or refuse an unknown one."""
    rules = make_rules(where, rule, other_activations)
    return Sweep(rules.rule, rules.other)


def make_rules(where: str, rule: Literal["guided", "deconvnet"], other_activations: OtherActivations) -> ReluRules:
    """Return the rules of a call, or refuse an unknown one."""
    if rule not in ("guided", "deconvnet"):
        refuse_unknown(where, "rule", "be 'guided' or 'deconvnet'", rule, ("guided", "deconvnet"))
    return ReluRules(where, rule, other_activations)
