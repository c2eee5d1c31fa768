"""captum's LayerGradientXActivation."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from pysal.captum._bases import GradientAttribution, LayerAttribution, entry, introduce, wants_graph
from pysal.captum._call import Inputs, Target
from pysal.captum.grad_cam import at_layer
from pysal.captum.layer_activation import Layers, as_layers, layers_of


class LayerGradientXActivation(LayerAttribution, GradientAttribution):
    """A layer's activation times the gradient there.

    Args:
        forward_func: the model, or any function of it.
        layer: the layer, or a list of layers. If one runs several times in a pass, its last run counts.
        device_ids: accepted, as in captum, and ignored: the model runs on one device.
        multiply_by_inputs: whether to multiply the gradient by the activation.
        memory_efficient: whether to return the result on the CPU.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
        >>> LayerGradientXActivation(model, model[0]).attribute(torch.ones(1, 2, 2), target=1).shape
        torch.Size([1, 4])
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        layer: Layers,
        device_ids: list[int] | None = None,
        multiply_by_inputs: bool = True,
        memory_efficient: bool = False,
    ) -> None:
        LayerAttribution.__init__(self, forward_func, layer, device_ids)
        GradientAttribution.__init__(self, forward_func)
        self._multiply_by_inputs, self._memory_efficient = multiply_by_inputs, memory_efficient

    @entry
    def attribute(
        self,
        inputs: Inputs,
        target: Target = None,
        additional_forward_args: object = None,
        attribute_to_layer_input: bool = False,
        grad_kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Return the product.

        Args:
            inputs: see `Saliency`; of any dtype.
            target: see `Saliency`.
            additional_forward_args: see `Saliency`.
            attribute_to_layer_input: see `LayerGradCam`.
            grad_kwargs: see `LayerGradCam`.

        Returns:
            A tensor of the layer's shape, a tuple for a layer of several tensors; for a list of layers, a list of that.

        Raises:
            AssertionError: see `LayerGradCam`.
            IndexError: see `LayerGradCam`.
            NotImplementedError: see `LayerGradCam`.
        """
        graph = wants_graph(self, grad_kwargs)
        call = self._ask(inputs, target, additional_forward_args, whole_numbers="kept", keeps_graph=graph)

        def of_layer(layer: nn.Module) -> tuple[Tensor, ...]:
            pairs = at_layer(call, layer, self.forward_func, at_input=attribute_to_layer_input)
            parts = [gradient * activation if self.multiplies_by_inputs else gradient for activation, gradient in pairs]
            return tuple(one.cpu() if self._memory_efficient else one for one in parts)

        return as_layers(self.layer, call.found(lambda: [of_layer(one) for one in layers_of(self.layer)]))


introduce(LayerGradientXActivation)
