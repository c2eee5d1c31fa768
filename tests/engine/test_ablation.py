"""Features that are left out: what the inputs are without them, and where the drops belong."""

import itertools

import pytest
import torch
from torch import Tensor

from pysal.engine.ablation.ablation import Ablation
from pysal.engine.ablation.features import Boxes, Masks, sliding_boxes


def test_sliding_boxes_run_along_the_first_dimension_first_and_are_cut_at_the_border() -> None:
    boxes = list(sliding_boxes((5, 4), (2, 3), (2, 3)))
    assert [(one[0].start, one[1].start) for one in boxes] == [(0, 0), (2, 0), (4, 0), (0, 3), (2, 3), (4, 3)]
    assert boxes[-1] == (slice(4, 5), slice(3, 4))


@pytest.mark.parametrize(
    ("shape", "window", "stride"), [((7,), (3,), (2,)), ((4, 5), (4, 2), (9, 1)), ((3, 4, 5), (2, 2, 2), (1, 2, 2))]
)
def test_sliding_boxes_cover_everything(shape: tuple[int, ...], window: tuple[int, ...], stride: tuple[int, ...]) -> None:
    covered = torch.zeros(shape)
    for box in sliding_boxes(shape, window, stride):
        assert 0 < covered[box].numel() <= torch.Size(window).numel()
        covered[box] += 1
    assert bool((covered > 0).all())


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.bool], ids=str)
@pytest.mark.parametrize("own", [False, True])
def test_masks_replace_what_holds_their_number(own: bool, dtype: torch.dtype) -> None:
    inputs = (torch.arange(12).reshape(3, 4).to(dtype), torch.arange(6).reshape(3, 2, 1).to(dtype))
    first = torch.tensor([[7, 7, -2, 4], [4, 7, 7, -2], [-2, -2, -2, -2]])[: 3 if own else 1]
    masks = (first, torch.tensor([[[4], [9]]]))
    fills = (torch.tensor(True).to(dtype).expand(3, 4), torch.tensor(False).to(dtype).expand(3, 2, 1))
    ablation = Ablation(inputs, fills, Masks(masks, inputs))
    labels = [-2, 4, 7, 9]
    assert len(ablation.features) == 4
    found = ablation.without(range(1, 4))
    for number, (one, fill, mask) in enumerate(zip(inputs, fills, masks, strict=True)):
        expected = torch.cat([torch.where(mask == label, fill, one) for label in labels[1:]])
        assert torch.equal(found[number], expected)
        assert found[number].dtype == dtype


@pytest.mark.parametrize("own", [False, True])
def test_masks_spread_drops_to_their_elements(own: bool) -> None:
    inputs = (torch.zeros(2, 3), torch.zeros(2, 2, 2))
    masks = (torch.tensor([[5, 5, 1], [1, 3, 3]])[: 2 if own else 1], torch.tensor([[[0], [5]]]))
    ablation = Ablation(inputs, inputs, Masks(masks, inputs))
    labels = [*sorted({int(one) for one in masks[0].flatten()}), 0]  # in the order in which they are met
    drops = torch.arange(2.0 * len(labels)).reshape(len(labels), 2)
    for found, mask, one in zip(ablation.maps(drops), masks, inputs, strict=True):
        expected = torch.empty_like(one)
        for place in itertools.product(*map(range, one.shape)):
            label = int(mask.expand(one.shape)[place])
            expected[place] = drops[labels.index(label), place[0]]
        assert torch.equal(found, expected)


def test_boxes_spread_the_mean_of_those_that_cover_an_element() -> None:
    inputs = (torch.zeros(2, 4), torch.zeros(2, 1, 3))
    boxes = Boxes([[(slice(0, 3),), (slice(2, 4),)], [(slice(0, 1), slice(0, 3))]])
    first, second = Ablation(inputs, inputs, boxes).maps(torch.tensor([[1.0, 10.0], [3.0, 30.0], [5.0, 50.0]]))
    assert first.tolist() == [[1, 1, 2, 3], [10, 10, 20, 30]]
    assert second.tolist() == [[[5, 5, 5]], [[50, 50, 50]]]


def test_boxes_may_add_up() -> None:
    """Where no box is, the sum is 0."""
    inputs = (torch.zeros(1, 5),)
    boxes = Boxes([[(slice(0, 3),), (slice(2, 4),)]], mean=False)
    assert Ablation(inputs, inputs, boxes).maps(torch.tensor([[1.0], [3.0]]))[0].tolist() == [[1, 1, 4, 3, 0]]


def test_boxes_replace_in_their_own_input_only() -> None:
    inputs = (torch.arange(4).reshape(1, 4), torch.arange(3.0).reshape(1, 3))
    fills: tuple[Tensor, ...] = (torch.full((1, 4), 0.5), torch.full((1, 3), -1.0))
    ablation = Ablation(inputs, fills, Boxes([[(slice(1, 3),)], [(slice(0, 2),)]]))
    first, second = ablation.without([0, 1])
    assert first.tolist() == [[0, 0.5, 0.5, 3], [0, 1, 2, 3]]
    assert second.tolist() == [[0, 1, 2], [-1, -1, 2]]
    assert inputs[0].tolist() == [[0, 1, 2, 3]]
    assert ablation.without([1])[0].dtype == torch.int64  # untouched, so as it is


def test_features_of_empty_inputs_cannot_be_reached() -> None:
    inputs = (torch.zeros(2, 0), torch.zeros(2, 2))
    ablation = Ablation(inputs, inputs, Masks((torch.zeros(1, 0).long(), torch.tensor([[3, 4]])), inputs))
    assert ablation.reachable == [True, True]
    assert Ablation(inputs[:1], inputs[:1], Boxes([[(slice(0, 1),)]])).reachable == [False]
