"""A detection: its score, found again in every changed image by where it lies."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, Self, TypeAlias

import numpy as np
import torch
from torch import Tensor

from pysal._checks import check_choice, refuse
from pysal._library import widest
from pysal.engine.request.target import Call, CallTarget
from pysal.engine.running.states import outside_inference
from pysal.targets.columns import Which, check_below, indices
from pysal.targets.outputs import ACTIVATIONS, LAYOUTS, Activation, Detections, Layout, detections_of

WHERE = "pysal.targets.Box"
Kind: TypeAlias = Literal["score", "iou"]


class Box(CallTarget):
    """A detection: the one that overlaps a box, or the k-th by score; how sure the detector is of it in a changed image.

    The unchanged image says where the detection lies and of which class it is. In a changed image it is looked for among the
    boxes that overlap this place enough, of this class: the highest score of these is explained, 0 where there is none.

    torchvision's detectors, those of transformers (DETR, RT-DETR, D-FINE, ...) and YOLO's boxes (N, Q, 5 + K) are understood.
    A detector that drops boxes below a threshold shows no score below that: lower it (`box_score_thresh`) to see further.

    Args:
        which: k, counting from the detection with the highest score, 0, and boxes around the same thing once; or a box (left,
            top, right, bottom) in pixels of the image, or boxes (B, 4), one per image.
        of: the class, by index or name, or one per image; None = that of the detection.
        kind: "score", or "iou" for the highest overlap times score, which falls as the box moves away.
        least: the overlap, as intersection over union, from which on a box is the same detection, in (0, 1].
        layout: how boxes in one tensor lie: "yolo" (N, Q, 5 + K) or "yolov8" (N, 4 + K, Q), as (centre x, centre y, width,
            height) in pixels; "yolov10" (N, Q, 6) as left, top, right, bottom, score and class; "yolox" (N, Q, 5 + K) as
            offsets in cells of strides 8, 16 and 32. None = "yolov8" where Q is the number of these cells, else "yolo"
            where Q > 5 + K.
        activation: what turns numbers of classes into scores: "softmax" (the last is "no object"), "sigmoid" or "none"; None =
            as the kind of output says, or how many more numbers than names of classes there are.

    Raises:
        TypeError, ValueError: none of these.

    Source:
        Petsiuk et al. 2021, arXiv:2006.03204 (kind="iou").

    Deviations:
        D-RISE compares the probabilities of all classes, which most detectors do not answer with; here it is the score of the
        detection's class.

    Example:
        >>> import pysal
        >>> def detector(images):  # two boxes for each image; the first is as sure as the image is bright
        ...     boxes = torch.tensor([[0.0, 0.0, 4.0, 4.0], [4.0, 4.0, 8.0, 8.0]])
        ...     labels = torch.tensor([1, 2])
        ...     return [{"boxes": boxes, "labels": labels, "scores": x.mean() * torch.tensor([1.0, 0.5])} for x in images]
        >>> pysal.gradient(detector, torch.rand(2, 3, 8, 8), pysal.targets.Box(0))[0, 0, 0, 0] * 192
        tensor(1.)
    """

    learns = True

    def __init__(
        self,
        which: int | Sequence[float] | Tensor | np.ndarray[Any, Any] = 0,
        *,
        of: Which | None = None,
        kind: Kind = "score",
        least: float = 0.5,
        layout: Layout | None = None,
        activation: Activation | None = None,
    ) -> None:
        check_choice(WHERE, "kind", kind, ("score", "iou"))
        if layout is not None:
            check_choice(WHERE, "layout", layout, LAYOUTS)
        if activation is not None:
            check_choice(WHERE, "activation", activation, ACTIVATIONS)
        if isinstance(least, bool) or not isinstance(least, (int, float)) or not 0 < least <= 1:
            refuse(WHERE, "least", "be above 0 and at most 1", repr(least))
        self.number, self.given = _number_or_boxes(which)
        self.of, self.kind, self.least, self.layout, self.activation = of, kind, float(least), layout, activation
        place = f"box {self.number}" if self.given is None else "the detection at the box"
        self.__name__ = place if of is None else f"{place} of {of}"

    boxes: Tensor
    index: Tensor

    def of_call(self, call: Call) -> Self:
        """Return a copy for one call."""
        ready = super().of_call(call)
        ready.index = indices(call, "target.of", self.of)
        dtype = widest(call.device)
        if self.given is None:
            ready.boxes = outside_inference(lambda: torch.zeros(call.images, 4, dtype=dtype, device=call.device))
            return ready
        given = self.given
        if given.ndim == 2 and len(given) != call.images:
            refuse(call.where, "target", f"be one box, or one for each of {call.images} images", tuple(given.shape))
        height, width = call.size
        outside = (given[..., 0] >= width) | (given[..., 1] >= height) | (given[..., 2] <= 0) | (given[..., 3] <= 0)
        if bool(outside.any()):
            refuse(call.where, "target", f"be a box inside images of {height} x {width} pixels", _written(given, outside))
        ready.boxes = outside_inference(lambda: given.to(call.device, dtype).expand(call.images, 4).clone())
        return ready

    def learn(self, output: Any, rows: Tensor) -> None:
        """Find where each image's detection lies, and of which class it is."""
        found = self._detections(output, rows)
        for place, image in enumerate(rows.tolist()):
            self._learn(_row(found, place), image)

    def _learn(self, found: Detections, image: int) -> None:
        call, wanted = self.call, int(self.index[image])
        if found.labels is None:
            check_below(call, wanted, found.scores.shape[-1])
        scores, labels = (one.detach() for one in found.best)
        boxes = found.boxes.detach().to(self.boxes)
        if wanted >= 0:
            scores, labels = found.of_class(self.index[image]).detach(), torch.full_like(labels, wanted)
            if found.labels is not None:
                own = found.labels == wanted
                scores, labels, boxes = scores[own], labels[own], boxes[own]
        count = len(scores)
        said = f"image {image}" + ("" if wanted < 0 else f" of class {wanted}")
        if self.number is not None:
            best = self._numbered(scores, labels, boxes, said, suppressed=found.suppressed)
            self.boxes[image] = boxes[best]
        else:
            overlaps = overlap(self.boxes[image], boxes)
            near = overlaps >= self.least
            if not bool(near.any()):
                nearest = f"{float(overlaps.max()):.2f}" if count else "none"
                requirement = f"be a box that a detection in {said} overlaps by {self.least:g} or more (the nearest: {nearest})"
                refuse(call.where, "target", requirement, _written(self.boxes[image]))
            best = torch.where(near, scores, scores.new_tensor(-1.0)).argmax()
        self.index[image] = labels[best]

    def _numbered(self, scores: Tensor, labels: Tensor, boxes: Tensor, said: str, *, suppressed: bool) -> Tensor:
        """Return the place of the k-th detection, counting boxes around the same thing, of the same class, once."""
        assert self.number is not None
        left, count = scores.argsort(descending=True, stable=True), 0
        while len(left):
            first = left[0]
            if count == self.number:
                return first
            left, count = left[1:], count + 1
            if not suppressed:
                same = (overlap(boxes[first], boxes[left]) >= self.least) & (labels[left] == labels[first])
                left = left[~same]
        refuse(self.call.where, "target", f"be below the {count} detections in {said}", f"box {self.number}")

    def is_nothing(self, output: Any, rows: Tensor) -> bool:
        """Whether no box is found in any of these images."""
        found = self._detections(output, rows)
        return all(not len(one.boxes) for one in found) if isinstance(found, list) else not found.boxes.shape[1]

    def __call__(self, output: Any, rows: Tensor) -> Tensor:
        """Return (N,) scores."""
        found, boxes, labels = self._detections(output, rows), self.boxes[rows], self.index[rows]
        if isinstance(found, Detections):
            return self._score(found, boxes, labels)
        return torch.stack([self._score(*each) for each in zip(found, boxes, labels, strict=True)])

    def _score(self, found: Detections, box: Tensor, label: Tensor) -> Tensor:
        """Return (...,): the score of a box (..., 4) of a class (...,)."""
        scores = found.of_class(label.clamp_min(0))
        overlaps = overlap(box.to(scores.dtype)[..., None, :], found.boxes.to(scores.dtype))
        if self.kind == "iou":
            alike = overlaps * scores
        else:
            alike = torch.where(overlaps >= self.least, scores, torch.zeros_like(scores))
        # 0 where nothing is left, as a function of the image, of gradient 0; of equal scores the first one's gradient
        return torch.cat([alike, 0 * alike.sum(-1, keepdim=True)], -1).max(-1).values

    def _detections(self, output: Any, rows: Tensor) -> list[Detections] | Detections:
        call = self.call
        return detections_of(call.where, output, len(rows), call.size, self.layout, self.activation, call.find.named)


def overlap(one: Tensor, others: Tensor) -> Tensor:
    """Return the intersection over union (..., Q) of boxes (..., 4) and (..., Q, 4)."""
    one = one if one.ndim == others.ndim else one[..., None, :]
    low, high = torch.maximum(one[..., :2], others[..., :2]), torch.minimum(one[..., 2:], others[..., 2:])
    common = (high - low).clamp_min(0).prod(-1)
    areas = [(box[..., 2:] - box[..., :2]).clamp_min(0).prod(-1) for box in (one, others)]
    union = areas[0] + areas[1] - common
    return torch.where(union > 0, common / union.clamp_min(torch.finfo(union.dtype).tiny), 0.0)


def _row(found: list[Detections] | Detections, place: int) -> Detections:
    if isinstance(found, list):
        return found[place]
    labels = None if found.labels is None else found.labels[place]
    return replace(found, boxes=found.boxes[place], scores=found.scores[place], labels=labels)


def _number_or_boxes(which: object) -> tuple[int | None, Tensor | None]:
    requirement = "be a number of a detection, a box (left, top, right, bottom) or boxes (B, 4)"
    if isinstance(which, (int, np.integer)) and not isinstance(which, bool):
        if which < 0:
            refuse(WHERE, "which", "be a number of a detection, 0 or more", int(which))
        return int(which), None
    try:
        if isinstance(which, (str, bytes, bool)) or which is None:
            raise TypeError
        given = torch.as_tensor(which, dtype=torch.float64, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError):
        refuse(WHERE, "which", requirement, " ".join(repr(which).split()), TypeError)
    if not given.ndim:
        refuse(WHERE, "which", requirement, " ".join(repr(which).split()), TypeError)
    if given.ndim > 2 or given.shape[-1] != 4 or not given.numel():
        refuse(WHERE, "which", requirement, f"shape {tuple(given.shape)}")
    wrong = ~given.isfinite().all(-1) | (given[..., 2] <= given[..., 0]) | (given[..., 3] <= given[..., 1])
    if bool(wrong.any()):
        refuse(WHERE, "which", "be a box whose right is beyond its left, and bottom beyond its top", _written(given, wrong))
    return None, given


def _written(boxes: Tensor, chosen: Tensor | None = None) -> str:
    """Return a box, the first of the chosen ones, in words."""
    one = boxes if boxes.ndim == 1 else boxes[chosen][0] if chosen is not None else boxes[0]
    return f"({', '.join(f'{side:g}' for side in one.tolist())})"
