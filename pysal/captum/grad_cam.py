"""captum's LayerGradCam and GuidedGradCam."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pysal import ops
from pysal._checks import FLOATING, refuse
from pysal.captum._bases import (
    GradientAttribution,
    LayerAttribution,
    check_interpolation,
    entry_of_parts,
    wants_graph,
    where,
)
from pysal.captum._call import Call, Inputs, Target
from pysal.captum.guided_backprop import GuidedBackprop
from pysal.engine.layers.features import Layer
from pysal.engine.model.relu_rules import ReluRules
from pysal.engine.prepared.model import PreparedModel
from pysal.engine.request.plan import Plan
from pysal.engine.request.sweeps import taped
from pysal.methods.guided_backprop import make_rules


class LayerGradCam(LayerAttribution, GradientAttribution):
    """The channels of a layer weighted by their mean gradients: `pysal.grad_cam` before the map is resized.

    Args:
        forward_func: the model, or any function of it.
        layer: the layer. If it runs several times in a pass, its last run counts.
        device_ids: accepted, as in captum, and ignored: the model runs on one device.

    Source:
        Selvaraju et al. 2016, arXiv:1610.02391.
    """

    def __init__(self, forward_func: Callable[..., Any], layer: nn.Module, device_ids: list[int] | None = None) -> None:
        LayerAttribution.__init__(self, forward_func, layer, device_ids)
        GradientAttribution.__init__(self, forward_func)

    @entry_of_parts
    def attribute(
        self,
        inputs: Inputs,
        target: Target = None,
        additional_forward_args: object = None,
        attribute_to_layer_input: bool = False,
        relu_attributions: bool = False,
        attr_dim_summation: bool = True,
        grad_kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Return the weighted channels of the layer, added up.

        Args:
            inputs: see `Saliency`.
            target: see `Saliency`.
            additional_forward_args: see `Saliency`.
            attribute_to_layer_input: whether to take the layer's input instead of its output.
            relu_attributions: whether to set negative values to 0, as in the paper.
            attr_dim_summation: whether to add up the channels.
            grad_kwargs: of `torch.autograd.grad`. "create_graph": see `Saliency`; "retain_graph", "allow_unused" and
                "materialize_grads" are accepted and change nothing.

        Returns:
            (B, 1, ...) of the layer's own size, (B, K, ...) without the summation; a tuple of them for a layer of several
            tensors.

        Raises:
            AssertionError: see `Saliency`; or the layer does not run.
            IndexError: the layer's input is asked for, and it gets nothing by position.
            NotImplementedError: `grad_kwargs` has other keys.
            ValueError: with "create_graph", see `Saliency`.
        """
        graph = wants_graph(self, grad_kwargs)
        call = self._ask(inputs, target, additional_forward_args, whole_numbers="kept", keeps_graph=graph)

        def find() -> list[Tensor]:
            pairs = at_layer(call, self.layer, self.forward_func, at_input=attribute_to_layer_input)
            return [weighted(*pair, relu=relu_attributions, add_up=attr_dim_summation) for pair in pairs]

        cams = call.found(find)
        return tuple(cams) if len(cams) > 1 else cams[0]


class GuidedGradCam(GradientAttribution):
    """Guided backprop times the resized Grad-CAM map: `pysal.guided_grad_cam` with captum's way of resizing.

    Args:
        model: the model, or a prepared model (`pysal.prepare`).
        layer: see `LayerGradCam`.
        device_ids: see `LayerGradCam`.
        strict: see `GuidedBackprop`.

    Source:
        Selvaraju et al. 2016, arXiv:1610.02391, section 3.2.
    """

    def __init__(
        self, model: nn.Module | PreparedModel, layer: nn.Module, device_ids: list[int] | None = None, *, strict: bool = True
    ) -> None:
        super().__init__(model)
        if not isinstance(model, (nn.Module, PreparedModel)):
            refuse(where(self), "model", "be an nn.Module", type(model).__name__, AssertionError)
        self.model, self.layer, self.device_ids, self.strict = model, layer, device_ids, strict
        self.grad_cam, self.guided_backprop = LayerGradCam(model, layer, device_ids), GuidedBackprop(model, strict=strict)

    @entry_of_parts
    def attribute(
        self,
        inputs: Inputs,
        target: Target = None,
        additional_forward_args: object = None,
        interpolate_mode: str = "nearest",
        attribute_to_layer_input: bool = False,
    ) -> Any:
        """Return the product, from one forward pass.

        Args:
            inputs: see `Saliency`.
            target: see `Saliency`.
            additional_forward_args: see `Saliency`.
            interpolate_mode: as `mode` of `torch.nn.functional.interpolate`.
            attribute_to_layer_input: see `LayerGradCam`.

        Returns:
            A tensor of the inputs' shape and dtype, a tuple of them for a tuple.

        Raises:
            AssertionError: see `LayerGradCam`; or the layer returns several tensors.
            ValueError: with `strict`, see `GuidedBackprop`; or `interpolate_mode` is unknown, or the map cannot be resized to
                an input's shape, where captum returns an empty tensor.
        """
        check_interpolation(where(self), interpolate_mode)
        call = self._ask(inputs, target, additional_forward_args)
        rules = make_rules(where(self), "guided", "error" if self.strict else "plain")
        layer = _Watched(self.layer, self.forward_func, at_input=attribute_to_layer_input)
        activation, gradient, guided = _run(call, layer, rules)
        if layer.tensors > 1:
            refuse(where(self), "layer", "be of one tensor", layer.tensors, AssertionError)
        assert guided is not None
        cam = weighted(activation, gradient, relu=True, add_up=True)
        return call.answer(
            [
                one * LayerAttribution.interpolate(cam, tuple(one.shape[2:]), interpolate_mode).to(one)
                for one in call.unpack(guided)
            ]
        )


def at_layer(call: Call, layer: nn.Module, forward: Callable[..., Any], *, at_input: bool) -> list[tuple[Tensor, Tensor]]:
    """Return the activation of each tensor of a layer, and the gradient there."""
    found: list[tuple[Tensor, Tensor]] = []
    tensors = 1
    while len(found) < tensors:
        watched = _Watched(layer, forward, at_input=at_input, index=len(found))
        at_once = call.at_layer(watched.layer)
        found.append(_run(call, watched, None)[:2] if at_once is None else at_once)
        tensors = watched.tensors
    return found


class _Watched:
    """A layer, and how many tensors it was seen to have."""

    def __init__(self, module: nn.Module, model: object, *, at_input: bool, index: int = 0) -> None:
        modules = model.original.named_modules() if isinstance(model, PreparedModel) else ()
        name = next((name for name, each in modules if each is module), type(module).__name__)
        self._seen: list[int] = []  # which the layer holds, and not this object: that would be a circle
        self.layer = Layer(name, module, "last", at_input, index, self._seen.append)

    @property
    def tensors(self) -> int:
        """How many there were in the last run; 0 before any."""
        return self._seen[-1] if self._seen else 0

    @property
    def is_given_nothing(self) -> bool:
        """Whether it ran, and there was none, as where its arguments are given by name."""
        return bool(self._seen) and not self.tensors

    def take_for_one(self) -> None:
        """Note that there is one: of a prepared model, whose own module does not run."""
        self._seen.append(1)


def _run(call: Call, watched: _Watched, rules: ReluRules | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return a layer's activation, the gradient there and, with `rules`, the gradient of the packed inputs under them."""

    def work(plan: Plan) -> tuple[Tensor, Tensor, Tensor | None]:
        parts: list[tuple[Tensor, Tensor, Tensor | None]] = []

        def body(start: int, stop: int) -> None:
            rows = torch.arange(start, stop, device=plan.device)
            batch = plan.inputs if stop - start == plan.images else plan.inputs[start:stop]
            parts.append(plan.layer_gradients(batch, rows, watched.layer, rules))

        program = taped(plan, plan.inputs)
        if program is not None and program.layer(watched.layer) is not None:
            watched.take_for_one()
        plan.run(plan.images, body)
        if len(parts) == 1:
            return parts[0]
        activations, gradients, guided = zip(*parts, strict=True)
        return torch.cat(activations), torch.cat(gradients), None if rules is None else torch.cat(guided)

    try:
        return call.run(work)
    except ValueError as error:
        if watched.tensors:
            raise
        if watched.is_given_nothing:
            got = f"none for {type(watched.layer.module).__name__}"
            refuse(call.where, "layer", "be given tensors by position", got, IndexError)
        raise AssertionError(str(error)) from error


def weighted(activation: Tensor, gradient: Tensor, *, relu: bool, add_up: bool) -> Tensor:
    """Return the channels (B, K, ...) weighted by their mean gradients: (B, 1, ...), or (B, K, ...) not added up."""
    shape = activation.shape
    images = [one.reshape(shape[0], shape[1], 1, -1) for one in (activation, gradient)]
    if not add_up:
        images = [one.flatten(0, 1)[:, None] for one in images]
    # the op as it is, of what can be weighted: a gradient has the shape and the dtype of what it is for
    op = torch.ops.pysal.grad_cam if images[0].numel() and images[0].dtype in FLOATING else ops.grad_cam
    cam = op(images[0], images[1], 1, images[0].shape[3], relu)
    return cam.reshape(shape[0], 1 if add_up else shape[1], *shape[2:])
