"""The combinations that are compared leave out no pair, and are few."""

import itertools

import pytest

from tests.captum.pairwise import pairwise


@pytest.mark.parametrize("sizes", [(2, 3), (5, 7, 3), (4, 3, 5, 3, 2), (1, 4, 2), (2, 2, 2, 2, 2, 2)], ids=str)
def test_every_pair_of_values_meets(sizes: tuple[int, ...]) -> None:
    found = pairwise(*(range(size) for size in sizes))
    for i, j in itertools.combinations(range(len(sizes)), 2):
        assert {(one[i], one[j]) for one in found} == set(itertools.product(range(sizes[i]), range(sizes[j])))
    assert len(found) == len(set(found)) <= 2 * sorted(sizes)[-1] * sorted(sizes)[-2]
