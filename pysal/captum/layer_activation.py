"""captum's LayerActivation, and what the methods at layers share."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from pysal._checks import refuse
from pysal.captum._bases import LayerAttribution, entry, where
from pysal.captum._batches import call
from pysal.captum._call import Inputs, arguments, as_tuple
from pysal.engine.layers.cut import Cut
from pysal.engine.prepared.model import PreparedModel

Layers: TypeAlias = "nn.Module | list[nn.Module]"


class LayerActivation(LayerAttribution):
    """What a layer returns.

    Args:
        forward_func: the model, or any function of it.
        layer: the layer, or a list of layers. If one runs several times in a pass, its last run counts.
        device_ids: accepted, as in captum, and ignored: the model runs on one device.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.ReLU())
        >>> LayerActivation(model, model[0]).attribute(torch.ones(1, 2, 2))
        tensor([[1., 1., 1., 1.]])
    """

    _multiply_by_inputs = True  # as captum has it

    def __init__(self, forward_func: Callable[..., Any], layer: Layers, device_ids: list[int] | None = None) -> None:
        super().__init__(forward_func, layer, device_ids)

    @entry
    def attribute(self, inputs: Inputs, additional_forward_args: object = None, attribute_to_layer_input: bool = False) -> Any:
        """Return the activation.

        Args:
            inputs: see `Saliency`; of any dtype.
            additional_forward_args: see `Saliency`.
            attribute_to_layer_input: whether to take the layer's input instead of its output.

        Returns:
            What the layer returns, a tuple for several tensors; for a list of layers, a list of that.

        Raises:
            AssertionError: a layer does not run.
        """
        cut = cut_at(self, attribute_to_layer_input)
        with torch.no_grad():
            return as_layers(self.layer, cut.values(*as_tuple(inputs), *arguments(additional_forward_args)))


def cut_at(attribution: LayerAttribution, at_input: bool) -> Cut:
    """Return the forward function of an attribution cut at its layers."""
    forward = attribution.forward_func
    model = forward.original if isinstance(forward, PreparedModel) else forward

    def function(*args: Any) -> Any:
        return call(model, args, ())

    return Cut(where(attribution), function, layers_of(attribution.layer), at_input=at_input)


def layers_of(layer: Layers) -> list[nn.Module]:
    """Return one layer or a list of them as a list.

    Raises:
        AssertionError: no layers.
        TypeError: something else than modules.
    """
    several = layer if isinstance(layer, list) else [layer]
    for one in several:
        if not isinstance(one, nn.Module):
            refuse("pysal.captum", "layer", "be a module or a list of modules", repr(one), TypeError)
    if not several:
        refuse("pysal.captum", "layer", "be a module or a list of modules", repr(layer), AssertionError)
    return several


def as_layers(layer: Layers, found: Sequence[tuple[Tensor, ...]]) -> Any:
    """Return the tensors of layers as captum does: a tensor or a tuple of several, and a list of that for a list of layers."""
    answers = [one if len(one) > 1 else one[0] for one in found]
    return answers[0] if isinstance(layer, nn.Module) else answers
