"""Shapley and Owen values: all orders written out, what they add up to, their errors, and what any batch must not change."""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import pysal
from pysal import Grid, Slic, Window
from pysal.engine.ablation import owen
from tests.methods.networks import Counting, assert_rounding, images, linear, rectified

EXACT = 1e-10  # of sums of a thousand gains of about 1, float64


def orders(tree: Any) -> Iterator[tuple[int, ...]]:
    """Every order in which the members of each node follow each other."""
    if isinstance(tree, int):
        yield (tree,)
        return
    for children in itertools.permutations(tree):
        for parts in itertools.product(*(list(orders(child)) for child in children)):
            yield tuple(itertools.chain(*parts))


def by_enumeration(tree: Any, worth: Any) -> np.ndarray:
    """What each feature adds to those before it, in the mean over all orders."""
    found = [np.zeros(len(owen.leaves(tree)))]
    for order in orders(tree):
        gains, before = np.zeros_like(found[0]), 0
        for feature in order:
            gains[feature] = worth(before | 1 << feature) - worth(before)
            before |= 1 << feature
        found.append(gains)
    return np.mean(found[1:], 0)


def random_game(features: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=1 << features)


TREES: list[Any] = [
    0,
    (0,),
    (1, 0),
    (0, 1, 2, 3, 4),
    ((0, 1), (2, (3, 4))),
    ((4, 2, 0), 1, (3, 5)),
    (0, (1, (2, (3, (4, 5))))),
    (((0, 1), (2, 3)), ((4, 5), (6, 7), 8, 9)),
]


@pytest.mark.parametrize("tree", TREES, ids=str)
def test_exact_values_are_those_of_all_orders(tree: Any) -> None:
    game = random_game(len(owen.leaves(tree)))
    gains = owen.exact_gains(tree)
    assert len(gains.sets) == len(set(gains.sets)) == owen.sets_needed(tree)
    values, errors = gains.values(game[gains.sets])
    assert np.abs(values - by_enumeration(tree, lambda one: game[one])).max() <= EXACT
    assert not errors.any()


@pytest.mark.parametrize("tree", TREES[3:], ids=str)
def test_sampled_orders_are_the_trees_and_add_up(tree: Any) -> None:
    game, features = random_game(len(owen.leaves(tree))), len(owen.leaves(tree))
    gains = owen.sampled_gains(tree, 5, np.random.default_rng(1))
    values, errors = gains.values(game[gains.sets])
    assert values.sum() == pytest.approx(game[-1] - game[0], abs=EXACT)
    assert (errors > 0).any()
    allowed = set(owen.exact_gains(tree).sets)
    assert set(gains.sets) <= allowed
    assert len(gains.sets) <= 2 + 10 * (features - 1)


@pytest.mark.parametrize("tree", TREES[4:7], ids=str)
def test_estimates_have_no_bias_and_the_error_they_say(tree: Any) -> None:
    """400 estimates, whose means lie around the exact values with variances as large as they say, both within 5 sigma."""
    features = len(owen.leaves(tree))
    game, generator, runs = random_game(features), np.random.default_rng(2), 400
    found, errors = zip(*((g := owen.sampled_gains(tree, 4, generator)).values(game[g.sets]) for _ in range(runs)), strict=True)
    exact = by_enumeration(tree, lambda one: game[one])
    spread = np.std(found, axis=0, ddof=1)
    assert (np.abs(np.mean(found, 0) - exact) <= 5 * spread / runs**0.5 + EXACT).all()
    squares = np.square(errors)
    bound = 5 * (np.std(squares, axis=0, ddof=1) / runs**0.5 + spread**2 * (2 / runs) ** 0.5) + EXACT
    assert (np.abs(squares.mean(0) - spread**2) <= bound).all()


def games(features: int) -> dict[str, np.ndarray]:
    """The worth of all sets in games of several kinds, in which some features change nothing or all."""
    members = (np.arange(1 << features)[:, None] >> np.arange(features) & 1).astype(float)
    generator = np.random.default_rng(5)
    weights, hidden = generator.normal(size=features), generator.normal(size=(features, 16))
    return {
        "additive": members @ weights,
        "pairwise": np.einsum("si,ij,sj->s", members, generator.normal(size=(features, features)), members),
        "and": members[:, :3].prod(1),
        "or": members[:, 1::2].max(1),
        "threshold": (members.sum(1) > features / 2).astype(float),
        "network": np.maximum(members @ hidden + generator.normal(size=16), 0) @ generator.normal(size=16),
        "probability": 1 / (1 + np.exp(-2 * members @ weights)),
    }


@pytest.mark.parametrize("tree", [tuple(range(8)), (((0, 1), (2, 3)), ((4, 5), (6, 7)))], ids=["flat", "halves"])
@pytest.mark.parametrize("kind", list(games(8)))
def test_intervals_hold_the_exact_values(kind: str, tree: Any) -> None:
    """At least 9 of 10 of the segments that matter, as the method's page says of its 95 % intervals, from four pairs on."""
    game = games(8)[kind]
    exact = (gains := owen.exact_gains(tree)).values(game[gains.sets])[0]
    matters = np.abs(exact) > EXACT
    for pairs in (4, 5, 8):
        held = []
        for run in range(150):
            gains = owen.sampled_gains(tree, pairs, np.random.default_rng([run, pairs]))
            values, errors = gains.values(game[gains.sets])
            held.append(np.abs(values - exact) <= owen.half_widths(errors, pairs) + EXACT)
        assert np.mean(np.array(held)[:, matters]) >= 0.9


def test_half_widths() -> None:
    assert owen.half_widths(np.zeros(3), 0).tolist() == [0, 0, 0]  # exact
    assert owen.half_widths(np.array([0.0, 1.0]), 3).tolist() == [np.inf, np.inf]
    assert owen.half_widths(np.zeros(2), 5).tolist() == [0, 0]
    # Student's t of 4 degrees at 97.5 % is 2.7764; one of three features varies, so all have its error; scale does not matter
    for scale in (1.0, 1e-300, 1e200):
        found = owen.half_widths(np.array([0.0, scale, 0.0]), 5)
        assert found / scale == pytest.approx([2.7764] * 3, abs=1e-4)
    # sqrt((1^4 + 3^4) / (1^2 + 3^2)) = 2.8636 for the first, its own error for the second; 1.96 at last
    assert owen.half_widths(np.array([1.0, 3.0]), 10**9) == pytest.approx([1.95996 * 8.2**0.5, 1.95996 * 3], abs=1e-4)


def filled(inputs: Tensor, labels: Tensor, fill: float, kept: int) -> Tensor:
    """An image (C, H, W) with the segments that are no bit of `kept` filled."""
    shown = torch.tensor([[label < 0 or bool(kept >> label & 1) for label in row] for row in labels.tolist()])
    return torch.where(shown, inputs, fill)


def run(model: Any, inputs: Tensor, target: Any = 1, score: str = "raw", **options: Any) -> Any:
    batch_size = options.pop("batch_size", None)
    given = {"shapley": options}
    return pysal.explain(model, inputs, target, methods="shapley", score=score, method_options=given, batch_size=batch_size)[
        "shapley"
    ]


@pytest.mark.parametrize("tree", ["flat", "halves", "merged", [[0, 1], [2, [3, 4]]]], ids=str)
def test_values_of_a_network_are_those_of_all_orders(tree: Any) -> None:
    inputs, model = images(2, 3, 6, 7), rectified()
    labels = torch.arange(42).view(6, 7) // 7 - 1  # five segments, and a row of none
    found = run(model, inputs, segments=labels, fill=0.3, tree=tree)
    assert found.details["exact"].all()
    scale = float(model(inputs).detach().abs().max())
    for image in range(2):
        with torch.no_grad():
            pictures = torch.stack([filled(inputs[image], labels, 0.3, kept) for kept in range(32)])
            worth = model(pictures)[:, 1].tolist()
        nested = {"flat": (0, 1, 2, 3, 4), "halves": ((0, 1), (2, (3, 4)))}
        if isinstance(tree, str) and tree not in nested:
            values = found.details["values"][image].numpy()
            assert values.sum() == pytest.approx(worth[-1] - worth[0], abs=1e-12 * scale)
            continue
        allowed = nested[tree] if isinstance(tree, str) else ((0, 1), (2, (3, 4)))
        expected = torch.from_numpy(by_enumeration(allowed, worth.__getitem__))
        assert_rounding(found.details["values"][image], expected, 16 * 54, scale=scale)
        assert_rounding(found.map[image, 0][1:], expected[labels[1:]], 16 * 54, scale=scale)
        assert not found.map[image, 0][labels < 0].any()


def test_of_a_linear_model_every_tree_gives_the_drops() -> None:
    inputs, model = images(2, 3, 6, 8), linear(3, 6, 8)
    drops = pysal.leave_one_out(model, inputs, 2, segments=Grid(3, 4), fill=0.2, score="raw")
    for options in ({}, {"tree": "flat", "passes": 60}, {"tree": "merged"}, {"passes": 50}):
        found = pysal.shapley(model, inputs, 2, segments=Grid(3, 4), fill=0.2, score="raw", **options)
        assert_rounding(found, drops, 64 * 144, scale=float(model(inputs).detach().abs().max()))


@pytest.mark.parametrize(
    ("segments", "passes"), [(Grid(4, 5), 100), (Slic(8), 40), (Window(2), 1000), (Grid(1, 1), 2)], ids=str
)
def test_the_sum_is_the_change_of_the_score_whatever_the_budget(segments: Any, passes: int) -> None:
    inputs, model = images(2, 3, 8, 10), Counting(rectified())
    found = run(model, inputs, segments=segments, fill=0.4, passes=passes)
    with torch.no_grad():
        change = (model(inputs) - model(torch.full_like(inputs, 0.4)))[:, 1]
    sums = torch.stack([one.sum() for one in found.details["values"]])
    assert_rounding(sums, change, 64 * 54, scale=float(model(inputs).detach().abs().max()))
    assert found.passes <= passes + 1


@pytest.mark.usefixtures("independence_is_known")
def test_passes_are_no_more_than_allowed_and_no_set_runs_twice() -> None:
    inputs, model = images(1, 3, 6, 6), Counting(rectified())
    # flat all 2^6; halves (2, (2, 2)): all, none, 2 of the root, 2 x 2 of each of its children, 2 x 4 of theirs
    for passes, tree, expected in ((64, "flat", 64), (30, "halves", 28)):
        model.passes.clear()
        run(model, inputs, segments=Grid(2, 3), tree=tree, passes=passes)
        assert sum(model.passes) == expected
    model.passes.clear()
    run(model, inputs, segments=Grid(6, 6), tree="flat", passes=200)
    assert 100 < sum(model.passes) <= 200


@pytest.mark.parametrize("passes", [1000, 60])
def test_any_batch_size_any_company_the_same_values(passes: int) -> None:
    inputs, model = images(3, 3, 8, 10), rectified()
    options = {"segments": Slic(12), "fill": "mean", "passes": passes, "score": "raw", "tree": "halves", "seed": 3}
    expected = pysal.shapley(model, inputs, 1, **options)
    scale = float(model(inputs).detach().abs().max())
    for batch_size in (1, 2, 3, 1000):
        assert_rounding(pysal.shapley(model, inputs, 1, batch_size=batch_size, **options), expected, 16 * 54, scale=scale)
    for image in range(3):
        alone = pysal.shapley(model, inputs[image : image + 1], 1, image_ids=[image], **options)
        assert_rounding(alone, expected[image : image + 1], 16 * 54, scale=scale)


def test_the_seed_picks_the_orders() -> None:
    inputs, model = images(1, 3, 8, 10), rectified()
    options: dict[str, Any] = {"segments": Grid(4, 5), "passes": 80, "score": "raw"}
    first, again, other = (pysal.shapley(model, inputs, 1, seed=seed, **options) for seed in (1, 1, -1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    found = run(model, inputs, **{name: value for name, value in options.items() if name != "score"})
    assert not found.details["exact"].any()
    assert found.details["order_pairs"].tolist() == [2]  # 78 passes beside none and all, 19 for each of two orders
    assert found.details["standard_error"].shape == (1, 1, 8, 10)
    assert (found.details["standard_errors"][0] > 0).any()
    assert found.details["half_widths"][0].isinf().all()  # of two pairs
    more = run(model, inputs, segments=Grid(4, 5), passes=160)
    assert more.details["order_pairs"].tolist() == [4]
    assert (more.details["half_widths"][0] > more.details["standard_errors"][0]).all()


def test_whole_batches_for_a_model_whose_rows_depend_on_each_other() -> None:
    inputs = images(2, 3, 4, 4)

    def coupled(batch: Tensor) -> Tensor:
        return batch.mean((1, 2, 3))[:, None] * len(batch)

    found = pysal.shapley(coupled, inputs, 0, segments=Grid(2, 2), score="raw", batch_size=2)
    expected = pysal.leave_one_out(lambda batch: 2 * batch.mean((1, 2, 3)), inputs, segments=Grid(2, 2), score="raw")
    assert_rounding(found, expected, 4 * 96, scale=2.0)


def test_explain_runs_it_where_it_is_named() -> None:
    inputs, model = images(1, 3, 6, 6), rectified()
    assert "shapley" not in pysal.explain(model, inputs, 1).results
    given = {"shapley": {"segments": Grid(2, 2)}, "leave_one_out": {"segments": Grid(2, 2)}}
    found = pysal.explain(model, inputs, 1, methods=["shapley", "leave_one_out"], method_options=given)
    assert found["shapley"].title == "Shapley values"
    assert found.panel("shapley").unit == "share of probability"
    assert found.panel("shapley").small_print == "4 segments, exact"
    assert "mean standard error" not in found.table()
    estimated = pysal.explain(
        model, inputs, 1, methods="shapley", method_options={"shapley": {"segments": Grid(3, 4), "passes": 46, "tree": "flat"}}
    )
    assert "12 segments, estimated by 2 pairs of orders; mean standard error" in estimated.table()
    expected = pysal.shapley(model, inputs, 1, segments=Grid(2, 2))
    assert_rounding(found.maps["shapley"], expected, 16, scale=1.0)


def nested(depth: int) -> list[Any]:
    tree: list[Any] = [0, 1, 2, 3]
    for _ in range(depth - 1):
        tree = [tree]
    return tree


def endless() -> list[Any]:
    tree: list[Any] = [0, 1, 2]
    tree.append(tree)
    return tree


def test_trees_may_be_as_deep_as_they_are_said_to_be() -> None:
    x = images(1, 3, 15, 15)
    chain: list[Any] = [199, 200]
    for segment in reversed(range(1, 199)):
        chain = [segment, chain]
    values = pysal.shapley(rectified(), x, 0, segments=Grid(15, 15), tree=[0, *range(201, 225), chain], passes=900, score="raw")
    change = rectified()(x)[:, 0] - rectified()(torch.zeros_like(x))[:, 0]
    torch.testing.assert_close(values.sum((1, 2, 3)), change.to(values.dtype), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("given", "kind", "sentence"),
    [
        ({"tree": "quarters"}, ValueError, "tree must be one of 'halves', 'merged', 'flat', got 'quarters'"),
        ({"tree": [0, 1, 2]}, ValueError, "numbers 0 to 3, each once, got [0, 1, 2]"),
        ({"tree": [0, 1, 2, [3, 3]]}, ValueError, "numbers 0 to 3, each once, got [0, 1, 2, [3, 3]]"),
        ({"tree": [0, 1, [], [2, 3]]}, TypeError, "numbers 0 to 3, each once, got []"),
        ({"tree": 1.5}, TypeError, "numbers 0 to 3, each once, got 1.5"),
        ({"passes": 0}, ValueError, "passes must be a whole number of at least 1, got 0"),
        ({"passes": 13}, ValueError, "passes must be at least 14 for an estimate with its error of 4 segments, got 13"),
        ({"segments": Grid(1, 1), "passes": 1}, ValueError, "at least 2 for the exact values of 1 segment, got 1"),
        ({"segments": Grid(2, 1), "passes": 3}, ValueError, "at least 4 for the exact values of 2 segments, got 3"),
        ({"tree": [0, 1, nested(200), 3]}, ValueError, "tree must be nested at most 200 deep, got a sequence that goes deeper"),
        ({"tree": endless()}, ValueError, "tree must be nested at most 200 deep, got a sequence that goes deeper"),
        ({"segments": Window(3, 2)}, ValueError, "segments must not overlap, got boxes 0 and 1, which do"),
        ({"seed": 0.5}, ValueError, "seed must be a whole number in [-2^63, 2^63), got 0.5"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else str(value),
)
def test_refuses(given: dict[str, Any], kind: type[Exception], sentence: str) -> None:
    options: dict[str, Any] = {"segments": Grid(2, 2), "tree": "flat", **given}
    with pytest.raises(kind, match="must") as raised:
        pysal.shapley(rectified(), images(1, 3, 6, 6), 0, **options)
    assert str(raised.value).startswith("pysal.shapley: ")
    assert str(raised.value).endswith(sentence)
