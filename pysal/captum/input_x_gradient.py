"""captum's InputXGradient."""

from typing import Any

from pysal.captum._bases import GradientAttribution, entry_of_parts
from pysal.captum._call import Inputs, Target


class InputXGradient(GradientAttribution):
    """The inputs times the gradient, as `images * pysal.gradient(...)`.

    Args:
        forward_func: the model, or any function of tensors.

    Source:
        Shrikumar et al. 2016, arXiv:1605.01713.

    Example:
        >>> InputXGradient(lambda x: x.square().sum(1)).attribute(torch.tensor([[1.0, 3.0]]))
        tensor([[ 2., 18.]])
    """

    _multiply_by_inputs = True

    @entry_of_parts
    def attribute(
        self,
        inputs: Inputs,
        target: Target = None,
        additional_forward_args: object = None,
        *,
        create_graph: bool = False,
    ) -> Any:
        """Return the inputs times the gradient.

        Args:
            inputs: see `Saliency`.
            target: see `Saliency`.
            additional_forward_args: see `Saliency`.
            create_graph: see `Saliency`.

        Returns:
            A tensor of the inputs' shape and dtype, a tuple of them for a tuple.

        Raises:
            AssertionError: see `Saliency`.
            RuntimeError: see `Saliency`.
            ValueError: see `Saliency`.
        """
        call = self._ask(inputs, target, additional_forward_args, any_rows=True, keeps_graph=create_graph)
        given = call.inputs if create_graph else [one.detach() for one in call.inputs]
        return call.found(lambda: call.answer([one * part for one, part in zip(given, self._gradients(call), strict=True)]))
