"""What is where in a model's output: tables, maps, detections, tokens and embeddings, in the containers that libraries have."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from torch import Tensor

from pysal._checks import refuse
from pysal.engine.request.row_score import held_in, places_alike

# An entry of an output: its name, or its place in a tuple or list.
Field: TypeAlias = str | int
Layout: TypeAlias = Literal["yolo", "yolov8", "yolov10", "yolox"]
Activation: TypeAlias = Literal["softmax", "sigmoid", "none"]
LAYOUTS, ACTIVATIONS = get_args(Layout), get_args(Activation)

# transformers' detectors, by how their outputs' names begin: those whose last class is "no object". Of those of labels some
# answer with other numbers than they name classes; of all others it shows in how many there are.
_WITH_NO_OBJECT = ("Detr", "Yolos", "TableTransformer")
_OF_LABELS = (
    "ConditionalDetr",
    "DabDetr",
    "DeformableDetr",
    "Deta",
    "RTDetr",
    "GroundingDino",
    "MMGroundingDino",
    "OmDetTurbo",
    "OwlViT",
    "Owlv2",
    "LwDetr",
    "RfDetr",
    "DFine",
    "Deimv2",
)
# Strides of YOLOX's three maps, pixels.
_STRIDES = (8, 16, 32)


def entries(output: Any) -> dict[str, Any]:
    """Return the named entries of an output; none where it has no names."""
    if isinstance(output, Mapping):
        return {str(name): value for name, value in output.items()}
    if isinstance(output, (Tensor, np.ndarray)):
        return {}
    if hasattr(output, "_asdict"):
        return dict(output._asdict())
    return dict(vars(output)) if hasattr(output, "__dict__") else {}


def entry(where: str, output: Any, names: Sequence[str], what: str, field: Field | None) -> Tensor:
    """Return the tensor that an output holds under the first of some names, or is; with `field`, under that name or place.

    Raises:
        TypeError: there is none, or it is not said which is meant.
    """
    named = entries(output)
    listed = isinstance(output, (tuple, list))
    if field is not None:
        places = dict(enumerate(output)) if listed else {}
        found = places.get(field) if isinstance(field, int) else named.get(field)
        if not isinstance(found, (Tensor, np.ndarray)):
            known = ", ".join(filter(None, (_listed(named), _listed(places)))) or "it has no names"
            refuse(where, "field", f"name a tensor of the model's output ({known})", repr(field))
        return _tensor(found)
    if isinstance(output, (Tensor, np.ndarray)):
        return _tensor(output)
    for name in names:
        if isinstance(named.get(name), (Tensor, np.ndarray)):
            return _tensor(named[name])
    held = [name for name, value in named.items() if isinstance(value, (Tensor, np.ndarray))]
    if len(held) == 1:
        return _tensor(named[held[0]])
    alike = places_alike(output) if listed and output else []
    if not named and len(alike) == 1:
        return entry(where, output[0], names, what, None)
    got = f"{type(output).__name__}{held_in(output)}" if alike else type(output).__name__
    if held or alike:
        got += f"{'' if alike else f' with {_listed(named)}'} (field= says which)"
    refuse(where, "the model's output", f"be {what}, or hold it as {' or '.join(map(repr, names))}", got, TypeError)


def _tensor(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else torch.as_tensor(value, device="cpu")


def _listed(named: Mapping[Any, Any]) -> str:
    return ", ".join(repr(name) for name, value in named.items() if isinstance(value, (Tensor, np.ndarray)))


def _checked(where: str, found: Tensor, rows: int, dims: int, what: str) -> Tensor:
    """Return numbers of the wanted rank with a row for each input, in float32 at least."""
    if rows == 1 and found.ndim == dims - 1:
        found = found[None]
    if found.ndim != dims or len(found) != rows:
        advice = " (batch_size=1 where it takes one at a time)" if found.ndim and len(found) == 1 else ""
        refuse(where, "the model's output", f"be {what} for {rows} inputs{advice}", f"shape {tuple(found.shape)}")
    if not found.dtype.is_floating_point:
        refuse(where, "the model's output", "be floating point", found.dtype, TypeError)
    return found if found.dtype == torch.float64 else found.float()


def table_of(where: str, output: Any, rows: int, field: Field | None) -> Tensor:
    """Return (N, K): a column for each class, label or number."""
    found = entry(where, output, ("logits", "out", "logits_per_image"), "a table (N, K)", field)
    return _checked(where, found[:, None] if found.ndim == 1 and len(found) == rows else found, rows, 2, "a table (N, K)")


def maps_of(where: str, output: Any, rows: int, field: Field | None, dim: int | None, size: tuple[int, int]) -> Tensor:
    """Return (N, K, h, w): a map for each class.

    MaskFormer's and Mask2Former's queries are put together as transformers does: each mask counts as much as its class is
    probable.
    """
    named = entries(output)
    if field is None and {"class_queries_logits", "masks_queries_logits"} <= set(named):
        classes, masks = (named[name] for name in ("class_queries_logits", "masks_queries_logits"))
        return _checked(
            where, torch.einsum("nqk,nqhw->nkhw", classes.softmax(-1)[..., :-1], masks.sigmoid()), rows, 4, "maps (N, K, h, w)"
        )
    names = ("logits", "out", "predicted_depth")
    found = entry(where, output, names, "maps (N, K, h, w)", field)
    if found.ndim == 3 and len(found) == rows:
        found = found[:, None]  # a single map, as of depth
    found = _checked(where, found, rows, 4, "maps (N, K, h, w)")
    if dim is None:
        sides = found.shape[1:]
        if _stretched(sides[1:], size) > 1.5 and _stretched(sides[:2], size) < 1.1:
            requirement = "say which dimension of the output are the classes (-1 where they come last)"
            refuse(where, "target.dim", requirement, f"None for {tuple(found.shape)} of images of {size[0]} x {size[1]}")
        dim = 1
    if not -4 <= dim < 4 or dim % 4 == 0:
        refuse(where, "target.dim", "be the dimension of the classes: 1, 2 or 3", dim)
    return found.movedim(dim, 1)


def _stretched(sides: Sequence[int], size: tuple[int, int]) -> float:
    """Return by how much more a map of some sides shrinks an image in one direction than in the other."""
    first, second = (side / max(1, small) for side, small in zip(size, sides, strict=True))
    return max(first / second, second / first)


def tokens_of(where: str, output: Any, rows: int, field: Field | None) -> Tensor:
    """Return (N, T, V): what is said of the next token at each place."""
    what = "scores of tokens (N, T, V), or (N, V) of the next one alone"
    found = entry(where, output, ("logits",), what, field)
    if found.ndim == 2 and len(found) == rows > 1:
        found = found[:, None]
    return _checked(where, found, rows, 3, what)


def embedding_of(where: str, output: Any, rows: int, field: Field | None, token: int | None) -> Tensor:
    """Return (N, D): the embedding of each image, of one token where it has several."""
    what = "embeddings (N, D)"
    names = ("image_embeds", "pooler_output", "embeddings", "embedding")
    found = entry(where, output, names, what, field)
    if token is not None:
        found = _checked(where, found, rows, 3, "embeddings of tokens (N, T, D)")
        if not -found.shape[1] <= token < found.shape[1]:
            refuse(where, "target.token", f"be a token of an output of {found.shape[1]}", token)
        return found[:, token]
    if found.ndim == 3 and len(found) == rows:
        refuse(
            where,
            "target.token",
            "say which token's embedding is meant of an output (N, T, D)",
            f"None for {tuple(found.shape)}",
        )
    return _checked(where, found, rows, 2, what)


@dataclass(frozen=True)
class Detections:
    """What a detector found in one image, or in rows of the same number each.

    Attributes:
        boxes: (..., Q, 4): left, top, right, bottom, pixels.
        scores: (..., Q) those of the labels, or (..., Q, K) of every class.
        labels: (..., Q) where `scores` are of these alone.
        suppressed: whether of boxes around the same thing one alone is left.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor | None
    suppressed: bool = True

    def of_class(self, label: Tensor) -> Tensor:
        """Return (..., Q): the score of a class (...,) at each box."""
        if self.labels is not None:
            return self.scores * (self.labels == label[..., None])
        index = label[..., None, None].expand(*self.scores.shape[:-1], 1)
        return self.scores.gather(-1, index).squeeze(-1)

    @property
    def best(self) -> tuple[Tensor, Tensor]:
        """The score and class (..., Q) of each box."""
        if self.labels is not None:
            return self.scores, self.labels.long()
        found = self.scores.max(-1)
        return found.values, found.indices


def detections_of(
    where: str,
    output: Any,
    rows: int,
    size: tuple[int, int],
    layout: Layout | None,
    activation: Activation | None,
    named: int | None = None,
) -> list[Detections] | Detections:
    """Return what was found in each of N rows: a list where their numbers differ, as torchvision has it, else all together.

    `named` is how many classes the model names.
    """
    if isinstance(output, (list, tuple)) and output and all(isinstance(one, Mapping) and "boxes" in one for one in output):
        if len(output) != rows:
            refuse(where, "the model's output", f"have detections of each of {rows} inputs", f"those of {len(output)}")
        return [_ragged(where, one) for one in output]
    held = entries(output)
    boxes, logits = held.get("pred_boxes"), held.get("logits", held.get("pred_logits"))
    if isinstance(boxes, Tensor) and isinstance(logits, Tensor):
        scores = _classes(where, type(output).__name__, logits, activation, named)
        height, width = size
        scale = boxes.new_tensor([width, height, width, height], dtype=scores.dtype)
        boxes = _corners(_checked(where, boxes, rows, 3, "boxes (N, Q, 4)")) * scale
        return Detections(boxes, _checked(where, scores, rows, 3, "scores (N, Q, K)"), None)
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], (Tensor, np.ndarray)):
        output = output[0]
    if isinstance(output, (Tensor, np.ndarray)) and output.ndim == 3:
        return _yolo(where, _checked(where, _tensor(output), rows, 3, "boxes"), size, layout, activation)
    got = f"shape {tuple(output.shape)}" if isinstance(output, (Tensor, np.ndarray)) else type(output).__name__
    requirement = (
        "be detections: a list of mappings with 'boxes', 'labels' and 'scores', an object with 'logits' and 'pred_boxes', "
        "or boxes (N, Q, 5 + K)"
    )
    refuse(where, "the model's output", requirement, got, TypeError)


def _ragged(where: str, one: Mapping[str, Any]) -> Detections:
    if not all(isinstance(one.get(name), Tensor) for name in ("boxes", "labels", "scores")):
        refuse(where, "the model's output", "have 'boxes', 'labels' and 'scores' of each input", _listed(one), TypeError)
    return Detections(one["boxes"], one["scores"], one["labels"])


def _classes(where: str, kind: str, logits: Tensor, activation: Activation | None, named: int | None) -> Tensor:
    """Return the score of each class (N, Q, K) of a DETR's queries."""
    if activation is None:
        if kind.startswith(_WITH_NO_OBJECT):
            activation = "softmax"
        elif kind.startswith(_OF_LABELS):
            activation = "sigmoid"
        elif kind.endswith("ObjectDetectionOutput") and named is not None and 0 <= logits.shape[-1] - named <= 1:
            activation = "softmax" if logits.shape[-1] > named else "sigmoid"  # names never count "no object" there
        else:
            requirement = (
                "say what the classes' logits are: 'softmax' where the last class is 'no object', as DETR's, or 'sigmoid' "
                "where each class is a label, as Deformable DETR's"
            )
            refuse(where, "target.activation", requirement, f"None for {kind}")
    if activation == "softmax":
        return logits.softmax(-1)[..., :-1]
    return logits.sigmoid() if activation == "sigmoid" else logits


def _corners(boxes: Tensor) -> Tensor:
    """Turn (centre x, centre y, width, height) into (left, top, right, bottom)."""
    centre, sides = boxes[..., :2], boxes[..., 2:]
    return torch.cat([centre - sides / 2, centre + sides / 2], -1)


def _yolo(where: str, found: Tensor, size: tuple[int, int], layout: Layout | None, activation: Activation | None) -> Detections:
    layout = layout or _layout(where, found, size)
    if layout == "yolov10":
        if found.shape[2] != 6:
            requirement = "be that of an output (N, Q, 6) of corners, scores and classes"
            refuse(where, "target.layout", requirement, f"'yolov10' for {tuple(found.shape)}")
        return Detections(found[..., :4], found[..., 4], found[..., 5].detach())
    if layout == "yolov8":
        found = found.transpose(1, 2)
    if found.shape[2] < (5 if layout == "yolov8" else 6):
        numbers = "4 + K" if layout == "yolov8" else "5 + K"
        refuse(where, "target.layout", f"be that of an output with {numbers} numbers for each box", repr(layout))
    boxes = found[..., :4]
    if layout == "yolox":
        boxes = _decoded(where, boxes, size)
    scores = found[..., 4:]
    if activation == "sigmoid":
        scores = scores.sigmoid()
    elif activation == "softmax":
        refuse(where, "target.activation", "be 'sigmoid', 'none' or None for boxes (N, Q, 5 + K)", "'softmax'")
    elif activation is None and not bool(((scores.detach() >= 0) & (scores.detach() <= 1)).all()):
        requirement = "be 'sigmoid' or 'none' where a detector's scores leave [0, 1]"
        refuse(where, "target.activation", requirement, f"None for scores from {_span(scores)}")
    if layout != "yolov8":
        scores = scores[..., :1] * scores[..., 1:]  # how likely there is anything, times which
    return Detections(_corners(boxes), scores, None, suppressed=False)


def _layout(where: str, found: Tensor, size: tuple[int, int]) -> Layout:
    """Return how boxes lie that nobody says it of; refuse what may be several."""
    count, width = found.shape[1:]
    cells = sum((size[0] // stride) * (size[1] // stride) for stride in _STRIDES)
    if width == cells > count >= 5:
        return "yolov8"  # a box for each cell
    requirement = (
        "be 'yolo' (N, Q, 5 + K), 'yolov8' (N, 4 + K, Q), 'yolov10' (N, Q, 6: corners, score, class) or "
        "'yolox' (N, Q, 5 + K, offsets in cells)"
    )
    if count <= width or width < 6:
        refuse(where, "target.layout", requirement, f"None for an output of shape {tuple(found.shape)}")
    last = found[..., 5].detach()
    if width == 6 and bool((last == last.round()).all()) and bool(last.any()):
        refuse(where, "target.layout", requirement, f"None for {tuple(found.shape)} whose last numbers are whole")
    # of boxes in pixels, one for each cell, some lie in the half that is further from the corner
    far = found.new_tensor([size[1] / 2, size[0] / 2])
    if count == cells and not bool((found[..., :2].detach() > far).any()):
        refuse(where, "target.layout", requirement, f"None for {count} boxes, one for each cell, near the corner")
    return "yolo"


def _span(values: Tensor) -> str:
    low, high = (float(bound) for bound in torch.aminmax(values.detach()))
    return f"{low:.3g} to {high:.3g}"


def _decoded(where: str, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Return boxes in pixels of YOLOX's: offsets from the cell of each, and logarithms of sides, in units of its stride."""
    cells, strides = [], []
    for stride in _STRIDES:
        rows, columns = size[0] // stride, size[1] // stride
        y, x = torch.meshgrid(
            torch.arange(rows, device=boxes.device), torch.arange(columns, device=boxes.device), indexing="ij"
        )
        cells.append(torch.stack([x, y], 2).reshape(-1, 2))
        strides.append(torch.full((rows * columns, 1), stride, device=boxes.device))
    grid, unit = torch.cat(cells).to(boxes.dtype), torch.cat(strides).to(boxes.dtype)
    if len(grid) != boxes.shape[1]:
        requirement = f"be that of an output with {len(grid)} boxes, one for each cell of strides {_STRIDES}"
        refuse(where, "target.layout", requirement, f"'yolox' for {boxes.shape[1]}")
    return torch.cat([(boxes[..., :2] + grid) * unit, boxes[..., 2:].exp() * unit], -1)
