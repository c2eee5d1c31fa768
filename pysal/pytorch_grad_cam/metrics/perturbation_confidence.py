"""The score before and after a change of the images that follows their maps."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from skimage.filters import threshold_otsu
from torch import Tensor

from pysal.pytorch_grad_cam._request import outputs_of, row_of

Maps = NDArray[Any]
Imputer = Callable[[Tensor, Tensor], Tensor]
PERCENTILES = (10, 20, 30, 40, 50, 60, 70, 80, 90)


class PerturbationConfidenceMetric:
    """How much a target changes when images are changed after their maps.

    Args:
        perturbation: (image (C, H, W), map (H, W)) on the CPU -> image.
    """

    def __init__(self, perturbation: Imputer) -> None:
        self.perturbation = perturbation

    def __call__(
        self,
        input_tensor: Tensor,
        cams: Maps,
        targets: Sequence[Callable[[Any], Tensor]],
        model: Any,
        return_visualization: bool = False,
        return_diff: bool = True,
    ) -> Any:
        """Return what each target says after less before, (B,) float32.

        Args:
            input_tensor: (B, C, H, W).
            cams: (B, H, W).
            targets: one for each image.
            model: runs in eval mode, and is given back in its own.
            return_visualization: whether the changed images are returned, too.
            return_diff: whether what was before is taken away.
        """
        changed = torch.stack(
            [
                self.perturbation(image.detach().cpu(), torch.from_numpy(np.asarray(cam))).to(input_tensor.device)
                for image, cam in zip(input_tensor, cams, strict=True)
            ]
        )
        result = _scores(model, changed, targets)
        if return_diff:
            result = result - _scores(model, input_tensor, targets)
        return (result, changed) if return_visualization else result


def _scores(model: Any, images: Tensor, targets: Sequence[Callable[[Any], Tensor]]) -> NDArray[np.float32]:
    output = outputs_of(model, images)
    rows = [row_of(output, row, len(images)) for row in range(len(images))]
    return np.array([target(row).cpu().numpy() for target, row in zip(targets, rows, strict=True)], dtype=np.float32)


class RemoveMostRelevantFirst:
    """Removes the pixels at and above a percentile of the map.

    Args:
        percentile: of the map's values; "auto" = where Otsu's threshold parts them.
        imputer: (image, what is kept (H, W), 1 or 0) -> image.
    """

    def __init__(self, percentile: Any, imputer: Imputer) -> None:
        self.percentile, self.imputer = percentile, imputer

    def __call__(self, input_tensor: Tensor, mask: Tensor) -> Tensor:
        """Return the image (C, H, W) without the pixels that a map (H, W) says."""
        values = mask.cpu().numpy()
        if isinstance(self.percentile, str):
            levels = (values * 255).astype(np.uint8)
            kept = levels <= threshold_otsu(levels)  # type: ignore[no-untyped-call]
        else:
            kept = values < np.percentile(values, self.percentile)
        return self.imputer(input_tensor, torch.from_numpy(kept.astype(np.float32)).to(mask.device))


class RemoveLeastRelevantFirst(RemoveMostRelevantFirst):
    """Removes the pixels at and below a percentile of the map, counted from above.

    Args:
        percentile: see `RemoveMostRelevantFirst`, of 1 - map.
        imputer: see `RemoveMostRelevantFirst`.
    """

    def __call__(self, input_tensor: Tensor, mask: Tensor) -> Tensor:
        """Return the image (C, H, W) without the pixels that a map (H, W) says."""
        return super().__call__(input_tensor, 1 - mask)


class AveragerAcrossThresholds:
    """The mean of a metric over percentiles.

    Args:
        imputer: percentile -> metric.
        percentiles: which.
    """

    def __init__(self, imputer: Callable[[Any], Any], percentiles: Sequence[float] = PERCENTILES) -> None:
        self.imputer, self.percentiles = imputer, percentiles

    def __call__(
        self, input_tensor: Tensor, cams: Maps, targets: Sequence[Callable[[Any], Tensor]], model: Any
    ) -> NDArray[np.float32]:
        """Return (B,) float32; see `PerturbationConfidenceMetric`."""
        scores = [self.imputer(one)(input_tensor, cams, targets, model) for one in self.percentiles]
        return np.asarray(np.mean(np.array(scores, dtype=np.float32), axis=0))
