"""PAIR's GradCam."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from skimage.transform import resize

from pysal import ops
from pysal.pair.base import CONVOLUTION_LAYER_VALUES, CONVOLUTION_OUTPUT_GRADIENTS, Array, CallModel, CoreSaliency
from pysal.pair.source import source

__all__ = ["CONVOLUTION_LAYER_VALUES", "CONVOLUTION_OUTPUT_GRADIENTS", "GradCam"]


class GradCam(CoreSaliency):
    """Where a layer's features speak for the class, as `pysal.grad_cam`.

    Source:
        Selvaraju et al. 2016, arXiv:1610.02391.
    """

    expected_keys = (CONVOLUTION_LAYER_VALUES, CONVOLUTION_OUTPUT_GRADIENTS)

    def GetMask(
        self,
        x_value: ArrayLike,
        call_model_function: CallModel,
        call_model_args: Any = None,
        should_resize: bool = True,
        three_dims: bool = True,
    ) -> Array:
        """Return the map.

        Args:
            x_value: see `CoreSaliency.GetMask`.
            call_model_function: see `CoreSaliency.GetMask`; the layer's values and gradients are (N, h, w, K).
            call_model_args: see `CoreSaliency.GetMask`.
            should_resize: whether to divide by the largest value and resize to x_value's height and width, as PAIR does.
            three_dims: whether to repeat the map in three channels.

        Returns:
            (H, W, 3), or (H, W) without `three_dims`; without `should_resize` the layer's (h, w) instead of (H, W).

        Raises:
            ValueError: the answer has another number of rows than the batch.
        """
        model = source(self, x_value, call_model_function, call_model_args)
        activation, gradient = model.layers()
        cam = ops.grad_cam(activation, gradient, activation.shape[2], activation.shape[3], relu=True)
        mask: Array = cam[0, 0].float().cpu().numpy()
        if should_resize:
            mask = resize(mask / mask.max() if mask.max() > 0 else mask, np.shape(x_value)[:2])  # type: ignore[no-untyped-call]
        return np.tile(mask[:, :, None], [1, 1, 3]) if three_dims else mask
