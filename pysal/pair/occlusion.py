"""PAIR's Occlusion."""

from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike

from pysal.engine.ablation.ablation import Ablation
from pysal.engine.ablation.features import Boxes, sliding_boxes
from pysal.pair.base import OUTPUT_LAYER_VALUES, Array, CallModel, CoreSaliency
from pysal.pair.source import TorchModel, source

__all__ = ["OUTPUT_LAYER_VALUES", "Occlusion"]


class Occlusion(CoreSaliency):
    """How much the score drops when a window is filled in, added up over the windows that cover a pixel.

    `pysal.leave_one_out` gives the mean.

    Source:
        Zeiler and Fergus 2013, arXiv:1311.2901, section 4.2.
    """

    expected_keys = (OUTPUT_LAYER_VALUES,)

    def GetMask(
        self,
        x_value: ArrayLike,
        call_model_function: CallModel,
        call_model_args: Any = None,
        size: int = 15,
        value: float = 0,
    ) -> Array:
        """Return the sum of drops at each pixel, of x_value's shape.

        Args:
            x_value: (H, W, C) or (H, W).
            call_model_function: see `CoreSaliency.GetMask`; it returns one number for each input. It gets one input at a
                time, as in PAIR. What `torch_model` returns gets as many as memory allows.
            call_model_args: see `CoreSaliency.GetMask`.
            size: side of the window, pixels. The window moves by one pixel and stays inside the image.
            value: number that the window is filled with.

        Raises:
            ValueError: the answer has another number of rows than the batch.
        """
        model = source(self, x_value, call_model_function, call_model_args)
        shape = np.shape(x_value)
        single = not isinstance(call_model_function, TorchModel)
        image = model.image if len(shape) == 3 else model.image.reshape(1, 1, *shape)
        extent = tuple(image.shape[1:])
        windows = list(sliding_boxes(extent, (extent[0], size, size), (1, 1, 1))) if size <= min(extent[1:]) else []
        fill = torch.full((1, 1, 1, 1), float(value), dtype=image.dtype, device=image.device)
        ablation = Ablation((image,), (fill,), Boxes([windows], mean=False))
        clean = model.scores(model.image.clone())
        drops = torch.zeros(len(windows), 1, dtype=torch.promote_types(clean.dtype, image.dtype), device=image.device)

        def body(first: int, stop: int) -> None:
            batch = ablation.without(range(first, stop))[0]
            scores = model.scores(batch.reshape(stop - first, *model.image.shape[1:]))
            drops[first:stop, 0] = (clean - scores).to(drops.dtype)

        model.run(len(windows), body, 1 if single else None)
        return model.as_value(ablation.maps(drops)[0].reshape(model.image.shape))
