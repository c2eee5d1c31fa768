"""What PAIR's classes share: the keys of a model's answer, its check, and smoothing."""

from collections.abc import Callable, MutableMapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

CONVOLUTION_LAYER_VALUES = "CONVOLUTION_LAYER_VALUES"
"""Key of a model's answer: the values of the layer that `GradCam` explains, (N, h, w, K)."""
CONVOLUTION_OUTPUT_GRADIENTS = "CONVOLUTION_OUTPUT_GRADIENTS"
"""Key of a model's answer: the gradients of the output with respect to that layer, (N, h, w, K)."""
INPUT_OUTPUT_GRADIENTS = "INPUT_OUTPUT_GRADIENTS"
"""Key of a model's answer: the gradients of the output with respect to the inputs, of their shape."""
OUTPUT_LAYER_VALUES = "OUTPUT_LAYER_VALUES"
"""Key of a model's answer: the output, one number for each input."""

_ROWS = (CONVOLUTION_LAYER_VALUES, CONVOLUTION_OUTPUT_GRADIENTS, OUTPUT_LAYER_VALUES)
SHAPE_ERROR_MESSAGE = {
    INPUT_OUTPUT_GRADIENTS: f"pysal.pair: {INPUT_OUTPUT_GRADIENTS} must have the shape of the batch, {{}}, got {{}}",
    **{key: f"pysal.pair: {key} must have one row for each of {{}} inputs, got {{}}" for key in _ROWS},
}
"""What is said of a model's answer that does not fit the batch, by key: what is expected, and what there is."""

Array: TypeAlias = NDArray[Any]
# (x_value_batch, call_model_args=..., expected_keys=[...]) -> {key: array with one row for each input}
CallModel: TypeAlias = Callable[..., MutableMapping[str, Any]]


class CoreSaliency:
    """Base of all classes: a mask for an input, and the mean of the masks of noisy copies."""

    expected_keys: Sequence[str] = ()

    def GetMask(self, x_value: ArrayLike, call_model_function: CallModel, call_model_args: Any = None) -> Array:
        """Return the mask of one input; each class has its own.

        Args:
            x_value: one input, without a batch dimension: an image (H, W, C).
            call_model_function: called as `(x_value_batch, call_model_args=..., expected_keys=[...])`, returns a mapping from
                each expected key to an array with one row for each input; or what `torch_model` returns.
            call_model_args: passed on to `call_model_function`.

        Raises:
            NotImplementedError: always, here.
        """
        raise NotImplementedError(f"pysal.pair: {type(self).__name__} must implement GetMask")

    def GetSmoothedMask(
        self,
        x_value: ArrayLike,
        call_model_function: CallModel,
        call_model_args: Any = None,
        stdev_spread: float = 0.15,
        nsamples: int = 25,
        magnitude: bool = True,
        **kwargs: Any,
    ) -> Array:
        """Return the mean of the masks, or of their squares, over noisy copies of an input.

        Args:
            x_value: see `GetMask`.
            call_model_function: see `GetMask`.
            call_model_args: see `GetMask`.
            stdev_spread: standard deviation of the noise in multiples of the input's range. `numpy.random.normal` draws it.
            nsamples: number of noisy copies.
            magnitude: whether to square the masks, which is PAIR's default.
            **kwargs: arguments of `GetMask`.

        Returns:
            x_value's shape, float32 as in PAIR.

        Source:
            Smilkov et al. 2017, arXiv:1706.03825.
        """
        value = np.asarray(x_value)
        deviation = stdev_spread * (value.max() - value.min())
        total = np.zeros(value.shape, dtype=np.float32)
        for _ in range(nsamples):
            noisy = value + np.random.normal(0, deviation, value.shape)
            mask = self.GetMask(noisy, call_model_function, call_model_args, **kwargs)
            total += mask * mask if magnitude else mask
        return total / nsamples

    def format_and_check_call_model_output(
        self, output: MutableMapping[str, Any], input_shape: tuple[int, ...], expected_keys: Sequence[str]
    ) -> None:
        """Convert the expected entries of a model's answer to arrays, and refuse those that do not fit the batch.

        Args:
            output: the answer, changed in place.
            input_shape: shape of the batch.
            expected_keys: keys that the model was asked for.

        Raises:
            ValueError: the gradients have another shape than the batch, or another number of rows.
        """
        for key in expected_keys:
            output[key] = np.asarray(output[key])
            shape = output[key].shape
            wanted, got = (input_shape, shape) if key == INPUT_OUTPUT_GRADIENTS else (input_shape[0], shape[0] if shape else 0)
            if wanted != got:
                raise ValueError(SHAPE_ERROR_MESSAGE[key].format(wanted, got))
