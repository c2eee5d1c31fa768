"""PAIR's BlurIG."""

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike

from pysal import ops
from pysal._checks import refuse
from pysal._library import widest
from pysal.pair.base import INPUT_OUTPUT_GRADIENTS, Array, CallModel, CoreSaliency
from pysal.pair.source import source


class BlurIG(CoreSaliency):
    """The integral of the gradient over blurred versions of the image, as `pysal.blur_integrated_gradients`.

    Source:
        Xu, Venugopalan and Sundararajan 2020, arXiv:2004.03383.

    Deviations:
        With `sqrt` each step has its own width. PAIR uses the width of a batch's last step for the whole batch.
    """

    expected_keys = (INPUT_OUTPUT_GRADIENTS,)

    def GetMask(
        self,
        x_value: ArrayLike,
        call_model_function: CallModel,
        call_model_args: Any = None,
        max_sigma: float = 50,
        steps: int = 100,
        grad_step: float = 0.01,
        sqrt: bool = False,
        batch_size: int = 1,
    ) -> Array:
        """Return the attribution, of x_value's shape.

        Args:
            x_value: an image (H, W, C).
            call_model_function: see `CoreSaliency.GetMask`.
            call_model_args: see `CoreSaliency.GetMask`.
            max_sigma: width of the blurriest image, pixels; with `sqrt` the width is its square root.
            steps: number of gradients.
            grad_step: step of the difference quotient in sigma, pixels.
            sqrt: sigma_i = sqrt(max_sigma i / steps) instead of max_sigma i / steps.
            batch_size: most steps in one call of the model; it does not change the result.

        Raises:
            ValueError: x_value is not an image, or the gradients have another shape than the batch.
        """
        if np.ndim(x_value) != 3:
            refuse("pysal.pair", "x_value", "be an image (H, W, C)", f"shape {np.shape(x_value)}")
        model = source(self, x_value, call_model_function, call_model_args)
        device = model.image.device
        places = [i * max_sigma / steps for i in range(steps + 1)]
        sigmas = [math.sqrt(place) for place in places] if sqrt else places
        widths = torch.tensor(sigmas, dtype=torch.float64, device="cpu").diff().to(device, widest(device))
        total = torch.zeros_like(model.image, dtype=widest(model.image.device))

        def body(first: int, stop: int) -> None:
            rows = torch.zeros(stop - first, dtype=torch.int64, device=device)
            image = model.image.expand(stop - first, -1, -1, -1)
            points, slopes = ops.gaussian_scale_space_derivative(image, sigmas[first:stop], step=grad_step, boundary="constant")
            ops.path_integral_accumulate_(total, model.gradients(points).to(points.dtype), slopes, rows, widths[first:stop])

        model.run(steps, body, batch_size)
        return model.as_value(-total.to(torch.promote_types(model.image.dtype, torch.float32)))


def gaussian_blur(image: ArrayLike, sigma: float) -> Array:
    """Return an image (H, W, C) blurred by a Gaussian of `sigma` pixels, zero outside the image."""
    array = np.asarray(image)
    wide = np.promote_types(array.dtype, np.float32)
    planes = torch.from_numpy(np.ascontiguousarray(np.moveaxis(array, -1, 0), dtype=wide))[None]
    blurred = ops.gaussian_scale_space(planes, [float(sigma)], boundary="constant")
    return np.ascontiguousarray(np.moveaxis(blurred[0].numpy(), 0, -1))
