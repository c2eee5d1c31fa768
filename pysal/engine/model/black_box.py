"""Models that are not torch: any function on NumPy arrays."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pysal._checks import refuse


def numpy_model(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a model that calls `function` with NumPy arrays: an ONNX Runtime session, scikit-learn, a remote service.

    Only leave_one_out can explain it: nothing flows back through NumPy.

    Args:
        function: takes an array (N, C, H, W) (and extra inputs as arrays), returns scores (N, K) or (N,), alone, in a list of
            arrays as ONNX Runtime does, or by name as OpenVINO does; of several, see the models' outputs in `gradient`.

    Example:
        >>> import pysal
        >>> brightness = pysal.numpy_model(lambda x: x.mean(axis=(1, 2, 3)))
        >>> drops = pysal.leave_one_out(brightness, torch.ones(1, 3, 4, 4), segments=pysal.Grid(2, 2), score="logit")
        >>> float(drops[0, 0, 0, 0])
        0.25
    """

    def to_numpy(value: Any) -> Any:
        return value.detach().cpu().numpy() if isinstance(value, Tensor) else value

    def model(*args: Any, **kwargs: Any) -> Any:
        output = function(*map(to_numpy, args), **{name: to_numpy(value) for name, value in kwargs.items()})
        first = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        rows, device = (None, "cpu") if first is None else (len(first), first.device)

        def to_tensor(value: Any) -> Tensor:
            try:
                array: NDArray[Any] = np.array(to_numpy(value))  # a copy: the next call may answer into the same buffer
            except ValueError:  # rows of different lengths
                array = np.array(None)
            if array.dtype.kind not in "biufc":
                got = value if isinstance(value, str) else f"{type(value).__name__} {' '.join(repr(value).split())[:60]}"
                refuse("pysal.numpy_model", "function", "return arrays of numbers, alone, in a list or by name", got, TypeError)
            return torch.from_numpy(array).to(device)

        if isinstance(output, Mapping):
            return {str(getattr(name, "any_name", name)): to_tensor(value) for name, value in output.items()}
        if isinstance(output, (list, tuple)) and output and all(isinstance(one, (np.ndarray, Tensor)) for one in output):
            # as ONNX Runtime has it, an array for each output, where they have a row for each input: else each is a row
            if all(one.ndim and len(one) == rows and (one.ndim > 1 or len(output) != rows) for one in output):
                return tuple(to_tensor(one) for one in output)
        return to_tensor(output)

    return model
