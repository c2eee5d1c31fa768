"""The peer's targets: what each makes of one image's part of the model's output."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor


def _of(output: Tensor, category: Any) -> Tensor:
    return output[category] if output.ndim == 1 else output[:, category]


class ClassifierOutputTarget:
    """The output of a class.

    Args:
        category: its index.
    """

    def __init__(self, category: int) -> None:
        self.category = category

    def __call__(self, model_output: Tensor) -> Tensor:
        """Return the number of an output (K,), or those of (N, K)."""
        return _of(model_output, self.category)


class ClassifierOutputSoftmaxTarget(ClassifierOutputTarget):
    """The softmax of the output of a class.

    Args:
        category: its index.
    """

    def __call__(self, model_output: Tensor) -> Tensor:
        """Return the number of an output (K,), or those of (N, K)."""
        return _of(model_output.softmax(-1), self.category)


class ClassifierOutputReST(ClassifierOutputTarget):
    """The output of a class and the logarithm of its softmax, added up.

    Args:
        category: its index.

    Source:
        Cai 2025, arXiv:2501.06261.
    """

    def __call__(self, model_output: Tensor) -> Tensor:
        """Return the number of an output (K,), or those of (N, K)."""
        return _of(model_output + model_output.log_softmax(-1), self.category)


class BinaryClassifierOutputTarget:
    """A single output, or its negative.

    Args:
        category: 1 for the output, anything else for its negative.
    """

    def __init__(self, category: int) -> None:
        self.category = category

    def __call__(self, model_output: Tensor) -> Tensor:
        """Return what was said."""
        return model_output if self.category == 1 else -model_output


class SoftmaxOutputTarget:
    """The softmax of an output."""

    def __call__(self, model_output: Tensor) -> Tensor:
        """Return it."""
        return model_output.softmax(-1)


class RawScoresOutputTarget:
    """The output itself."""

    def __call__(self, model_output: Tensor) -> Tensor:
        """Return it."""
        return model_output


class SemanticSegmentationTarget:
    """The scores of a class (K, H, W), added up over a mask.

    Args:
        category: its index.
        mask: (H, W), of any numbers: what each pixel counts.
    """

    def __init__(self, category: int, mask: NDArray[Any]) -> None:
        self.category, self.mask = category, torch.from_numpy(mask)

    def __call__(self, model_output: Tensor) -> Tensor:
        """Return the sum."""
        return (model_output[self.category] * self.mask.to(model_output.device)).sum()


class FasterRCNNBoxScoreTarget:
    """How well a detector's boxes fit those that were found at first: overlap and score of each box's best match, added up.

    Args:
        labels: of the boxes.
        bounding_boxes: (left, top, right, bottom) each, arrays.
        iou_threshold: overlap, as intersection over union, from which on a box matches.
    """

    def __init__(self, labels: Sequence[Any], bounding_boxes: Sequence[Any], iou_threshold: float = 0.5) -> None:
        self.labels, self.bounding_boxes, self.iou_threshold = labels, bounding_boxes, iou_threshold

    def __call__(self, model_outputs: Mapping[str, Tensor]) -> Tensor:
        """Return the sum, (1,)."""
        boxes = model_outputs["boxes"]
        total = boxes.new_zeros(1)
        if not len(boxes):
            return total
        for box, label in zip(self.bounding_boxes, self.labels, strict=False):
            overlaps = _overlaps(torch.as_tensor(box, device=boxes.device, dtype=boxes.dtype), boxes)
            best = overlaps.argmax()
            if overlaps[best] > self.iou_threshold and model_outputs["labels"][best] == label:
                total = total + overlaps[best] + model_outputs["scores"][best]
        return total


def _overlaps(box: Tensor, boxes: Tensor) -> Tensor:
    """Return intersection over union of a box (4,) with each of others (N, 4)."""
    sides = (torch.minimum(box[2:], boxes[:, 2:]) - torch.maximum(box[:2], boxes[:, :2])).clamp_min(0)
    common = sides.prod(1)
    return common / ((box[2:] - box[:2]).prod() + (boxes[:, 2:] - boxes[:, :2]).prod(1) - common)


class FinerWeightedTarget:
    """A class less others, weighted by the softmax of these.

    Args:
        main_category: its index.
        comparison_categories: those of the others.
        alpha: how much they count.

    Source:
        Zhang et al. 2025, arXiv:2501.11309.
    """

    def __init__(self, main_category: int, comparison_categories: Sequence[int], alpha: float) -> None:
        self.main_category, self.comparison_categories, self.alpha = main_category, comparison_categories, alpha

    def __call__(self, model_output: Tensor) -> Tensor:
        """Return the number of an output (K,), or those of (N, K)."""
        weights, others = self._of_others(model_output.softmax(-1)), self._of_others(model_output)
        margins = model_output[..., self.main_category, None] - self.alpha * others
        return (weights * margins).sum(-1) / (weights.sum(-1) + 1e-9)

    def _of_others(self, values: Tensor) -> Tensor:
        """One by one: a GPU would have to wait for a list of classes in every pass."""
        if not len(self.comparison_categories):
            return values[..., :0]
        return torch.stack([values[..., category] for category in self.comparison_categories], -1)
