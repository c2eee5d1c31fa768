"""Ready-made targets: each against its formula in float64, row by row, in every method, and what each refuses."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pysal
from pysal import targets
from tests.methods.calls import CALLS
from tests.methods.networks import images, linear

INPUTS = images(3, 3, 8, 8)
SMALL = linear(3, 8, 8)


class Segmenter(nn.Module):
    """Scores (N, 4, 4, 4) of images (N, 3, 8, 8): each cell sees its own pixels."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head = nn.Conv2d(3, 6, 2, stride=2), nn.Conv2d(6, 4, 1)

    def forward(self, images: Tensor) -> Any:
        return self.head(self.conv(images).relu())


class Dense(nn.Module):
    """Six boxes (N, 6, 4) and their logits (N, 6, 4), the last of which is "no object", as DETR has them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.head = nn.Linear(192, 24)
        self.register_buffer("boxes", torch.tensor([[0.2 + 0.1 * n, 0.5, 0.2, 0.4] for n in range(6)]))

    def forward(self, images: Tensor) -> Any:
        logits = self.head(images.flatten(1)).view(-1, 6, 4)
        return {"logits": logits, "pred_boxes": self.boxes.expand(len(images), 6, 4).clone()}


class Ragged(nn.Module):
    """A list of what was found in each image, fewer boxes in the last one, as torchvision has it."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = Dense()

    def forward(self, images: Tensor) -> Any:
        found = self.dense(images)
        scores = found["logits"].softmax(2)[..., :-1]
        boxes = torch.cat([found["pred_boxes"][..., :2] - 0.1, found["pred_boxes"][..., :2] + 0.1], 2) * 8
        kept = 6 - (images[:, 0, 0, 0] * 3).long()
        return [
            {"boxes": boxes[n][:k], "labels": scores[n].argmax(1)[:k], "scores": scores[n].amax(1)[:k]}
            for n, k in enumerate(kept.tolist())
        ]


SEGMENTER, DENSE, RAGGED = (network().double().eval() for network in (Segmenter, Dense, Ragged))


def embeddings(images: Tensor) -> Any:
    return {"image_embeds": SMALL(images), "text_embeds": torch.ones(5, 4), "logits_per_image": SMALL(images)[:, :2]}


def writer(images: Tensor, tokens: Tensor) -> Any:
    """Scores (N, T, 4) of the next token."""
    return SMALL(images)[:, None] * (1 + tokens[..., None])


DIRECTION = torch.tensor([1.0, 2.0, 0.0, -1.0], dtype=torch.float64)
TEXT = torch.tensor([0, 3, 1, 2])
MASKS = torch.stack([torch.eye(8), torch.ones(8, 8), torch.tril(torch.ones(8, 8))]).double()


def nearest(table: Tensor, image: int, own: int) -> list[int]:
    others = [k for k in range(table.shape[1]) if k != own]
    return sorted(others, key=lambda k: abs(float(table[image, k] - table[image, own])))


def contrast(output: Tensor, own: int, others: list[int], clean: Tensor) -> Tensor:
    weights = clean[others].softmax(0)
    return output[own] - (weights * output[others]).sum()


def of_table(images: Tensor) -> Tensor:
    return SMALL(images)


CLEAN = SMALL(INPUTS).detach()
HIGHEST = CLEAN.argmax(1).tolist()
MAPS = SEGMENTER(INPUTS).detach()
PREDICTED = MAPS.argmax(1)
POOLED = nn.functional.avg_pool2d(MASKS[:, None], 2)[:, 0]


def most_frequent(image: int) -> int:
    return int(torch.bincount(PREDICTED[image].flatten(), minlength=4).argmax())


def mean_over(scores: Tensor, weights: Tensor) -> Tensor:
    return (scores * weights).sum() / weights.sum()


def tokens_of_maps(images: Tensor) -> Tensor:
    """Tokens (N, 4, 16)."""
    return SEGMENTER(images).flatten(2)


# name -> model, target, further arguments, (one image's output, which image) -> its score
Oracle = Callable[[Any, int], Tensor]
CASES: dict[str, tuple[Any, Any, dict[str, Any], Oracle]] = {
    "label": (of_table, targets.Label([1, 3, 0], score="log_sigmoid"), {}, lambda o, i: o[0, [1, 3, 0][i]].sigmoid().log()),
    "number": (lambda x: SMALL(x)[:, 2], targets.Output(), {}, lambda o, i: o[0]),
    "place in an output": (SEGMENTER, targets.Output((1, 2, -1)), {}, lambda o, i: o[0, 1, 2, 3]),
    "contrast": (
        of_table,
        targets.Contrast(number=2),
        {},
        lambda o, i: contrast(o[0], HIGHEST[i], nearest(CLEAN, i, HIGHEST[i])[:2], CLEAN[i]),
    ),
    "contrast with some": (
        of_table,
        targets.Contrast(0, others=[2, 3]),
        {},
        lambda o, i: contrast(o[0], 0, [2, 3], CLEAN[i]),
    ),
    "point": (SEGMENTER, targets.Pixel(3, at=(2, 7)), {}, lambda o, i: o[0, 3, 1, 3]),
    "point's class": (SEGMENTER, targets.Pixel(at=(2, 7)), {}, lambda o, i: o[0, PREDICTED[i, 1, 3], 1, 3]),
    "masks": (
        lambda x: {"out": SEGMENTER(x), "aux": SEGMENTER(x) + 1},
        targets.Pixel([0, 1, 2], mask=MASKS, score="softmax"),
        {},
        lambda o, i: mean_over(o["out"].softmax(1)[0, i], POOLED[i]),
    ),
    "predicted mask": (
        SEGMENTER,
        targets.Pixel(),
        {},
        lambda o, i: o[0, most_frequent(i)][PREDICTED[i] == most_frequent(i)].mean(),
    ),
    "classes last": (
        lambda x: (SEGMENTER(x).movedim(1, -1), x),
        targets.Pixel(1, at=(0, 0), dim=-1),
        {},
        lambda o, i: o[0][0, 0, 0, 1],
    ),
    "cosine": (
        embeddings,
        targets.Similarity(DIRECTION),
        {},
        lambda o, i: nn.functional.cosine_similarity(o["image_embeds"][0], DIRECTION, dim=0),
    ),
    "dot products": (
        embeddings,
        targets.Similarity(np.eye(4)[:3], kind="dot"),
        {},
        lambda o, i: o["image_embeds"][0, i],
    ),
    "norm of a token": (
        tokens_of_maps,
        targets.Norm(1, token=-1),
        {},
        lambda o, i: o[0, 3].abs().sum(),
    ),
    "norm": (embeddings, targets.Norm(), {}, lambda o, i: (o["image_embeds"][0] ** 2).sum().sqrt()),
    "token": (
        writer,
        targets.Token(2, at=1),
        {"extra_inputs": [pysal.PerImage(TEXT.repeat(3, 1))]},
        lambda o, i: o[0, 1].softmax(0)[2].log(),
    ),
    "caption": (
        writer,
        targets.Caption(TEXT),
        {"extra_inputs": [pysal.PerImage(TEXT.repeat(3, 1))]},
        lambda o, i: sum(o[0, t - 1].softmax(0)[TEXT[t]].log() for t in (1, 2, 3)),
    ),
    "word": (
        writer,
        targets.Caption(TEXT.repeat(3, 1), first=2, last=3),
        {"extra_inputs": [pysal.PerImage(TEXT.repeat(3, 1))]},
        lambda o, i: o[0, 1].softmax(0)[1].log(),
    ),
    "one per image": (
        SEGMENTER,
        [targets.Pixel(0, at=(0, 0)), targets.Pixel(0), lambda out: out[:, 2, 3, 3]],
        {},
        lambda o, i: [o[0, 0, 0, 0], o[0, 0][PREDICTED[1] == 0].mean(), o[0, 2, 3, 3]][i],
    ),
}
assert (PREDICTED[1] == 0).any()


def one_row(model: Any, image: Tensor) -> Any:
    return model(image) if model is not writer else writer(image, TEXT[None])


@pytest.mark.parametrize("case", CASES)
def test_formula(case: str) -> None:
    """Scores and gradients are the formula's, whatever rows share a pass, and for one image alone."""
    model, target, more, oracle = CASES[case]
    for batch_size in (None, 1, 2):
        found = pysal.explain(model, INPUTS, target, methods="gradient", batch_size=batch_size, **more)
        for image in range(3):
            leaf = INPUTS[image : image + 1].clone().requires_grad_()
            score = oracle(one_row(model, leaf), image)
            (gradient,) = torch.autograd.grad(score, leaf)
            torch.testing.assert_close(found.scores[image], score.detach(), check_dtype=False)
            torch.testing.assert_close(found.maps["gradient"][image], gradient[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", CALLS)
@pytest.mark.parametrize("case", ["predicted mask", "one per image"])
def test_every_method_learns_from_the_unchanged_images(case: str, method: str) -> None:
    """A target that was learnt explains as the same one that was said."""

    def mask_of(image: int) -> Tensor:
        return PREDICTED[image] == most_frequent(image)

    def of_masks(output: Tensor, rows: Tensor) -> Tensor:
        pairs = zip(output, rows.tolist(), strict=True)
        return torch.stack([one[most_frequent(image)][mask_of(image)].mean() for one, image in pairs])

    said: dict[str, Any] = {
        "predicted mask": pysal.RowTarget(of_masks),
        "one per image": [
            lambda out: out[:, 0, 0, 0],
            lambda out: out[:, 0][:, PREDICTED[1] == 0].mean(1),
            lambda out: out[:, 2, 3, 3],
        ],
    }
    found = CALLS[method](SEGMENTER, INPUTS, CASES[case][1])
    torch.testing.assert_close(found, CALLS[method](SEGMENTER, INPUTS, said[case]), rtol=1e-4, atol=1e-6)


def overlap(one: Tensor, other: Tensor) -> Tensor:
    left, top = torch.maximum(one[:2], other[:2])
    right, bottom = torch.minimum(one[2:], other[2:])
    common = (right - left).clamp_min(0) * (bottom - top).clamp_min(0)
    return common / ((one[2] - one[0]) * (one[3] - one[1]) + (other[2] - other[0]) * (other[3] - other[1]) - common)


def pixels(boxes: Tensor) -> Tensor:
    return torch.cat([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], 1) * 8


def as_detr(images: Tensor) -> Any:
    """Under the name that says that the last class is "no object"."""
    kind = type("DetrObjectDetectionOutput", (dict,), {})
    return kind(DENSE(images))


def as_yolo(images: Tensor) -> Tensor:
    found = DENSE(images)
    scores = found["logits"].softmax(2)[..., :-1]
    objects = torch.ones_like(scores[..., :1]) / 2
    # as many boxes again that are sure of nothing, so that the layout shows
    yolo = torch.cat([found["pred_boxes"] * 8, objects, scores], 2)
    return torch.cat([yolo, torch.cat([yolo[..., :4] / 10, yolo[..., 4:] * 0], 2)], 1)


@pytest.mark.parametrize("kind", ["score", "iou"])
@pytest.mark.parametrize("model", ["detr", "yolo", "yolov8"])
def test_boxes_of_queries(model: str, kind: str) -> None:
    """The k-th box of the unchanged image, found again by overlap and class; or every box by overlap times score."""
    half = 1.0 if model == "detr" else 0.5
    run = {"detr": as_detr, "yolo": as_yolo, "yolov8": lambda x: as_yolo(x).transpose(1, 2)}[model]
    if model == "yolov8":  # has no number for "is there anything"

        def run(images: Tensor) -> Tensor:
            found = as_yolo(images)
            return torch.cat([found[..., :4], found[..., 4:5] * found[..., 5:]], 2).transpose(1, 2)

    layout = "yolov8" if model == "yolov8" else None
    for number in (0, 2):
        target = targets.Box(number, kind=kind, layout=layout)
        found = pysal.explain(run, INPUTS, target, methods="gradient", batch_size=2)
        for image in range(3):
            leaf = INPUTS[image : image + 1].clone().requires_grad_()
            answer = DENSE(leaf)
            scores, boxes = half * answer["logits"][0].softmax(1)[:, :-1], pixels(answer["pred_boxes"][0])
            best = int(scores.amax(1).argsort(descending=True)[number])
            label = int(scores[best].argmax())
            overlaps = torch.stack([overlap(boxes[best], box) for box in boxes])
            alike = overlaps * scores[:, label] if kind == "iou" else scores[:, label][overlaps >= 0.5]
            (gradient,) = torch.autograd.grad(alike.max(), leaf)
            torch.testing.assert_close(found.scores[image], alike.max().detach())
            torch.testing.assert_close(found.maps["gradient"][image], gradient[0], rtol=1e-4, atol=1e-6)


def test_boxes_around_the_same_thing_count_once() -> None:
    """Nothing has suppressed them in a tensor of boxes; the second detection is of another thing, or of another class."""

    def model(images: Tensor) -> Tensor:
        near, far = torch.tensor([2.0, 2.0, 4.0, 4.0]), torch.tensor([6.0, 6.0, 4.0, 4.0])
        boxes = torch.stack([near, near + 0.1, near, far, *[far / 99] * 8]).double()
        scores = torch.tensor([[0.9, 0.0], [0.8, 0.0], [0.0, 0.7], [0.6, 0.0], *[[0.0, 0.0]] * 8]).double()
        whole = torch.cat([boxes, torch.ones(12, 1).double(), scores], 1)
        return whole * (1 + 0 * images.sum((1, 2, 3)))[:, None, None]

    expected = [0.9, 0.7, 0.6]
    found = [float(pysal.explain(model, INPUTS[:1], targets.Box(k), methods="gradient").scores) for k in range(3)]
    assert found == pytest.approx(expected)
    assert float(pysal.explain(model, INPUTS[:1], targets.Box(1, of=0), methods="gradient").scores) == pytest.approx(0.6)


def test_boxes_of_each_image() -> None:
    """Lists of different lengths: the score of the best box there of the class, 0 in an image that has lost it."""
    target = targets.Box(0)
    found = pysal.explain(
        RAGGED,
        INPUTS,
        target,
        methods=["gradient", "leave_one_out"],
        method_options={"leave_one_out": {"segments": pysal.Grid(2, 2)}},
    )
    answers = RAGGED(INPUTS)
    torch.testing.assert_close(found.scores, torch.stack([one["scores"].max() for one in answers]).detach())
    place = answers[1]["boxes"][answers[1]["scores"].argmax()]
    own = int(answers[1]["labels"][answers[1]["scores"].argmax()])
    said = pysal.explain(RAGGED, INPUTS[1:2], targets.Box(place.detach(), of=own), methods="gradient")
    torch.testing.assert_close(said.maps["gradient"][0], found.maps["gradient"][1])

    def blind(images: Tensor) -> Any:  # sees nothing in what is half dark
        return [
            {key: value[: int(x.min() > 0) * 9] for key, value in one.items()}
            for one, x in zip(RAGGED(images), images, strict=True)
        ]

    options = {"segments": pysal.Grid(1, 2), "fill": "black"}
    bright = INPUTS.clamp_min(0.01)
    drops = pysal.leave_one_out(blind, bright, target, **options)
    before = torch.stack([one["scores"].max() for one in RAGGED(bright)]).detach()
    torch.testing.assert_close(drops[:, 0, 0, 0], before)


def test_a_target_serves_several_calls() -> None:
    """What it learns of one call's images does not reach the next."""
    target = targets.Pixel()
    alone = pysal.gradient(SEGMENTER, INPUTS[2:], target)
    pysal.gradient(SEGMENTER, INPUTS[:1], target)
    assert torch.equal(pysal.gradient(SEGMENTER, INPUTS[2:], target), alone)
    torch.testing.assert_close(pysal.gradient(SEGMENTER, INPUTS, target)[2:], alone)
    with torch.inference_mode():
        torch.testing.assert_close(pysal.gradient(SEGMENTER, INPUTS[2:].clone(), target), alone)


def test_prepared_metrics_and_pictures() -> None:
    """Everything else that takes a target takes these."""
    target = targets.Contrast(number=2)
    prepared = pysal.prepare(SMALL, INPUTS)
    maps = pysal.gradient(SMALL, INPUTS, target)
    torch.testing.assert_close(pysal.gradient(prepared, INPUTS, target), maps, rtol=1e-4, atol=1e-6)
    curve = pysal.metrics.deletion(SMALL, INPUTS, maps, target)
    assert torch.allclose(curve.scores[:, 0], pysal.explain(SMALL, INPUTS, target, methods="gradient").scores.to(curve.scores))
    pysal.metrics.parameter_randomisation(SMALL, INPUTS, target, method="gradient")
    found = pysal.explain(SMALL, INPUTS, target, methods="gradient")
    assert found.target_names == ["highest class against its like"] * 3
    own = pysal.metrics.deletion(SMALL, INPUTS[1:2], maps[1:2], target)
    from pysal.engine.request.target import of_image

    torch.testing.assert_close(own.scores, pysal.metrics.deletion(SMALL, INPUTS[1:2], maps[1:2], of_image(target, 1, 3)).scores)


def test_a_token_of_a_model_that_scores_the_next_one_alone() -> None:
    """Of each image, whether a pass holds one row or several."""
    drops = pysal.leave_one_out(SMALL, INPUTS, targets.Token(2), segments=pysal.Grid(1, 2))
    scored = pysal.leave_one_out(SMALL, INPUTS, lambda output: output.log_softmax(1)[:, 2], segments=pysal.Grid(1, 2))
    assert torch.equal(drops, scored)
    alone = pysal.gradient(SMALL, INPUTS, targets.Token(2), batch_size=1)
    torch.testing.assert_close(alone, pysal.gradient(SMALL, INPUTS, targets.Token(2)))
    assert bool((alone != 0).any())


@pytest.mark.parametrize("classes", [2, 3])
def test_a_class_is_told_from_as_many_others_as_there_are(classes) -> None:
    def few(images: Tensor) -> Tensor:
        return SMALL(images)[:, :classes]

    others = [other for other in range(classes) if other != 1]
    weights = CLEAN[:, others].softmax(1)
    expected = pysal.gradient(few, INPUTS, pysal.RowTarget(lambda o, rows: o[:, 1] - (weights[rows] * o[:, others]).sum(1)))
    torch.testing.assert_close(pysal.gradient(few, INPUTS, targets.Contrast(1)), expected)
    torch.testing.assert_close(pysal.gradient(few, INPUTS, targets.Contrast(1), batch_size=1), expected)


@pytest.mark.parametrize("per_image", [False, True])
def test_where_a_detector_finds_nothing_more_the_gradient_is_zero(per_image) -> None:
    """Detectors answer with empty tensors of their own then, which know nothing of the image."""

    def detector(images: Tensor) -> list[dict[str, Tensor]]:
        box, nothing = torch.tensor([[0.0, 0.0, 4.0, 4.0]]), {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0)}
        return [
            {"boxes": box, "scores": image.mean()[None], "labels": torch.ones(1)}
            if image.mean() > 0.3
            else {**nothing, "labels": torch.zeros(0)}
            for image in images
        ]

    images = torch.full((2, 1, 8, 8), 0.9, dtype=torch.float64)
    target = [targets.Box(0), targets.Box(0)] if per_image else targets.Box(0)
    for batch_size in (1, None):
        found = pysal.integrated_gradients(detector, images, target, steps=9, placement="uniform", batch_size=batch_size)
        # of nine steps from black, six lie where the box is found: at 0.35 and above
        torch.testing.assert_close(found, torch.full_like(images, 0.9 / 64 * 6 / 9))
    assert bool((pysal.gradient(detector, images, target) == 1 / 64).all())

    def silent(images: Tensor) -> list[dict[str, Tensor]]:
        return [{name: value.detach() for name, value in one.items()} for one in detector(images)]

    with pytest.raises(pysal.NotApplicable, match="a score that does not depend on the inputs through torch"):
        pysal.gradient(silent, images, target)


@pytest.mark.parametrize("more", [0, 1])
def test_a_detector_nobody_knows_is_told_by_its_names(more) -> None:
    """One answer more than names is "no object"; as many are labels. Other counts, and other outputs, must say it."""

    @dataclasses.dataclass
    class NovelObjectDetectionOutput:
        logits: Tensor
        pred_boxes: Tensor

    boxes = torch.tensor([[[0.25, 0.5, 0.5, 1.0], [0.75, 0.5, 0.5, 1.0]]], dtype=torch.float64)

    def detector(images: Tensor) -> NovelObjectDetectionOutput:
        halves = torch.stack([images[..., :4].mean((1, 2, 3)), images[..., 4:].mean((1, 2, 3))], 1)
        logits = halves[..., None] * torch.linspace(1, -1, 2 + more, dtype=torch.float64)
        return NovelObjectDetectionOutput(logits, boxes.expand(len(images), 2, 4))

    detector.class_names = ["cat", "dog"]  # type: ignore[attr-defined]
    images = torch.rand(2, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def best(output: NovelObjectDetectionOutput) -> Tensor:
        likely = output.logits.softmax(-1)[..., :-1] if more else output.logits.sigmoid()
        return likely.amax((1, 2))

    torch.testing.assert_close(pysal.gradient(detector, images, targets.Box(0)), pysal.gradient(detector, images, best))
    detector.class_names = ["cat", "dog", "cow", "pig"]  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"target.activation must say what the classes' logits are"):
        pysal.gradient(detector, images, targets.Box(0))


class Named(nn.Module):
    class_names = ("cat", "dog", "sofa", "background")

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, images: Tensor) -> Any:
        return self.inner(images)


def test_class_names() -> None:
    model = Named(SEGMENTER).eval()
    by_name, by_index = targets.Pixel(["cat", "dog", "sofa"], at=(1, 1)), targets.Pixel([0, 1, 2], at=(1, 1))
    assert torch.equal(pysal.gradient(model, INPUTS, by_name), pysal.gradient(model, INPUTS, by_index))
    three = Named(nn.Sequential(SEGMENTER, nn.Conv2d(4, 3, 1, dtype=torch.float64))).eval()
    with pytest.raises(ValueError, match=r"be a class index where the model names 4 classes and answers 3, got a name$"):
        pysal.gradient(three, INPUTS, targets.Pixel("cat", at=(1, 1)))
    with pytest.raises(ValueError, match=r"^pysal.gradient: target must name a class.*got 'horse'$"):
        pysal.gradient(model, INPUTS, targets.Pixel("horse", at=(1, 1)))


def end_to_end(images: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Corners, scores and classes (N, 12, 6), as YOLOv10 has them, beside what it was trained with."""
    yolo = as_yolo(images)
    corners = torch.cat([yolo[..., :2] - yolo[..., 2:4] / 2, yolo[..., :2] + yolo[..., 2:4] / 2], 2)
    best = (yolo[..., 4:5] * yolo[..., 5:]).max(2)
    return torch.cat([corners, best.values[..., None], best.indices[..., None]], 2), [yolo]


def test_boxes_of_yolov10() -> None:
    """The best score of each box and its class: the same target as all scores have."""
    found = pysal.explain(end_to_end, INPUTS, targets.Box(0, layout="yolov10"), methods="gradient")
    same = pysal.explain(as_yolo, INPUTS, targets.Box(0), methods="gradient")
    torch.testing.assert_close(found.scores, same.scores)
    torch.testing.assert_close(found.maps["gradient"], same.maps["gradient"])


def test_a_box_for_each_cell_shows_which_layout_it_is() -> None:
    """As many boxes as cells of strides 8, 16 and 32, in columns: YOLOv8's. In rows, offsets are told from pixels."""
    images = torch.rand(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    places = torch.rand(21, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 32

    def yolov8(images: Tensor) -> Tensor:
        scores = images.flatten(1)[:, :63].unflatten(1, (21, 3))
        boxes = torch.cat([places, torch.full_like(places, 8)], 1).expand(len(images), 21, 4)
        return torch.cat([boxes, scores], 2).transpose(1, 2)

    said = pysal.gradient(yolov8, images, targets.Box(0, layout="yolov8"))
    assert torch.equal(pysal.gradient(yolov8, images, targets.Box(0)), said)

    def yolox(images: Tensor) -> Tensor:
        objects = torch.ones(len(images), 21, 1, dtype=images.dtype)
        boxes, scores = yolov8(images).transpose(1, 2).split([4, 3], 2)
        return torch.cat([boxes / 32, objects, scores], 2)

    with pytest.raises(ValueError, match=r"target.layout must .*, got None for 21 boxes, one for each cell, near the corner$"):
        pysal.gradient(yolox, images, targets.Box(0))
    assert bool(pysal.gradient(yolox, images, targets.Box(0, layout="yolox")).any())
    assert bool(
        pysal.gradient(lambda x: torch.cat([yolox(x)[..., :4] * 32, yolox(x)[..., 4:]], 2), images, targets.Box(0)).any()
    )


LAYOUTS = (
    "target.layout must be 'yolo' (N, Q, 5 + K), 'yolov8' (N, 4 + K, Q), 'yolov10' (N, Q, 6: corners, score, class) or "
    "'yolox' (N, Q, 5 + K, offsets in cells)"
)
WRONG: list[tuple[Any, Any, str]] = [
    (
        lambda x: SEGMENTER(x)[:, :2].movedim(1, -1),
        targets.Pixel(1),
        "target.dim must say which dimension of the output are the classes (-1 where they come last), "
        "got None for (3, 4, 4, 2) of images of 8 x 8",
    ),
    (SMALL, targets.Label(4), "target must be below the model's 4 classes, got 4"),
    (SMALL, targets.Label([0, 1]), "target must have one index for each of the 3 images, got 2"),
    (SMALL, targets.Output(4), "target must be a place in an output of shape (N, 4), got output 4"),
    (SMALL, targets.Contrast(number=4), "target must contrast a class with at most 3 others, got 4"),
    (
        SMALL,
        targets.Contrast(1, others=[1, 2]),
        "target.others must be classes that differ from each other and from the explained one, got [1, 2]",
    ),
    (SMALL, targets.Pixel(), "the model's output must be maps (N, K, h, w) for 3 inputs, got shape (3, 4)"),
    (SEGMENTER, targets.Pixel(4), "target must be below the model's 4 classes, got 4"),
    (SEGMENTER, targets.Pixel(at=(8, 0)), "target.at must be a pixel of images of 8 x 8, got (8, 0)"),
    (
        SEGMENTER,
        targets.Pixel(mask=MASKS[:2]),
        "target.mask must be (H, W) or have one mask for each of 3 images, got (2, 8, 8)",
    ),
    (SEGMENTER, targets.Label(1), "the model's output must be a table (N, K) for 3 inputs, got shape (3, 4, 4, 4)"),
    (
        DENSE,
        targets.Box(0),
        "target.activation must say what the classes' logits are: 'softmax' where the last class "
        "is 'no object', as DETR's, or 'sigmoid' where each class is a label, as Deformable "
        "DETR's, got None for dict",
    ),
    (as_detr, targets.Box(6), "target must be below the 6 detections in image 0, got box 6"),
    (
        as_detr,
        targets.Box((0, 0, 1, 1)),
        "target must be a box that a detection in image 0 overlaps by 0.5 or more (the nearest: 0.00), got (0, 0, 1, 1)",
    ),
    (as_detr, targets.Box((9, 0, 10, 1)), "target must be a box inside images of 8 x 8 pixels, got (9, 0, 10, 1)"),
    (as_detr, targets.Box(0, of=3), "target must be below the model's 3 classes, got 3"),
    (
        SMALL,
        targets.Box(0),
        "the model's output must be detections: a list of mappings with 'boxes', 'labels' and "
        "'scores', an object with 'logits' and 'pred_boxes', or boxes (N, Q, 5 + K), got shape (3, 4)",
    ),
    (
        lambda x: as_yolo(x)[:, :5],
        targets.Box(0),
        f"{LAYOUTS}, got None for an output of shape (3, 5, 8)",
    ),
    (
        lambda x: end_to_end(x)[0],
        targets.Box(0),
        f"{LAYOUTS}, got None for (3, 12, 6) whose last numbers are whole",
    ),
    (
        as_yolo,
        targets.Box(0, layout="yolov10"),
        "target.layout must be that of an output (N, Q, 6) of corners, scores and classes, got 'yolov10' for (3, 12, 8)",
    ),
    (
        lambda x: (SMALL(x), SMALL(x)),
        targets.Contrast(),
        "the model's output must be a table (N, K), or hold it as 'logits' or 'out' or 'logits_per_image', got tuple whose "
        "entries 0, 1 have shape (3, 4) (field= says which)",
    ),
    (
        lambda x: (SMALL(x), SEGMENTER(x)),
        targets.Pixel(1, field=2),
        "field must name a tensor of the model's output (0, 1), got 2",
    ),
    (
        lambda x: (SMALL(x).sum(), SMALL(x)),
        targets.Label(1),
        "the model's output must be a table (N, K) for 3 inputs, got shape ()",
    ),
    (
        lambda x: as_yolo(x) * 9,
        targets.Box(0),
        "target.activation must be 'sigmoid' or 'none' where a detector's scores leave [0, 1], got "
        "None for scores from 0 to 4.5",
    ),
    (
        as_yolo,
        targets.Box(0, layout="yolox"),
        "target.layout must be that of an output with 1 boxes, one for each cell of strides (8, 16, 32), got 'yolox' for 12",
    ),
    (embeddings, targets.Similarity(torch.ones(3)), "target.to must have the 4 numbers of the model's embeddings, got 3"),
    (
        embeddings,
        targets.Norm(field="pooler_output"),
        "field must name a tensor of the model's output ('image_embeds', 'text_embeds', "
        "'logits_per_image'), got 'pooler_output'",
    ),
    (
        lambda x: {"a": SMALL(x), "b": SMALL(x)},
        targets.Norm(),
        "the model's output must be embeddings (N, D), or hold it as 'image_embeds' or "
        "'pooler_output' or 'embeddings' or 'embedding', got dict with 'a', 'b' (field= says which)",
    ),
    (
        tokens_of_maps,
        targets.Norm(),
        "target.token must say which token's embedding is meant of an output (N, T, D), got None for (3, 4, 16)",
    ),
    (tokens_of_maps, targets.Norm(token=4), "target.token must be a token of an output of 4, got 4"),
    (SMALL, targets.Label, "target must be made first, as Label(...), got the class Label"),
    (
        SEGMENTER,
        targets.Token(1),
        "the model's output must be scores of tokens (N, T, V), or (N, V) of the next one alone for 3 inputs, "
        "got shape (3, 4, 4, 4)",
    ),
    (lambda x: SMALL(x)[:, None], targets.Token(1, at=1), "target.at must be a place of a text of 1 tokens, got 1"),
    (lambda x: SMALL(x)[:, None], targets.Token(4), "target must be below the model's 4 tokens, got token 4"),
    (
        lambda x: SMALL(x)[:, None],
        targets.Caption([0, 1, 2]),
        "the model's output must say what comes next at each of the text's 3 tokens, got shape (3, 1, 4)",
    ),
]


@pytest.mark.parametrize(("model", "target", "message"), WRONG, ids=[message[:60] for *_, message in WRONG])
def test_what_an_output_cannot_have_is_refused(model: Any, target: Any, message: str) -> None:
    for method in (pysal.gradient, pysal.leave_one_out):
        with pytest.raises((ValueError, TypeError)) as caught:
            method(model, INPUTS, target)
        assert str(caught.value) == f"pysal.{method.__name__}: {message}"


def test_a_class_that_is_predicted_nowhere() -> None:
    def model(x: Tensor) -> Tensor:
        return (
            SEGMENTER(x) * torch.tensor([1.0, 1.0, 1.0, 0.0])[:, None, None]
            - torch.tensor([0.0, 0.0, 0.0, 99.0])[:, None, None]
        )

    requirement = "be a class that is predicted in every image, or come with a point or a mask"
    with pytest.raises(ValueError, match=rf"{requirement} \(predicted in image 0: [0-2, ]+\), got class 3$"):
        pysal.gradient(model, INPUTS, targets.Pixel(3))


MADE: list[tuple[Callable[[], Any], str]] = [
    (
        lambda: targets.Label(1, score="softmax"),
        "pysal.targets.Label: score must be one of 'logit', 'sigmoid', 'log_sigmoid', got 'softmax'",
    ),
    (lambda: targets.Output("a"), "pysal.targets.Output: at must be whole numbers, one per dimension of a row, got 'a'"),
    (lambda: targets.Contrast(number=0), "pysal.targets.Contrast: number must be a whole number of at least 1, got 0"),
    (lambda: targets.Contrast(alpha=-1), "pysal.targets.Contrast: alpha must be a finite number of at least 0, got -1"),
    (lambda: targets.Contrast(others=[]), "pysal.targets.Contrast: others must be a list of classes, got []"),
    (
        lambda: targets.Pixel(at=(1, 2), mask=MASKS),
        "pysal.targets.Pixel: mask must be None where there is a point (at=), got Tensor",
    ),
    (lambda: targets.Pixel(at=3), "pysal.targets.Pixel: at must be (row, column) of a pixel, got 3"),
    (lambda: targets.Pixel(at=(-1, 3)), "pysal.targets.Pixel: at must be (row, column) of a pixel, 0 or more, got (-1, 3)"),
    (lambda: targets.Pixel(mask=[1]), "pysal.targets.Pixel: mask must be a tensor or array (H, W) or (B, H, W), got list"),
    (lambda: targets.Pixel(mask=-MASKS), "pysal.targets.Pixel: mask must hold finite numbers of 0 or more, got -1.0"),
    (lambda: targets.Pixel(mask=0 * MASKS), "pysal.targets.Pixel: mask must count some pixel of every image, got zeros alone"),
    (lambda: targets.Box(-1), "pysal.targets.Box: which must be a number of a detection, 0 or more, got -1"),
    (
        lambda: targets.Box((1, 2, 3)),
        "pysal.targets.Box: which must be a number of a detection, a box (left, top, right, "
        "bottom) or boxes (B, 4), got shape (3,)",
    ),
    (
        lambda: targets.Box(1.5),
        "pysal.targets.Box: which must be a number of a detection, a box (left, top, right, bottom) or boxes (B, 4), got 1.5",
    ),
    (
        lambda: targets.Box((5, 2, 3, 4)),
        "pysal.targets.Box: which must be a box whose right is beyond its left, and bottom beyond its top, got (5, 2, 3, 4)",
    ),
    (lambda: targets.Box(0, least=0), "pysal.targets.Box: least must be above 0 and at most 1, got 0"),
    (lambda: targets.Box(0, kind="IoU"), "pysal.targets.Box: kind must be 'score' or 'iou', got 'IoU'"),
    (lambda: targets.Similarity(torch.zeros(3)), "pysal.targets.Similarity: to must not be zeros alone, got zeros"),
    (lambda: targets.Similarity("a cat"), "pysal.targets.Similarity: to must be an embedding (D,) or (B, D), got str"),
    (lambda: targets.Norm(0), "pysal.targets.Norm: order must be above 0, got 0"),
    (lambda: targets.Token("cat"), "pysal.targets.Token: tokenizer must be given for token in words, got None"),
    (
        lambda: targets.Token("big cat", tokenizer=lambda text: [1] * len(text.split())),
        "pysal.targets.Token: token must be a single token (pysal.targets.Caption takes several), got 'big cat' (2 tokens)",
    ),
    *(
        (
            lambda answer=answer: targets.Caption("a b", tokenizer=lambda text: answer),
            f"pysal.targets.Caption: the tokenizer's answer must be numbers of tokens{shape}, got {got}",
        )
        for answer, shape, got in (
            (None, " (T,) or (B, T)", "None"),
            (["a", "b"], " (T,) or (B, T)", "['a', 'b']"),
            ({"input_ids": [[5], [6, 7]]}, " (T,) or (B, T)", "[[5], [6, 7]]"),
            ({"tokens": [5, 6]}, " (T,) or (B, T)", "{'tokens': [5, 6]}"),
            ([1.0, 2.5], "", "dtype float32"),
            ([1, -2], " (T,) or (B, T), 0 or more", "-2"),
        )
    ),
    (lambda: targets.Token("", tokenizer=lambda text: []), "pysal.targets.Token: token must hold a token, got ''"),
    (
        lambda: targets.Caption([3]),
        "pysal.targets.Caption: tokens must hold at least 2 tokens, of which the first is given, got 1",
    ),
    (lambda: targets.Caption([]), "pysal.targets.Caption: tokens must hold a token, got none"),
    (
        lambda: targets.Caption([1, 2, 3], first=0),
        "pysal.targets.Caption: first and last must be 1 or more and at most 3, with a token between them, got 0 and 3",
    ),
    (lambda: targets.Caption([0.5, 1.0]), "pysal.targets.Caption: tokens must be numbers of tokens, got dtype float32"),
]


@pytest.mark.parametrize(("make", "message"), MADE, ids=[message[:60] for _, message in MADE])
def test_what_no_output_could_have_is_refused_at_once(make: Callable[[], Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError)) as caught:
        make()
    said = str(caught.value)
    assert said == message or said.startswith(message.split(" (did you mean")[0].rsplit(", got", 1)[0])


def test_an_embedding_of_zeros_is_like_nothing() -> None:
    """A black image, at which the path of Integrated Gradients begins, has one in a network without biases."""
    torch.manual_seed(0)
    embed = nn.Sequential(nn.Flatten(), nn.Linear(48, 4, bias=False)).eval().double()
    images = torch.stack([torch.zeros(3, 4, 4), torch.rand(3, 4, 4)]).double()
    target = targets.Similarity(DIRECTION)
    found = pysal.gradient(embed, images, target)
    assert not found[0].any()
    leaf = images[1:].clone().requires_grad_()
    torch.nn.functional.cosine_similarity(embed(leaf), DIRECTION[None].double()).sum().backward()
    torch.testing.assert_close(found[1:], leaf.grad)
    assert pysal.explain(embed, images, target, methods="gradient").scores[0] == 0


def test_numbers_may_be_numpys() -> None:
    """An argmax of NumPy is a whole number like another."""
    two = np.int64(2)
    assert targets.Output(two).at == targets.Output((two,)).at == (2,)
    assert targets.Output(two).__name__ == "output 2"
    assert targets.Box(two).number == 2
    assert targets.Box(two).given is None
    caption = targets.Caption([5, 6, 7, 8], first=np.int64(1), last=two)
    assert (caption.first, caption.last) == (1, 2)
    for flag in (True, np.bool_(True)):
        with pytest.raises(TypeError):
            targets.Output(flag)
        with pytest.raises(TypeError):
            targets.Box(flag)


SPELT: dict[str, Any] = {
    "2": 2,
    "cat": 0,
    "class:dog": 1,
    "margin:cat/2": pysal.Margin(0, 2),
    "contrast:dog": ("Contrast", {"which": "dog"}),
    "contrast:": ("Contrast", {"which": None}),
    "label:sofa": ("Label", {"which": "sofa"}),
    "output:3,1": ("Output", {"at": (3, 1)}),
    "pixel:120,80/1": ("Pixel", {"which": "dog", "at": (120, 80)}),
    "pixel: 4, 5 / cat": ("Pixel", {"which": "cat", "at": (4, 5)}),
    "mask:dog": ("Pixel", {"which": "dog", "at": None}),
    "box:0": ("Box", {"number": 0, "of": None}),
    "box:1/sofa": ("Box", {"number": 1, "of": "sofa"}),
    "BOX:0": ("Box", {"number": 0}),
    "token:42": ("Token", {"token": 42}),
    "norm": ("Norm", {"order": 2}),
}


@pytest.mark.parametrize("text", SPELT)
def test_spelling(text: str) -> None:
    found, expected = targets.parse(text, Named(SEGMENTER)), SPELT[text]
    if isinstance(expected, pysal.Margin):
        assert (found.a, found.b) == (expected.a, expected.b)
    elif isinstance(expected, tuple):
        assert type(found).__name__ == expected[0]
        assert {name: getattr(found, name) for name in expected[1]} == expected[1]
    else:
        assert found == expected


def test_spelling_of_a_box_and_of_classes_without_names() -> None:
    box = targets.parse("box:10,20,60,80")
    assert isinstance(box, targets.Box)
    assert box.given is not None
    assert box.given.tolist() == [10, 20, 60, 80]
    assert targets.parse("cat") == "cat"
    assert targets.parse("7") == 7
    odd = nn.Identity()
    odd.class_names = ["norm", "box:0"]
    assert targets.parse("norm", odd) == 0
    assert targets.parse("box:0", odd) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "target must be a class, or one of margin:A/B,"),
        (
            "margin:cat",
            "target must be like margin:A/B, of two classes (by index, where a name has a stroke), got 'margin:cat'",
        ),
        ("pixel:1", "target must be like pixel:ROW,COLUMN or pixel:ROW,COLUMN/CLASS, got 'pixel:1'"),
        ("box:-1", "target must be like box:0 or box:LEFT,TOP,RIGHT,BOTTOM, with /CLASS or without, got 'box:-1'"),
        ("box:1,2,3", "target must be like box:0 or box:LEFT,TOP,RIGHT,BOTTOM, with /CLASS or without, got 'box:1,2,3'"),
        ("norm:3", "target must be norm alone, which is of the whole output, got 'norm:3'"),
        ("token:a", "target must be like token:42, the number of a token, got 'token:a'"),
        ("output:a", "target must be like output:0 or output:3,1, got 'output:a'"),
        ("label:horse", "target must name a class"),
        ("horse", "target must name a class"),
    ],
)
def test_spelling_that_means_nothing(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=r"^pysal.targets.parse: target must") as caught:
        targets.parse(text, Named(SEGMENTER))
    assert str(caught.value).startswith(f"pysal.targets.parse: {message}")
