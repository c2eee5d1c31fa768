"""captum's GuidedBackprop and Deconvolution."""

from typing import Any, ClassVar, Literal

from torch import nn

from pysal._checks import refuse
from pysal.captum._bases import GradientAttribution, entry_of_parts, where
from pysal.captum._call import Inputs, Target
from pysal.engine.model.relu_rules import OtherActivations, ReluRules
from pysal.engine.prepared.model import PreparedModel
from pysal.methods import guided_backprop


class _ReluRuleAttribution(GradientAttribution):
    _rule: ClassVar[Literal["guided", "deconvnet"]]

    def __init__(self, model: nn.Module | PreparedModel, *, strict: bool = True) -> None:
        super().__init__(model)
        if not isinstance(model, (nn.Module, PreparedModel)):
            refuse(where(self), "model", "be an nn.Module", type(model).__name__, AssertionError)
        self.model = model
        self.strict = strict

    @property
    def _other_activations(self) -> OtherActivations:
        return "error" if self.strict else "plain"

    @entry_of_parts
    def attribute(self, inputs: Inputs, target: Target = None, additional_forward_args: object = None) -> Any:
        """Return the gradient under the rule.

        Args:
            inputs: see `Saliency`.
            target: see `Saliency`.
            additional_forward_args: see `Saliency`.

        Returns:
            A tensor of the inputs' shape and dtype, a tuple of them for a tuple.

        Raises:
            AssertionError: see `Saliency`.
            ValueError: with `strict`, the network has no ReLU, or an activation that the rule does not cover.
        """
        call = self._ask(inputs, target, additional_forward_args, any_rows=True)
        other = self._other_activations
        at_once = call.ruled_gradients(ReluRules(where(self), self._rule, other, {self._rule}))
        if at_once is not None:
            return call.answer(at_once)
        found = call.run(
            lambda plan: guided_backprop.prepare(plan, rule=self._rule, other_activations=other).run(report=False).map
        )
        return call.answer(call.unpack(found))


class GuidedBackprop(_ReluRuleAttribution):
    """The gradient with the guided rule at every ReLU, as `pysal.guided_backprop`.

    Args:
        model: the model, or a prepared model (`pysal.prepare`).
        strict: whether to refuse a network without a ReLU, or with activations that the rule does not cover. False takes
            their ordinary derivative without a warning, as captum does.

    Source:
        Springenberg et al. 2014, arXiv:1412.6806, section 3.4.

    Deviations:
        The rule also applies to functional ReLUs, to ReLU6, and to a ReLU whose input is used elsewhere.
    """

    _rule = "guided"


class Deconvolution(_ReluRuleAttribution):
    """The gradient with the deconvnet's rule at every ReLU: the positive part of the incoming gradient passes.

    Args:
        model: the model, or a prepared model (`pysal.prepare`).
        strict: see `GuidedBackprop`.

    Source:
        Zeiler and Fergus 2013, arXiv:1311.2901.

    Deviations:
        As `GuidedBackprop`.
    """

    _rule = "deconvnet"
