"""The helpers of the op tests: a tolerance that lets a wrong kernel pass would make every one of them worthless."""

import pytest
import torch

from pysal.testing import DTYPES, assert_no_worse, assert_same_layout, layouts, sample

TRUTH = sample(1000, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_rounding_passes_and_more_fails(dtype):
    baseline = TRUTH.to(dtype)
    assert_no_worse(baseline, TRUTH, baseline)
    # |baseline - truth| <= eps / 2 for |truth| < 1: the bound lies between 4 and 5 eps
    for steps, passes in ((3, True), (6, False)):
        kernel = baseline.clone()
        kernel[0] = (TRUTH[0] + steps * torch.finfo(dtype).eps * TRUTH.abs().max()).to(dtype)
        if passes:
            assert_no_worse(kernel, TRUTH, baseline)
        else:
            with pytest.raises(AssertionError, match="off by"):
                assert_no_worse(kernel, TRUTH, baseline)


def test_one_wrong_element_fails():
    kernel = TRUTH.clone()
    kernel[500] = 0
    with pytest.raises(AssertionError, match="off by"):
        assert_no_worse(kernel, TRUTH, TRUTH)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_must_agree(value):
    truth = TRUTH.clone()
    truth[3] = value
    assert_no_worse(truth, truth, truth)
    for wrong in (TRUTH, -truth.nan_to_num(0.0)):
        with pytest.raises(AssertionError):
            assert_no_worse(wrong, truth, truth)
    with pytest.raises(AssertionError):  # NaN where the truth is a number
        assert_no_worse(truth, TRUTH, TRUTH)


def test_shapes_and_dtypes_must_agree():
    with pytest.raises(AssertionError, match="shapes differ"):
        assert_no_worse(TRUTH[None], TRUTH, TRUTH)
    with pytest.raises(AssertionError, match=r"kernel is torch.float32, baseline torch.float64"):
        assert_no_worse(TRUTH.float(), TRUTH, TRUTH)
    with pytest.raises(AssertionError, match=r"reference64 must be float64, got torch.float32"):
        assert_no_worse(TRUTH, TRUTH.float(), TRUTH)


def test_samples_are_the_same_numbers_in_every_dtype():
    for dtype in DTYPES:
        assert torch.equal(sample(3, 5, dtype=dtype), sample(3, 5, dtype=torch.float64).to(dtype))
    assert not torch.equal(sample(3, 5, seed=1), sample(3, 5))
    values = sample(1000, low=2, high=3)
    assert 2 <= values.min() < values.max() <= 3


def test_layouts_hold_the_same_values():
    values = sample(2, 3, 4, 5)
    found = dict(layouts(values))
    assert all(torch.equal(tensor, values) for tensor in found.values())
    assert {tensor.stride() for tensor in found.values()} == {
        (60, 20, 5, 1),
        (60, 20, 1, 4),
        (120, 40, 10, 2),
        (60, 1, 15, 3),
    }
    assert found["offset"].data_ptr() % 16 == 4
    with pytest.raises(AssertionError, match="strides"):
        assert_same_layout(found["channels_last"], found["contiguous"])


def test_uninitialised_memory_is_poisoned():
    assert torch.empty(100).isnan().all()
    assert (torch.empty(100, dtype=torch.uint8) == 255).all()
