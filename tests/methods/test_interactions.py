"""Interactions of segments: by pictures made by hand, by games with known answers, within a budget, and drawn."""

import itertools
from typing import Any

import pytest
import torch
from matplotlib.patches import Rectangle
from torch import Tensor

import pysal
from pysal import Grid, Slic, Window, plots
from tests.engine.test_incremental import prepared_network
from tests.methods.networks import Counting, assert_rounding, images, linear, rectified
from tests.methods.test_coalitions import shown
from tests.methods.test_patch_tokens import SIDE, close, transformer, without
from tests.methods.test_patch_tokens import images as small


def test_every_pair_is_the_second_difference_of_pictures_made_by_hand() -> None:
    inputs, model = images(2, 3, 6, 7), rectified()
    labels = torch.arange(42).view(6, 7) // 7 - 1  # five segments, and a row of none
    found = pysal.interactions(model, inputs, 1, segments=labels, fill=0.3, score="raw")
    scale = float(model(inputs).detach().abs().max())
    everything = [*itertools.combinations(range(5), 2)]
    assert found.complete.all()
    assert found.passes == 1 + 5 + 10
    for image in range(2):
        assert [tuple(pair) for pair in found.pairs[image].tolist()] == everything

        def worth(*gone: int, image: int = image) -> Tensor:
            with torch.no_grad():
                return model(shown(inputs[image], labels, 0.3, 31 - sum(1 << one for one in gone))[None])[0, 1]

        expected = torch.stack([worth() - worth(i) - worth(j) + worth(i, j) for i, j in everything])
        drops = torch.stack([worth() - worth(i) for i in range(5)])
        assert_rounding(found.values[image], expected, 64 * 54, scale=scale)
        assert_rounding(found.drops[image], drops, 64 * 54, scale=scale)
        sums = torch.zeros(5, dtype=torch.float64)
        for (i, j), value in zip(everything, expected, strict=True):
            sums[i] += value
            sums[j] += value
        assert_rounding(found.map[image, 0, 1:], sums[:, None].expand(5, 7), 64 * 54, scale=scale)
        assert not found.map[image, 0, 0].any()
        matrix = found.matrix(image)
        assert torch.equal(matrix, matrix.T)
        assert torch.equal(matrix.diagonal(), found.drops[image])
        assert all(matrix[i, j] == value for (i, j), value in zip(everything, found.values[image], strict=True))


def test_a_linear_model_has_none() -> None:
    inputs, model = images(2, 3, 6, 8), linear(3, 6, 8)
    found = pysal.interactions(model, inputs, 2, segments=Grid(3, 4), fill=0.2, score="raw")
    scale = float(model(inputs).detach().abs().max())
    for values in found.values:
        assert_rounding(values, torch.zeros_like(values), 64 * 144, scale=scale)


def both_and_either(batch: Tensor) -> Tensor:
    """Of 8 x 8 segments of one pixel: 3 needs 20, 10 or 50 is enough, and 7 counts by itself."""
    x = batch[:, 0].flatten(1)
    return x[:, 3] * x[:, 20] + torch.maximum(x[:, 10], x[:, 50]) + 0.5 * x[:, 7]


@pytest.mark.parametrize("passes", [2081, 2080, 150])
def test_pairs_that_matter_are_among_those_tried(passes: int) -> None:
    """Neither of two segments that are enough alone has a drop, and neither of two that need each other has a gain."""
    found = pysal.interactions(both_and_either, torch.ones(1, 1, 8, 8), segments=Grid(8, 8), score="raw", passes=passes)
    assert found.complete.tolist() == [passes == 1 + 64 + 64 * 63 // 2]
    assert found.passes == (2081 if found.complete else min(passes, 2 * 64 + 2 + 64 * 63 // 2))
    assert sorted(found.strongest(count=2)) == [(3, 20, 1.0), (10, 50, -1.0)]
    assert found.values[0].abs().sum() == 2.0
    matrix = found.matrix()
    assert matrix[3, 20] == matrix[20, 3] == 1.0
    assert matrix.isnan().sum() == 64 * 63 - 2 * len(found.pairs[0])
    assert matrix.diagonal().nonzero().flatten().tolist() == [3, 7, 20]
    first, second = found.pairs[0].unbind(1)
    assert (first < second).all()
    assert len(torch.unique(found.pairs[0], dim=0)) == len(first)


@pytest.mark.parametrize("passes", [1000, 40])
def test_any_batch_size_any_company_the_same_interactions(passes: int) -> None:
    inputs, model = images(3, 3, 8, 10), rectified()
    options: dict[str, Any] = {"segments": Slic(12), "fill": "mean", "passes": passes, "score": "raw"}
    expected = pysal.interactions(model, inputs, 1, **options)
    scale = float(model(inputs).detach().abs().max())
    others = [(slice(None), pysal.interactions(model, inputs, 1, batch_size=size, **options)) for size in (1, 2, 3, 1000)]
    others += [(slice(row, row + 1), pysal.interactions(model, inputs[row : row + 1], 1, **options)) for row in range(3)]
    for rows, found in others:
        assert_rounding(found.map, expected.map[rows], 64 * 54, scale=12 * scale)
        for one, other in zip(found.pairs, expected.pairs[rows], strict=True):
            assert torch.equal(one, other)


def test_ragged_images_each_have_their_budget() -> None:
    labels = torch.zeros(2, 6, 6, dtype=torch.int64)
    labels[1] = torch.arange(36).view(6, 6)
    model = Counting(rectified())
    found = pysal.interactions(model, images(2, 3, 6, 6), 1, segments=labels, score="raw", passes=100)
    assert [len(pairs) for pairs in found.pairs] == [0, 100 - 2 * 36 - 2]
    assert found.complete.tolist() == [True, False]
    assert found.strongest(0) == []
    assert found.matrix(0).shape == (1, 1)


def test_whole_batches_for_a_model_whose_rows_depend_on_each_other() -> None:
    inputs = images(2, 3, 4, 4)

    def coupled(batch: Tensor) -> Tensor:
        return batch.mean((1, 2, 3)).square()[:, None] * len(batch)

    found = pysal.interactions(coupled, inputs, 0, segments=Grid(2, 2), score="raw", batch_size=2)
    expected = pysal.interactions(lambda x: 2 * x.mean((1, 2, 3)).square(), inputs, segments=Grid(2, 2), score="raw")
    assert_rounding(found.map, expected.map, 64 * 48, scale=8.0)


def test_prepared_models_and_transformers_without_patches() -> None:
    model, prepared, inputs = prepared_network()
    options: dict[str, Any] = {"segments": Grid(3, 3), "fill": "mean", "score": "raw"}
    one, other = (pysal.interactions(each, inputs, 1, **options) for each in (model, prepared))
    torch.testing.assert_close(one.map, other.map, rtol=1e-9, atol=1e-9)
    assert other.passes <= one.passes + 2
    vit, pictures = transformer(), small(1)
    found = pysal.interactions(vit, pictures, 1, segments=Grid(SIDE, SIDE), fill="drop", score="raw")

    def worth(*gone: int) -> Tensor:
        return without(vit, pictures[0], set(gone))[1]

    expected = torch.stack([worth() - worth(i) - worth(j) + worth(i, j) for i, j in found.pairs[0].tolist()])
    close(found.values[0], expected)
    with pytest.raises(ValueError, match=r"^pysal.interactions: segments must leave a patch in all sets .*, got 2 of image 0"):
        pysal.interactions(transformer(pooled=True), pictures, 1, segments=Grid(1, 2), fill="drop")


def test_explain_runs_it_where_it_is_named() -> None:
    inputs, model = images(2, 3, 6, 6), rectified()
    assert "interactions" not in pysal.explain(model, inputs, 1).results
    given = {"interactions": {"segments": Grid(2, 2), "passes": 11}}
    found = pysal.explain(model, inputs, 1, methods="interactions", method_options=given, score="raw")
    expected = pysal.interactions(model, inputs, 1, segments=Grid(2, 2), score="raw")
    result = found["interactions"]
    assert result.title == "Interactions"
    assert result.passes == 11
    assert found.panel("interactions").small_print == "6 pairs of 4 segments"
    assert found.panel("interactions").unit == "interaction of output"
    assert_rounding(result.map.double(), expected.map, 16, scale=1.0)
    for image in range(2):
        assert torch.equal(result.details["interactions"][image], expected.values[image])
    figure = found.plot(1, kind="interactions")
    texts = [artist.get_text() for artist in figure.findobj() if hasattr(artist, "get_text")]
    assert "Interactions of segments" in texts
    assert "interaction of output" in texts


def test_bars_and_lines_are_the_strongest_pairs() -> None:
    pairs = torch.tensor([*itertools.combinations(range(6), 2)])
    values = torch.linspace(-0.3, 0.4, 15, dtype=torch.float64)
    labels = torch.arange(36).view(6, 6) // 6
    figure = plots.interactions(torch.rand(3, 6, 6), pairs, values, labels, percent=True)
    bars = [patch.get_width() for axes in figure.axes for patch in axes.patches if isinstance(patch, Rectangle)]
    strongest = sorted(sorted(values.tolist(), key=abs)[-plots.MOST_PAIRS :], reverse=True)
    assert bars == pytest.approx(strongest)
    lines = [line for line in figure.axes[0].get_lines() if not isinstance(line.get_color(), str)]  # no halo
    assert len(lines) == plots.MOST_PAIRS
    ends = {tuple(sorted(map(int, line.get_ydata()[[0, -1]]))): line.get_linewidth() for line in lines}
    by_value = sorted(zip(values.tolist(), pairs.tolist(), strict=True), key=lambda one: abs(one[0]))[-plots.MOST_PAIRS :]
    assert set(ends) == {tuple(pair) for _, pair in by_value}  # segments are rows of pixels
    assert [ends[tuple(pair)] for _, pair in by_value] == sorted(ends.values())
    texts = [artist.get_text() for artist in figure.findobj() if hasattr(artist, "get_text")]
    assert "3 more pairs: at most 5 points either way" in texts


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"passes": 10}, "passes must be at least 11 for all pairs of 4 segments, got 10"),
        ({"segments": Grid(3, 3), "passes": 20}, "passes must be at least 21 to choose pairs of 9 segments, got 20"),
        ({"segments": Grid(1, 1), "passes": 1}, "passes must be at least 2 for all pairs of 1 segment, got 1"),
        ({"passes": 0}, "passes must be a whole number of at least 1, got 0"),
        ({"segments": Window(3, 2)}, "segments must not overlap, got boxes 0 and 1, which do"),
    ],
    ids=str,
)
def test_refuses(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match="must") as raised:
        pysal.interactions(rectified(), images(1, 3, 6, 6), 0, **{"segments": Grid(2, 2), **given})
    assert str(raised.value) == f"pysal.interactions: {sentence}"


def test_refuses_images_and_counts_that_are_none() -> None:
    found = pysal.interactions(rectified(), images(1, 3, 6, 6), 0, segments=Grid(2, 2))
    for image in (1, -1, True, "0"):
        with pytest.raises(ValueError, match=r"^pysal.Interactions: image must be an index in \[0, 1\), got "):
            found.matrix(image)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^pysal.Interactions.strongest: count must be a whole number of at least 1, got 0$"):
        found.strongest(count=0)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"labels": torch.zeros(3, 4, dtype=torch.int64)}, "labels must have the image's height and width (4, 4)"),
        ({"values": torch.zeros(3)}, "pairs must have shape (3, 2), one for each value, got shape (1, 2)"),
        ({"pairs": torch.tensor([[0, 7]])}, "pairs must be of segments that labels has, got 7"),
        ({"values": torch.tensor([torch.nan])}, "values must have a finite value, got 1 without one"),
    ],
    ids=str,
)
def test_plot_refuses(changes: dict[str, Tensor], sentence: str) -> None:
    given = {"pairs": torch.tensor([[0, 1]]), "values": torch.ones(1), "labels": torch.arange(16).view(4, 4) // 4, **changes}
    with pytest.raises(ValueError, match="must") as raised:
        plots.interactions(torch.rand(3, 4, 4), **given)
    assert str(raised.value).startswith(f"pysal.plots.interactions: {sentence}")
