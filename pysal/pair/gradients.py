"""PAIR's GradientSaliency."""

from typing import Any

from numpy.typing import ArrayLike

from pysal.pair.base import INPUT_OUTPUT_GRADIENTS, Array, CallModel, CoreSaliency
from pysal.pair.source import source


class GradientSaliency(CoreSaliency):
    """The gradient of the score with respect to the input, as `pysal.gradient`.

    Source:
        Simonyan, Vedaldi and Zisserman 2013, arXiv:1312.6034.
    """

    expected_keys = (INPUT_OUTPUT_GRADIENTS,)

    def GetMask(self, x_value: ArrayLike, call_model_function: CallModel, call_model_args: Any = None) -> Array:
        """Return the gradient, of x_value's shape.

        Args:
            x_value: see `CoreSaliency.GetMask`.
            call_model_function: see `CoreSaliency.GetMask`.
            call_model_args: see `CoreSaliency.GetMask`.

        Raises:
            ValueError: the gradients have another shape than the batch.
        """
        model = source(self, x_value, call_model_function, call_model_args)
        return model.as_value(model.gradients(model.image))
