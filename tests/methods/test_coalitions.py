"""Scores of sets of segments: those of pictures made by hand, whether a model runs whole images, boxes or fewer tokens."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import pysal
from pysal import Grid, Window
from pysal.engine.request.plan import Plan
from pysal.engine.request.running import Running
from pysal.methods.coalitions import Coalitions
from tests.engine.test_incremental import prepared_network
from tests.methods.networks import Counting, images, rectified
from tests.methods.test_patch_tokens import SIDE, close, transformer, without
from tests.methods.test_patch_tokens import images as small


def plan_of(model: Any, inputs: Tensor, batch_size: int | None = None) -> Plan:
    return Plan("pysal.shapley", model, inputs, 1, Running("raw", (), batch_size, "float32", None))


def shown(image: Tensor, labels: Tensor, fill: Tensor | float, one: int) -> Tensor:
    there = torch.tensor([[label < 0 or bool(one >> label & 1) for label in row] for row in labels.tolist()])
    return torch.where(there, image, fill)


LABELS = torch.arange(32)[:, None] // 8 * 3 + torch.arange(28) // 10  # 4 x 3 segments
LABELS[-2:] = -1  # and two rows of none
SETS = [0, 1, 1 << 7, 3, 0b111111, 0b111111 << 6, 0b101010101010, (1 << 12) - 1, (1 << 12) - 2, ((1 << 12) - 1) ^ (3 << 4)]


@pytest.mark.parametrize("batch_size", [None, 1, 3])
def test_a_prepared_model_recomputes_what_a_set_reaches(batch_size: int | None) -> None:
    """Near the photo and near the fill its boxes are small; each set has the score of its whole picture."""
    model, prepared, inputs = prepared_network()
    fill = inputs.flip(0, 2)
    sets = [SETS, SETS[::-1], SETS[:3]]
    coalitions = Coalitions(plan_of(prepared, inputs, batch_size), LABELS, fill)
    found = coalitions.scores(sets)
    for image, own in enumerate(sets):
        with torch.no_grad():
            pictures = torch.stack([shown(inputs[image], LABELS, fill[image], one) for one in own])
            expected = model(pictures)[:, 1]
        torch.testing.assert_close(torch.from_numpy(found[image]), expected, rtol=1e-10, atol=1e-10)
    # 9 sets that are not the photo, twice, and 3; the photo and the fill are kept, each once for an image that needs it
    assert 21 <= 3 * coalitions.passes <= 21 + 6


def test_boxes_are_small_on_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    _, prepared, inputs = prepared_network()
    sizes: list[int] = []
    scores = Plan.scores

    def watched(self: Plan, batch: Tensor, *rest: Any) -> Any:
        sizes.append(batch.shape[-1] * batch.shape[-2])
        return scores(self, batch, *rest)

    monkeypatch.setattr(Plan, "scores", watched)
    everything = (1 << 12) - 1
    for one in (1 << 4, everything ^ 1 << 4):  # alone on the fill, absent from the photo
        sizes.clear()
        Coalitions(plan_of(prepared, inputs[:1]), LABELS, "mean").scores([[one]])
        assert sizes[-1] == 8 * 10, "of the segment"


@pytest.mark.parametrize("options", [{}, {"pooled": True}, {"last": True}], ids=str)
@pytest.mark.parametrize("batch_size", [None, 1, 4])
def test_tokens_are_left_out_with_their_segments(options: dict[str, bool], batch_size: int | None) -> None:
    model, inputs = transformer(**options), small(2)
    coalitions = Coalitions(plan_of(model, inputs, batch_size), Grid(SIDE, SIDE), "drop")
    sets = [[0b1, 0b101010101, 0b111111111, 0b011111110], [0b100000000, 0b111000111]]
    found = coalitions.scores(sets)
    for image, own in enumerate(sets):
        gone = [{patch for patch in range(9) if not one >> patch & 1} for one in own]
        expected = torch.stack([without(model, inputs[image], each)[1] for each in gone])
        close(torch.from_numpy(found[image]), expected)
    assert 2 * coalitions.passes == 5, "the photo is not run again"


@pytest.mark.parametrize("tree", ["flat", "halves"])
def test_shares_of_patches_add_up_to_what_the_class_token_alone_does_not_say(tree: str) -> None:
    model, inputs = transformer(), small(2)
    options = {"segments": Grid(SIDE, SIDE), "fill": "drop", "tree": tree}
    found = pysal.explain(model, inputs, 1, methods="shapley", score="raw", method_options={"shapley": options})["shapley"]
    for image in range(2):
        with torch.no_grad():
            change = model(inputs[image : image + 1])[0, 1] - without(model, inputs[image], set(range(9)))[1]
        close(found.details["values"][image].sum(), change)


def test_a_model_that_needs_a_patch_has_no_score_of_none() -> None:
    sentence = (
        r"segments must leave a patch in all sets of them with fill='drop', as this model has no answer to none, "
        r"got 9 of image 0 that cover all patches$"
    )
    with pytest.raises(ValueError, match=r"^pysal.shapley: " + sentence):
        pysal.shapley(transformer(pooled=True), small(1), 1, segments=Grid(SIDE, SIDE), fill="drop")
    labels = torch.arange(144).view(12, 12) % 12 // 4 - 1  # the left third of the patches always stays
    kept = pysal.shapley(transformer(pooled=True), small(1), 1, segments=labels, fill="drop", score="raw")
    with torch.no_grad():
        left = without(transformer(pooled=True), small(1)[0], {1, 2, 4, 5, 7, 8})[1]
        change = transformer(pooled=True)(small(1))[0, 1] - left
    close(kept[0, 0, 0, [4, 8]].sum(), change)


def test_each_set_once_in_passes_of_any_size() -> None:
    inputs, model = images(2, 3, 6, 6), Counting(rectified())
    for batch_size, company in itertools.product((1, 2, None), (True, False)):
        sets = [list(range(8)), [3]] if company else [[1], []]
        found = Coalitions(plan_of(model, inputs, batch_size), Grid(1, 3), 0.5).scores(sets)
        labels = torch.arange(6).expand(6, 6) // 2
        for image, own in enumerate(sets):
            with torch.no_grad():
                pictures = [shown(inputs[image], labels, 0.5, one) for one in own]
                expected = rectified()(torch.stack(pictures))[:, 1] if own else torch.zeros(0, dtype=torch.float64)
            close(torch.from_numpy(found[image]), expected)


def test_windows_that_overlap_are_no_players() -> None:
    with pytest.raises(ValueError, match=r"segments must not overlap, got boxes 0 and 1, which do$"):
        Coalitions(plan_of(rectified(), images(1, 3, 6, 6)), Window(3, 2), 0.0)
