"""ROAD: remove and debias."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pysal.metrics.imputation import NEIGHBOURS, Neighbours, linear_imputation
from pysal.pytorch_grad_cam.metrics.perturbation_confidence import (
    PERCENTILES,
    AveragerAcrossThresholds,
    Maps,
    PerturbationConfidenceMetric,
    RemoveLeastRelevantFirst,
    RemoveMostRelevantFirst,
)

neighbors_weights = NEIGHBOURS


class NoisyLinearImputer:
    """Fills removed pixels in from those around them.

    Args:
        noise: standard deviation of what is added to them, from torch's global generator.
        weighting: ((row, column), weight) of each neighbour.

    Source:
        Rong et al. 2022, arXiv:2202.00449.
    """

    def __init__(self, noise: float = 0.01, weighting: Neighbours = NEIGHBOURS) -> None:
        self.noise, self.weighting = noise, weighting

    def __call__(self, img: Tensor, mask: Tensor) -> Tensor:
        """Return the image (C, H, W) with the pixels filled in at which the mask (H, W) is 0."""
        kept = mask != 0
        filled = linear_imputation(img, kept, self.weighting)
        if not bool(kept.all()):
            filled[:, ~kept] += self.noise * torch.randn(len(img), int((~kept).sum()), dtype=torch.float32, device="cpu").to(
                filled
            )
        return filled


class ROADMostRelevantFirst(PerturbationConfidenceMetric):
    """How much the target changes without the pixels that the map shows most.

    Args:
        percentile: see `RemoveMostRelevantFirst`.
    """

    def __init__(self, percentile: Any = 80) -> None:
        super().__init__(RemoveMostRelevantFirst(percentile, NoisyLinearImputer()))


class ROADLeastRelevantFirst(PerturbationConfidenceMetric):
    """How much the target changes without the pixels that the map shows least.

    Args:
        percentile: see `RemoveLeastRelevantFirst`.
    """

    def __init__(self, percentile: Any = 20) -> None:
        super().__init__(RemoveLeastRelevantFirst(percentile, NoisyLinearImputer()))


class ROADMostRelevantFirstAverage(AveragerAcrossThresholds):
    """The mean of `ROADMostRelevantFirst` over percentiles.

    Args:
        percentiles: which.
    """

    def __init__(self, percentiles: Sequence[float] = PERCENTILES) -> None:
        super().__init__(ROADMostRelevantFirst, percentiles)


class ROADLeastRelevantFirstAverage(AveragerAcrossThresholds):
    """The mean of `ROADLeastRelevantFirst` over percentiles.

    Args:
        percentiles: which.
    """

    def __init__(self, percentiles: Sequence[float] = PERCENTILES) -> None:
        super().__init__(ROADLeastRelevantFirst, percentiles)


class ROADCombined:
    """Half of what the least relevant pixels change less what the most relevant do.

    Args:
        percentiles: which.
    """

    def __init__(self, percentiles: Sequence[float] = PERCENTILES) -> None:
        self.percentiles = percentiles
        self.morf_averager = ROADMostRelevantFirstAverage(percentiles)
        self.lerf_averager = ROADLeastRelevantFirstAverage(percentiles)

    def __call__(
        self, input_tensor: Tensor, cams: Maps, targets: Sequence[Callable[[Any], Tensor]], model: Any
    ) -> NDArray[np.float32]:
        """Return (B,) float32; see `PerturbationConfidenceMetric`."""
        least = self.lerf_averager(input_tensor, cams, targets, model)
        most = self.morf_averager(input_tensor, cams, targets, model)
        return np.asarray((least - most) / 2, dtype=np.float32)
