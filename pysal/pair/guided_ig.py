"""PAIR's GuidedIG."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike

from pysal._checks import refuse
from pysal.engine.paths.guided import GuidedPaths
from pysal.pair.base import INPUT_OUTPUT_GRADIENTS, Array, CallModel, CoreSaliency
from pysal.pair.source import source

__all__ = ["INPUT_OUTPUT_GRADIENTS", "GuidedIG", "guided_ig_impl"]


class GuidedIG(CoreSaliency):
    """The integral of the gradient along a path on which gradients are small, as `pysal.guided_integrated_gradients`.

    PAIR 0.2.1's own needs a NumPy older than 2.4.

    Source:
        Kapishnikov et al. 2021, arXiv:2106.09788.
    """

    expected_keys = (INPUT_OUTPUT_GRADIENTS,)

    def GetMask(
        self,
        x_value: ArrayLike,
        call_model_function: CallModel,
        call_model_args: Any = None,
        x_baseline: ArrayLike | None = None,
        x_steps: int = 200,
        fraction: float = 0.25,
        max_dist: float = 0.02,
    ) -> Array:
        """Return the attribution, of x_value's shape, float64 as in PAIR.

        Args:
            x_value: see `CoreSaliency.GetMask`.
            call_model_function: see `CoreSaliency.GetMask`; it gets one float64 input at a time, as in PAIR.
            call_model_args: see `CoreSaliency.GetMask`.
            x_baseline: baseline of x_value's shape; None = zeros.
            x_steps: number of gradients.
            fraction: share of the values that move at a time, 0 to 1: those of the smallest |gradient|.
            max_dist: how far a value may be ahead of the straight path or behind it, in shares of its way, 0 to 1.

        Raises:
            AssertionError: the baseline has another shape.
            ValueError: the gradients have another shape than the batch.
        """
        value = np.asarray(x_value, np.float64)
        baseline = np.zeros_like(value) if x_baseline is None else np.asarray(x_baseline, np.float64)
        if baseline.shape != value.shape:
            refuse("pysal.pair", "x_baseline", f"have the shape of x_value, {value.shape}", baseline.shape, AssertionError)
        model = source(self, value, call_model_function, call_model_args)

        def gradient(place: Array) -> Array:
            return model.as_value(model.gradients(model.as_image(place)))

        return guided_ig_impl(value, baseline, gradient, x_steps, fraction, max_dist)


def guided_ig_impl(
    x_input: ArrayLike,
    x_baseline: ArrayLike,
    grad_func: Callable[[Array], ArrayLike],
    steps: int = 200,
    fraction: float = 0.25,
    max_dist: float = 0.02,
) -> Array:
    """Return the attribution of an input of any shape, float64, given a function of the gradient at an array of that shape."""
    end, start = (torch.from_numpy(np.array(array, np.float64))[None] for array in (x_input, x_baseline))
    paths = GuidedPaths(start, end, steps=steps, fraction=fraction, max_distance=max_dist)
    for step in range(steps):
        gradient = np.asarray(grad_func(paths.places[0].numpy().copy()), np.float64)
        paths.advance(torch.zeros(1, dtype=torch.int64, device="cpu"), step, torch.from_numpy(gradient)[None])
    attribution: Array = paths.total[0].numpy()
    return attribution
