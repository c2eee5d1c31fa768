"""Where gradients, scores and activations come from: a function of NumPy arrays, or a torch model on its device."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from pysal._checks import refuse
from pysal.engine.layers.default_layer import default_layer
from pysal.engine.layers.features import find_layer
from pysal.engine.layers.spatial import Reading, reading
from pysal.engine.prepared.model import PreparedModel
from pysal.engine.request.extra_inputs import ExtraInputs
from pysal.engine.request.plan import Plan
from pysal.engine.request.running import Running
from pysal.engine.request.score import ScoreKind
from pysal.engine.request.target import Target
from pysal.engine.running.chunks import run_chunks
from pysal.pair.base import (
    CONVOLUTION_LAYER_VALUES,
    CONVOLUTION_OUTPUT_GRADIENTS,
    INPUT_OUTPUT_GRADIENTS,
    OUTPUT_LAYER_VALUES,
    Array,
    CallModel,
    CoreSaliency,
)

WHERE = "pysal.pair.torch_model"


class TorchModel:
    """A torch model as a call_model_function; make it with `torch_model`, which documents the arguments."""

    def __init__(
        self,
        model: Any,
        target: Target,
        *,
        layer: str | nn.Module | None,
        score: ScoreKind,
        extra_inputs: ExtraInputs,
    ) -> None:
        if not callable(model):
            refuse(WHERE, "model", "be callable", type(model).__name__, TypeError)
        self.model, self.target, self.layer, self.score, self.extra_inputs = model, target, layer, score, extra_inputs

    def __call__(
        self, x_value_batch: ArrayLike, call_model_args: Any = None, expected_keys: Sequence[str] | None = None
    ) -> dict[str, Any]:
        """Return what is expected of a batch (N, H, W, C) as NumPy arrays, for programs and classes that want those.

        Args:
            x_value_batch: (N, H, W, C).
            call_model_args: None, or a mapping with "target", which replaces the model's own.
            expected_keys: which of the four; None = the gradients.

        Raises:
            ValueError: an unknown key, or no target: the most probable class could change from call to call.
        """
        batch = np.asarray(x_value_batch)
        if self._target(call_model_args) is None:
            refuse(WHERE, "target", "be given where the model is called step by step", None)
        keys = [INPUT_OUTPUT_GRADIENTS] if expected_keys is None else expected_keys
        plan = self.plan(self.images(batch), call_model_args)
        return {key: self._answer(plan, key) for key in keys}

    def images(self, batch: Array) -> Tensor:
        """Return a batch (N, H, W, C) as images (N, C, H, W) on the model's device, in its dtype."""
        model = self.model.original if isinstance(self.model, PreparedModel) else self.model
        parameters = model.parameters() if isinstance(model, nn.Module) else ()
        first = next((one for one in parameters if one.dtype.is_floating_point), None)
        images = torch.from_numpy(np.moveaxis(batch, -1, 1).copy())
        dtype = torch.promote_types(images.dtype, torch.float32) if first is None else first.dtype
        return images.to(device=None if first is None else first.device, dtype=dtype)

    def plan(self, images: Tensor, call_model_args: Any, batch_size: int | None = None) -> Plan:
        """Return the request for these images, which are versions of one where there are further arguments of it."""
        versions = len(images) > 1 and self.extra_inputs != ()
        plan = Plan(
            WHERE,
            self.model,
            images[:1] if versions else images,
            self._target(call_model_args),
            Running(self.score, self.extra_inputs, batch_size, "as set", None),
        )
        return plan.derive(images, torch.zeros(len(images), dtype=torch.int64, device=images.device)) if versions else plan

    def layers(self, plan: Plan) -> tuple[Tensor, Tensor]:
        """Return the layer's activation and the gradient there, (N, K, h, w) each."""
        model = plan.layered_model
        how: Reading | None = None
        if self.layer is None:
            choice = default_layer(WHERE, model, lambda: plan.look(0))
            layer, how = choice.layer, choice.reading
        else:
            layer = find_layer(WHERE, model, self.layer)
        rows = torch.arange(plan.images, device=plan.device)
        activation, gradient, _ = plan.layer_gradients(plan.inputs, rows, layer)
        size = (plan.inputs.shape[2], plan.inputs.shape[3])
        how = how or reading(tuple(activation.shape), layer.module, size)
        return (activation, gradient) if how is None else (how(activation), how(gradient))

    def _target(self, call_model_args: Any) -> Target:
        given: Target = call_model_args.get("target") if isinstance(call_model_args, Mapping) else None
        return self.target if given is None else given

    def _answer(self, plan: Plan, key: str) -> Array:
        rows = torch.arange(plan.images, device=plan.device)
        if key == INPUT_OUTPUT_GRADIENTS:
            return _array(plan.gradients(plan.inputs, rows))
        if key == OUTPUT_LAYER_VALUES:
            return plan.scores(plan.inputs.clone(), rows)[0].cpu().numpy()
        if key in (CONVOLUTION_LAYER_VALUES, CONVOLUTION_OUTPUT_GRADIENTS):
            return _array(self.layers(plan)[key == CONVOLUTION_OUTPUT_GRADIENTS])
        refuse(WHERE, "expected_keys", "hold keys of pysal.pair", repr(key))


def torch_model(
    model: Any,
    target: Target = None,
    *,
    layer: str | nn.Module | None = None,
    score: ScoreKind = "logit",
    extra_inputs: ExtraInputs = (),
) -> TorchModel:
    """Return a model as a call_model_function with which the classes of `pysal.pair` stay on the model's device.

    Args:
        model: an nn.Module in eval mode, or any differentiable callable, on images (N, C, H, W).
        target: see `pysal.gradient`; `call_model_args={"target": ...}` replaces it. None = the most probable class of x_value.
        layer: the layer for `GradCam`; see `pysal.grad_cam`.
        score: which number of the target's column is explained. "logit" or "raw": the output as it is. "auto": the target's
            probability if the output tells one, else the output as it is. "probability" and "log_probability": the same, but
            one number per image outside [0, 1] is refused. "softmax", "log_softmax" (classes exclude each other), "sigmoid",
            "log_sigmoid" (independent labels, or a binary logit): that function, whatever the output is. What the output is
            (numbers, probabilities, logits) is found out from all images of the call together.
        extra_inputs: see `pysal.gradient`.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 10)).eval()
        >>> from pysal.pair import GradientSaliency
        >>> GradientSaliency().GetMask(np.zeros((8, 8, 3), np.float32), torch_model(model, 3)).shape
        (8, 8, 3)
    """
    return TorchModel(model, target, layer=layer, score=score, extra_inputs=extra_inputs)


class Source(ABC):
    """One input and what a model says around it.

    Attributes:
        image: the input as an image (1, C, H, W), or (1, 1, 1, N) where it is none.
    """

    image: Tensor

    @abstractmethod
    def gradients(self, batch: Tensor) -> Tensor:
        """Return the gradient at each of the images (n, C, H, W), in the dtype of the model's answer."""

    @abstractmethod
    def scores(self, batch: Tensor) -> Tensor:
        """Return the score (n,) of each of the images."""

    @abstractmethod
    def layers(self) -> tuple[Tensor, Tensor]:
        """Return a layer's activation and the gradient there, (1, K, h, w) each."""

    @abstractmethod
    def as_image(self, value: ArrayLike) -> Tensor:
        """Return another input of the same shape as an image."""

    @abstractmethod
    def as_value(self, image: Tensor) -> Array:
        """Return an image (1, C, H, W) as an array of the input's shape."""

    def run(self, total: int, body: Callable[[int, int], None], batch_size: int | None) -> None:
        """Run `body(start, stop)` over the queue of `total` model rows."""
        run_chunks(
            total,
            body,
            label="pair",
            batch_size=batch_size,
            device=self.image.device,
            row_bytes=self.image.numel() * self.image.element_size(),
        )


def source(saliency: CoreSaliency, x_value: ArrayLike, call_model: CallModel, call_model_args: Any) -> Source:
    """Return the source for one call of GetMask."""
    value = np.asarray(x_value)
    if not isinstance(call_model, TorchModel):
        return _Called(saliency, value, call_model, call_model_args)
    if value.ndim != 3:
        refuse("pysal.pair", "x_value", "be an image (H, W, C) for torch_model", f"shape {value.shape}")
    return _OnDevice(value, call_model, call_model_args)


class _Called(Source):
    def __init__(self, saliency: CoreSaliency, value: Array, call_model: CallModel, call_model_args: Any) -> None:
        self.saliency, self.value, self.call_model, self.call_model_args = saliency, value, call_model, call_model_args
        self.image = self.as_image(value)

    def ask(self, batch: Array) -> Mapping[str, Array]:
        keys = list(self.saliency.expected_keys)
        found = self.call_model(batch, call_model_args=self.call_model_args, expected_keys=keys)
        self.saliency.format_and_check_call_model_output(found, batch.shape, keys)
        return found

    def gradients(self, batch: Tensor) -> Tensor:
        found = np.asarray(self.ask(self._batch(batch))[INPUT_OUTPUT_GRADIENTS])
        return torch.cat([self.as_image(one) for one in found])

    def scores(self, batch: Tensor) -> Tensor:
        return torch.from_numpy(np.array(self.ask(self._batch(batch))[OUTPUT_LAYER_VALUES]))

    def layers(self) -> tuple[Tensor, Tensor]:
        found = self.ask(self.value[None])
        activation, gradient = (
            torch.from_numpy(np.moveaxis(found[key], -1, 1).copy())
            for key in (CONVOLUTION_LAYER_VALUES, CONVOLUTION_OUTPUT_GRADIENTS)
        )
        wide = torch.promote_types(torch.promote_types(activation.dtype, gradient.dtype), torch.float32)
        return activation.to(wide), gradient.to(wide)

    def as_image(self, value: ArrayLike) -> Tensor:
        array = np.asarray(value)
        wide = np.promote_types(array.dtype, np.float32)
        image = torch.from_numpy(np.ascontiguousarray(np.moveaxis(array, -1, 0) if array.ndim == 3 else array, dtype=wide))
        return image[None] if array.ndim == 3 else image.reshape(1, 1, 1, -1)

    def as_value(self, image: Tensor) -> Array:
        value: Array = self._batch(image)[0]
        return value

    def _batch(self, images: Tensor) -> Array:
        array = images.numpy()
        array = np.moveaxis(array, 1, -1) if self.value.ndim == 3 else array
        return np.ascontiguousarray(array).reshape(len(images), *self.value.shape)


class _OnDevice(Source):
    def __init__(self, value: Array, model: TorchModel, call_model_args: Any) -> None:
        self.model = model
        self.image = model.images(value[None])
        self.plan = model.plan(self.image, call_model_args)
        self.plan.fix_target()

    def gradients(self, batch: Tensor) -> Tensor:
        return self.plan.gradients(batch, self._rows(batch))

    def scores(self, batch: Tensor) -> Tensor:
        return self.plan.scores(batch, self._rows(batch))[0]

    def layers(self) -> tuple[Tensor, Tensor]:
        return self.model.layers(self.plan)

    def as_image(self, value: ArrayLike) -> Tensor:
        return self.model.images(np.asarray(value)[None])

    def as_value(self, image: Tensor) -> Array:
        value: Array = _array(image)[0]
        return value

    def _rows(self, batch: Tensor) -> Tensor:
        return torch.zeros(len(batch), dtype=torch.int64, device=batch.device)


def _array(images: Tensor) -> Array:
    """Return images (N, C, H, W) as an array (N, H, W, C)."""
    images = images.detach() if images.dtype in (torch.float32, torch.float64) else images.detach().float()
    return np.ascontiguousarray(images.movedim(1, -1).cpu().numpy())
