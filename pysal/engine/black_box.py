"""Models that are not torch: any function on NumPy arrays."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def numpy_model(function: Callable[..., Any]) -> Callable[..., Tensor]:
    """Return a model that calls `function` with NumPy arrays: an ONNX Runtime session, scikit-learn, a remote service.

    Only leave_one_out can explain it: nothing flows back through NumPy.

    Args:
        function: takes an array (N, C, H, W) (and extra inputs as arrays), returns scores (N, K) or (N,).

    Example:
        >>> import pysal
        >>> brightness = pysal.numpy_model(lambda x: x.mean(axis=(1, 2, 3)))
        >>> drops = pysal.leave_one_out(brightness, torch.ones(1, 3, 4, 4), segments=pysal.Grid(2, 2), score="logit")
        >>> float(drops[0, 0, 0, 0])
        0.25
    """

    def to_numpy(value: Any) -> Any:
        return value.detach().cpu().numpy() if isinstance(value, Tensor) else value

    def model(*args: Any, **kwargs: Any) -> Tensor:
        output = function(*map(to_numpy, args), **{name: to_numpy(value) for name, value in kwargs.items()})
        scores: NDArray[Any] = np.array(output)  # a copy: the next call may answer into the same buffer
        device = args[0].device if args and isinstance(args[0], Tensor) else None
        return torch.as_tensor(scores, device=device)

    return model
