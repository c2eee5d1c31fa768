"""captum's Saliency: the gradient."""

from typing import Any

from pysal.captum._bases import GradientAttribution, entry_of_parts
from pysal.captum._call import Inputs, Target


class Saliency(GradientAttribution):
    """The gradient of the target's score with respect to the inputs, as `pysal.gradient`.

    Args:
        forward_func: the model, or any function of tensors.

    Source:
        Simonyan, Vedaldi and Zisserman 2013, arXiv:1312.6034.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 10)).eval()
        >>> Saliency(model).attribute(torch.rand(1, 3, 8, 8), target=3).shape
        torch.Size([1, 3, 8, 8])
    """

    @entry_of_parts
    def attribute(
        self,
        inputs: Inputs,
        target: Target = None,
        abs: bool = True,
        additional_forward_args: object = None,
        *,
        create_graph: bool = False,
    ) -> Any:
        """Return the gradient, or its absolute value.

        Args:
            inputs: (B, ...), or a tuple of such tensors, one for each of the function's first arguments.
            target: which number of a row of the output is explained: its index, an int or a tuple of ints; one index for each
                example, as a list or a 1-D tensor; or None if a row has a single number.
            abs: whether to return absolute values.
            additional_forward_args: further arguments of the function, one or a tuple. The rows of a tensor with B rows go
                with their example; anything else is passed on as it is.
            create_graph: whether the result carries autograd's graph, to the function's weights and to the inputs, for a loss
                that holds attributions. The graph of all passes stays in memory.

        Returns:
            A tensor of the inputs' shape and dtype, a tuple of them for a tuple.

        Raises:
            AssertionError: the target does not pick one number of each row.
            RuntimeError: the output does not depend on the inputs.
            ValueError: with `create_graph`, the function has no second derivative, or is a prepared model.
        """
        call = self._ask(inputs, target, additional_forward_args, any_rows=True, keeps_graph=create_graph)

        def find() -> Any:
            found = self._gradients(call)
            return call.answer([one.abs() for one in found] if abs else found)

        return call.found(find)
