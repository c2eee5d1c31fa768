"""captum's DeepLift and DeepLiftShap."""

import inspect
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from pysal._checks import refuse
from pysal.captum._bases import Baselines, GradientAttribution, baselines_of, check_baselines, entry_of_parts, where
from pysal.captum._batches import of_rows
from pysal.captum._call import Call, Inputs, Target, arguments, as_tuple, check_rows, check_target, spread, target_of
from pysal.engine.model.rescale_rules import RescaleRules
from pysal.engine.prepared.model import PreparedModel

Distribution: TypeAlias = "Tensor | tuple[Tensor, ...] | Callable[..., Tensor | tuple[Tensor, ...]]"
Custom: TypeAlias = Callable[..., tuple[Tensor, ...]] | None


class DeepLift(GradientAttribution):
    """DeepLIFT's contributions under the Rescale rule: how much of the change from the baselines each input accounts for.

    The rule is applied to every nonlinear function of one tensor, whether a module or not, and contributions add up to the
    change of the output. Of products of two activations (gates, attention) and of normalisations over activations the
    derivative is taken, as in captum, and they do not; `return_convergence_delta` shows by how much.

    Args:
        model: the model.
        multiply_by_inputs: whether to multiply the multipliers by input - baseline.
        eps: the smallest difference of an activation that is divided by.

    Source:
        Shrikumar, Greenside and Kundaje 2017, arXiv:1704.02685, section 3.5.1.

    Example:
        >>> DeepLift(torch.nn.Sequential(torch.nn.ReLU())).attribute(torch.tensor([[3.0]]), torch.tensor([[-1.0]]), target=0)
        tensor([[3.]])
    """

    def __init__(self, model: nn.Module, multiply_by_inputs: bool = True, eps: float = 1e-10) -> None:
        super().__init__(model)
        if not isinstance(model, (nn.Module, PreparedModel)):
            refuse(where(self), "model", "be an nn.Module", type(model).__name__, AssertionError)
        self.model, self.eps = model, eps
        self._multiply_by_inputs = multiply_by_inputs

    def has_convergence_delta(self) -> bool:
        """True: the attributions of an example add up to the change of its score."""
        return True

    @entry_of_parts
    def attribute(
        self,
        inputs: Inputs,
        baselines: Baselines = None,
        target: Target = None,
        additional_forward_args: object = None,
        return_convergence_delta: bool = False,
        custom_attribution_func: Custom = None,
    ) -> Any:
        """Return the contributions and, if asked, how far their sum is from the change of the output.

        Args:
            inputs: see `Saliency`.
            baselines: a number or a tensor for each input, of its shape or with one row for all; None = 0.
            target: see `Saliency`.
            additional_forward_args: see `Saliency`.
            return_convergence_delta: whether to return the delta as well.
            custom_attribution_func: what makes the attributions of (multipliers, inputs, baselines), or of the first one or two
                of them, tuples all.

        Returns:
            A tensor of the inputs' shape and dtype, a tuple of them for a tuple; with a delta, that and (B,) deltas.

        Raises:
            AssertionError: see `Saliency`; or the baselines do not fit.
            RuntimeError: see `Saliency`.
            ValueError: the baselines take another way through the model than the inputs.
        """
        if custom_attribution_func is not None and not callable(custom_attribution_func):
            got = type(custom_attribution_func).__name__
            refuse(where(self), "custom_attribution_func", "be a function", got, AssertionError)
        several = as_tuple(inputs)
        given = baselines_of(self, baselines, several)
        check_baselines(self, given, several)
        starts = tuple(spread(one, start) for one, start in zip(several, given, strict=True))
        multipliers = self._multipliers(inputs, starts, target, additional_forward_args)
        found = multipliers
        if custom_attribution_func is not None:
            number = len(inspect.signature(custom_attribution_func).parameters)
            if not 1 <= number <= 3:
                refuse(where(self), "custom_attribution_func", "take one to three arguments", number, AssertionError)
            found = custom_attribution_func(*(multipliers, several, starts)[:number])
            if not isinstance(found, tuple):
                requirement = "return a tuple, an attribution for each input"
                refuse(where(self), "custom_attribution_func", requirement, type(found).__name__, AssertionError)
        elif self.multiplies_by_inputs:
            found = tuple((one - start) * part for one, start, part in zip(several, starts, multipliers, strict=True))
        answer = tuple(one.detach() for one in found) if isinstance(inputs, tuple) else found[0].detach()
        if not return_convergence_delta:
            return answer
        return answer, self.compute_convergence_delta(found, baselines, inputs, target, additional_forward_args)

    def _multipliers(
        self, inputs: Inputs, starts: tuple[Tensor, ...], target: Target, additional_forward_args: object
    ) -> tuple[Tensor, ...]:
        rules, number = RescaleRules(where(self), self.eps), len(starts)
        model = self.model.original if isinstance(self.model, PreparedModel) else self.model
        eager = getattr(model, "_orig_mod", model)

        def forward(*args: Any) -> Any:
            return rules.run(eager, (*args[:number], *args[2 * number :]), args[number:])

        forward.__wrapped__ = model  # type: ignore[attr-defined]
        call = Call(where(self), forward, inputs, target, (*starts, *arguments(additional_forward_args)))
        return call.gradients()


class DeepLiftShap(DeepLift):
    """The mean of `DeepLift` over a distribution of baselines, an estimate of SHAP values.

    Args:
        model: see `DeepLift`.
        multiply_by_inputs: see `DeepLift`.

    Source:
        Lundberg and Lee 2017, arXiv:1705.07874, section 4.2.
    """

    def __init__(self, model: nn.Module, multiply_by_inputs: bool = True) -> None:
        super().__init__(model, multiply_by_inputs)

    @entry_of_parts
    def attribute(  # type: ignore[override]  # captum's: the baselines have no default
        self,
        inputs: Inputs,
        baselines: Distribution,
        target: Target = None,
        additional_forward_args: object = None,
        return_convergence_delta: bool = False,
        custom_attribution_func: Custom = None,
    ) -> Any:
        """Return the mean contributions and, if asked, how far the sum is from the change of the output for each baseline.

        Args:
            inputs: see `Saliency`.
            baselines: (M, ...) for each input, M > 1, or a function that returns them, of the inputs or of nothing.
            target: see `Saliency`.
            additional_forward_args: see `Saliency`.
            return_convergence_delta: whether to return the delta as well.
            custom_attribution_func: see `DeepLift`.

        Returns:
            See `DeepLift`; deltas are (B * M,), those of an example side by side.

        Raises:
            AssertionError: see `DeepLift`; or there are fewer than two baselines.
        """
        several = as_tuple(inputs)
        drawn = distribution(self, baselines, inputs)
        many = len(drawn[0])
        if many < 2:
            refuse(where(self), "baselines", "be more than one row", tuple(drawn[0].shape), AssertionError)
        check_rows(where(self), several)
        check_target(where(self), target, len(several[0]))
        rows = torch.arange(len(several[0]), device="cpu").repeat_interleave(many)
        wide = tuple(one[rows.to(one.device)] for one in several)
        starts = tuple(one.repeat(len(several[0]), *(1,) * (one.ndim - 1)) for one in drawn)
        further = of_rows(arguments(additional_forward_args), rows, len(several[0]))
        answer = DeepLift.attribute(
            self,
            wide if isinstance(inputs, tuple) else wide[0],
            starts,
            target_of(target, rows),
            further or None,
            return_convergence_delta,
            custom_attribution_func,
        )
        found, *delta = answer if return_convergence_delta else (answer,)
        means = tuple(one.unflatten(0, (-1, many)).mean(1) for one in as_tuple(found))
        answer = means if isinstance(inputs, tuple) else means[0]
        return (answer, *delta) if delta else answer


def distribution(attribution: GradientAttribution, baselines: Any, inputs: Inputs) -> tuple[Tensor, ...]:
    """Return a distribution of baselines, (M, ...) for each input, of what was given: tensors, or a function of the inputs.

    Raises:
        AssertionError: no tensors, or some that do not fit.
        TypeError: a function of more than the inputs.
    """
    if callable(baselines):
        signature = inspect.signature(baselines)
        given = (inputs,) if signature.parameters else ()
        try:
            signature.bind(*given)
        except TypeError:
            refuse(
                where(attribution), "baselines", "be a function of the inputs or of nothing", f"one of {signature}", TypeError
            )
        baselines = baselines(*given)
    several = as_tuple(inputs)
    found = baselines_of(attribution, baselines, several)
    check_baselines(attribution, found, several, drawn=True)
    for one in found:
        if not isinstance(one, Tensor):
            refuse(where(attribution), "baselines", "be tensors, a row for each baseline", type(one).__name__, AssertionError)
    return tuple(one for one in found if isinstance(one, Tensor))
