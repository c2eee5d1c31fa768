"""captum's Occlusion."""

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from pysal._checks import FLOATING, refuse
from pysal.captum._bases import Baselines, entry, where
from pysal.captum._call import Inputs, Target, as_tuple
from pysal.captum.feature_ablation import FeatureAblation
from pysal.engine.ablation.features import Boxes, sliding_boxes
from pysal.segments import Window

Shape: TypeAlias = tuple[int, ...]
Strides: TypeAlias = int | tuple[int | tuple[int, ...], ...] | None


class Occlusion(FeatureAblation):
    """How much the output drops when a sliding window is replaced by the baseline, as `pysal.leave_one_out` with a `Window`.

    Args:
        forward_func: the model, or any function of tensors.

    Source:
        Zeiler and Fergus 2013, arXiv:1311.2901, section 4.2.

    Example:
        >>> Occlusion(lambda x: x.sum(1)).attribute(torch.tensor([[1.0, 3.0, 5.0]]), (2,))
        tensor([[4., 6., 8.]])
    """

    def __init__(self, forward_func: Callable[..., Any]) -> None:
        super().__init__(forward_func)

    @entry
    def attribute(  # type: ignore[override]  # captum's order: the window comes second
        self,
        inputs: Inputs,
        sliding_window_shapes: Shape | tuple[Shape, ...],
        strides: Strides = None,
        baselines: Baselines = None,
        target: Target = None,
        additional_forward_args: object = None,
        perturbations_per_eval: int = 1,
        show_progress: bool = False,
    ) -> Any:
        """Return, at each element, the mean drop of the output over the windows that cover it.

        Args:
            inputs: (B, ...), or a tuple of such tensors.
            sliding_window_shapes: size of the window in every dimension of an input except the first; one tuple for each input.
            strides: step of the window in every dimension, or one int for all dimensions of an input; None = 1.
            baselines: see `FeatureAblation`.
            target: see `FeatureAblation`.
            additional_forward_args: see `Saliency`.
            perturbations_per_eval: see `FeatureAblation`.
            show_progress: show a tqdm bar.

        Returns:
            (n, ...) for n numbers in the output of all examples, float32 as in captum; a tuple of them for a tuple of inputs.

        Raises:
            AssertionError: see `FeatureAblation`; or a window is empty or larger than the input, or a stride is larger than the
                window.
            ValueError: a stride is below 1.
        """
        several = as_tuple(inputs)
        steps = self._strides(strides, several)
        windows = self._windows(sliding_window_shapes, several)
        for one, window, step in zip(several, windows, steps, strict=True):
            for size, side, by in zip(one.shape[1:], window, step, strict=True):
                if not isinstance(side, int) or side < 1:
                    requirement = "be whole numbers of at least 1"
                    refuse(where(self), "sliding_window_shapes", requirement, repr(window), AssertionError)
                if not isinstance(by, int) or by < 1:
                    refuse(where(self), "strides", "be whole numbers of at least 1", repr(step))
                if side > size:
                    requirement = f"fit into the input's {tuple(one.shape[1:])}"
                    refuse(where(self), "sliding_window_shapes", requirement, window, AssertionError)
                if by > side < size:
                    refuse(where(self), "strides", f"be at most the window {window}", step, AssertionError)
        shapes = [one.shape[1:] for one in several]
        boxes = Boxes([list(sliding_boxes(*one)) for one in zip(shapes, windows, steps, strict=True)])
        found = self._leave_out(
            several, baselines, target, additional_forward_args, boxes, _window(several, windows, steps),
            perturbations_per_eval, show_progress,
        )  # fmt: skip
        return found if isinstance(inputs, tuple) else found[0]

    def attribute_future(self, *args: Any, **kwargs: Any) -> Any:
        """Not implemented, as in captum.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(f"{where(self)}: attribute_future exists for FeatureAblation only")

    def _rounded(self, found: Tensor, dtype: torch.dtype) -> Tensor:
        return found.to(torch.promote_types(torch.float32, torch.get_default_dtype()))  # captum's, whatever the output's

    def _strides(self, strides: Strides, inputs: tuple[Tensor, ...]) -> list[Shape]:
        given: tuple[Any, ...]
        if strides is None:
            given = (1,) * len(inputs)
        elif len(inputs) == 1 and not (isinstance(strides, tuple) and len(strides) == 1):
            given = (strides,)
        elif isinstance(strides, tuple) and len(strides) == len(inputs):
            given = strides
        else:
            refuse(where(self), "strides", f"be {len(inputs)}, one for each input", repr(strides), AssertionError)
        found: list[Shape] = []
        for one, step in zip(inputs, given, strict=True):
            every: Any = (step,) * (one.ndim - 1) if isinstance(step, int) else step
            if not isinstance(every, tuple) or len(every) != one.ndim - 1:
                refuse(where(self), "strides", f"be an int or {one.ndim - 1} of them", repr(step), AssertionError)
            found.append(every)
        return found

    def _windows(self, shapes: Any, inputs: tuple[Tensor, ...]) -> list[Shape]:
        if not isinstance(shapes, (tuple, list)) or not shapes:
            refuse(where(self), "sliding_window_shapes", "be a tuple of sizes", repr(shapes), TypeError)
        given = (shapes,) if isinstance(shapes[0], int) else shapes
        if len(given) != len(inputs):
            refuse(where(self), "sliding_window_shapes", f"be {len(inputs)}, one for each input", len(given), AssertionError)
        for one, window in zip(inputs, given, strict=True):
            if not isinstance(window, tuple) or len(window) != one.ndim - 1:
                requirement = f"be a tuple of {one.ndim - 1} sizes"
                refuse(where(self), "sliding_window_shapes", requirement, repr(window), AssertionError)
        return list(given)


def _window(inputs: tuple[Tensor, ...], windows: list[Shape], steps: list[Shape]) -> Window | None:
    """Return the window as one over images, where it is: of all channels."""
    first = inputs[0]
    if len(inputs) != 1 or first.ndim != 4 or first.dtype not in FLOATING or 0 in first.shape:
        return None
    (channels, height, width), (_, down, right) = windows[0], steps[0]
    if channels != first.shape[1] or first.shape[2] * first.shape[3] < 2:
        return None
    return Window((height, width), (min(down, height), min(right, width)))
