"""PAIR's IntegratedGradients."""

from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike

from pysal import ops
from pysal._checks import refuse
from pysal._library import widest
from pysal.pair.base import INPUT_OUTPUT_GRADIENTS, Array, CallModel, CoreSaliency
from pysal.pair.source import source


class IntegratedGradients(CoreSaliency):
    """The mean gradient on the straight path from a baseline, times (x_value - x_baseline), as `pysal.integrated_gradients`.

    Source:
        Sundararajan, Taly and Yan 2017, arXiv:1703.01365.
    """

    expected_keys = (INPUT_OUTPUT_GRADIENTS,)

    def GetMask(
        self,
        x_value: ArrayLike,
        call_model_function: CallModel,
        call_model_args: Any = None,
        x_baseline: ArrayLike | None = None,
        x_steps: int = 25,
        batch_size: int = 1,
    ) -> Array:
        """Return the integrated gradients, of x_value's shape, by PAIR's rule: equal weights, both ends among the steps.

        They are float64 where x_value or the baseline is.

        Args:
            x_value: see `CoreSaliency.GetMask`.
            call_model_function: see `CoreSaliency.GetMask`.
            call_model_args: see `CoreSaliency.GetMask`.
            x_baseline: baseline of x_value's shape; None = zeros.
            x_steps: number of gradients.
            batch_size: most steps in one call of the model; it does not change the result.

        Raises:
            AssertionError: the baseline has another shape.
            ValueError: the gradients have another shape than the batch.
        """
        shape = np.shape(x_value)
        baseline = np.zeros_like(x_value) if x_baseline is None else np.asarray(x_baseline)
        if baseline.shape != shape:
            refuse("pysal.pair", "x_baseline", f"have the shape of x_value, {shape}", baseline.shape, AssertionError)
        # a baseline of more digits keeps them, at every step and in the result
        value = np.asarray(x_value, np.result_type(np.asarray(x_value), baseline))
        model = source(self, value, call_model_function, call_model_args)
        start, device = model.as_image(baseline).to(model.image), model.image.device
        alphas = torch.linspace(0, 1, x_steps, dtype=torch.float64, device="cpu").to(device, widest(device))
        weights = torch.full_like(alphas, 1 / x_steps)
        total = torch.zeros_like(model.image, dtype=widest(model.image.device))

        def body(first: int, stop: int) -> None:
            rows = torch.zeros(stop - first, dtype=torch.int64, device=alphas.device)
            points = ops.path_integral_points(model.image, start, rows, alphas[first:stop])
            ops.path_integral_accumulate_(total, model.gradients(points).to(points.dtype), None, rows, weights[first:stop])

        model.run(x_steps, body, batch_size)
        found = ops.path_integral_product(model.image, start, total)
        return model.as_value(found.to(torch.promote_types(model.image.dtype, torch.float32)))
