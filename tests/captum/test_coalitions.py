"""Methods that leave features out in sets: the same calls of captum and here, with the same seed; enumeration; refusals."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from captum._utils.models.linear_model import SkLearnLinearRegression
from torch import Tensor, nn

import pysal
import pysal.captum
from tests.captum.networks import NETWORKS
from tests.captum.peer import IGNORED, both, difference, peers

pytestmark = [
    *(pytest.mark.filterwarnings(one) for one in IGNORED),
    pytest.mark.filterwarnings("ignore:You are providing multiple inputs for Lime"),
    pytest.mark.filterwarnings("ignore:Feature mask is missing some integers"),
    pytest.mark.filterwarnings("ignore:Minimum element in feature mask is not 0"),
]

SINGLE = torch.finfo(torch.float32).eps
# captum adds up in float32, once for each order. It fits in float32, with weights of up to 1e6, so roots of up to 1e3; its
# lasso stops at a duality gap of 1e-4 of the squares, whose root the coefficients may be off by, less what the curvature takes.
SUMS, FITS, LASSO = 64 * SINGLE, 1e3 * SINGLE, 1e-2
TOLERANCES = {
    "ShapleyValueSampling": SUMS,
    "ShapleyValues": SUMS,
    "FeaturePermutation": 1e-12,
    "KernelShap": FITS,
    "Lime": LASSO,
}


def table_model() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3)).double().eval()


def pair(left: Tensor, right: Tensor, scale: float = 1.0, rows: Tensor | None = None) -> Tensor:
    value = left.sum(1) * torch.tanh(right).sum(1) * scale
    return value if rows is None else value * rows


MODEL = table_model()
ROWS = torch.randn(4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
TWO = ROWS[:, :3], ROWS[:, 3:5]
GAPS = torch.tensor([[0, 0, 1, 1, 2, 5]])
BEYOND = torch.tensor([[3, 3, 1, 1, 2, 1]])
IMAGES = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
OF_IMAGES = nn.Sequential(nn.Flatten(), nn.Linear(48, 3)).double()
QUARTERS = (torch.arange(4)[:, None] // 2 * 2 + torch.arange(4) // 2).reshape(1, 1, 4, 4)

CALLS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "one target": (MODEL, ROWS, {"target": 1}),
    "targets": (MODEL, ROWS, {"target": [0, 1, 2, 0]}),
    "one example": (MODEL, ROWS[:1], {"target": 1}),
    "numbers that nothing has": (MODEL, ROWS, {"target": 1, "feature_mask": GAPS}),
    "numbers from 1": (MODEL, ROWS, {"target": 1, "feature_mask": BEYOND}),
    "two inputs": (pair, TWO, {"additional_forward_args": (2.0, torch.arange(4.0, dtype=torch.float64))}),
    "one feature in two inputs": (pair, TWO, {"feature_mask": (torch.tensor([[0, 1, 2]]), torch.tensor([[3, 1]]))}),
    "images": (OF_IMAGES, IMAGES, {"target": 2, "feature_mask": QUARTERS}),
}
SAMPLES = {"ShapleyValueSampling": {"n_samples": 6}, "KernelShap": {"n_samples": 40}, "Lime": {"n_samples": 40}}


# one example has no other to exchange features with
PAIRS = [(name, call) for name in TOLERANCES for call in CALLS if (name, call) != ("FeaturePermutation", "one example")]


@pytest.mark.parametrize("together", [1, 3])
@pytest.mark.parametrize(("name", "call"), PAIRS)
def test_the_same_seed_gives_the_same_answer(name: str, call: str, together: int) -> None:
    model, inputs, options = CALLS[call]
    if name == "ShapleyValues" and call == "two inputs":
        options = {**options, "feature_mask": (torch.tensor([[0, 1, 2]]), torch.tensor([[3, 3]]))}  # captum runs all orders
    if name == "ShapleyValues" and "feature_mask" not in options:
        options = {**options, "feature_mask": torch.tensor([[0, 0, 1, 1, 2, 3]])}
    chosen = {**options, **SAMPLES.get(name, {}), "perturbations_per_eval": together}
    if name == "ShapleyValues" and call == "numbers that nothing has":
        chosen["feature_mask"] = torch.tensor([[0, 0, 1, 1, 2, 4]])
    both(name, peers(name, model), TOLERANCES[name], inputs, **chosen)


@pytest.mark.parametrize("baselines", [0.5, ROWS.flip(0), ROWS[:1]])
@pytest.mark.parametrize("name", [name for name in TOLERANCES if name not in ("FeaturePermutation", "ShapleyValues")])
def test_baselines(name: str, baselines: Any) -> None:
    both(name, peers(name, MODEL), TOLERANCES[name], ROWS, baselines, 1, **SAMPLES[name])


@pytest.mark.parametrize("answer", [lambda x: MODEL(x).sum(), lambda x: float(MODEL(x).detach().sum())])
@pytest.mark.parametrize("name", [name for name in TOLERANCES if name != "ShapleyValues"])
def test_one_answer_for_all_examples(name: str, answer: Callable[[Tensor], Any]) -> None:
    options = {"feature_mask": torch.tensor([[0, 0, 1, 1, 2, 3]]), **SAMPLES.get(name, {})}
    both(name, peers(name, answer), TOLERANCES[name], ROWS, **options)
    if name == "FeaturePermutation":
        return
    for one in peers(name, answer):
        with pytest.raises(AssertionError):
            one.attribute(ROWS, perturbations_per_eval=2, **options)


@pytest.mark.parametrize("name", ["ShapleyValueSampling", "FeaturePermutation"])
def test_several_outputs(name: str) -> None:
    both(name, peers(name, MODEL), TOLERANCES[name], ROWS, perturbations_per_eval=2, **SAMPLES.get(name, {}))


def test_fits_have_one_number_for_each_example() -> None:
    for name in ("Lime", "KernelShap"):
        for one in peers(name, MODEL):
            with pytest.raises(AssertionError):
                one.attribute(ROWS)


@pytest.mark.parametrize("name", ["Lime", "KernelShap"])
def test_coefficients(name: str) -> None:
    for inputs in (ROWS, ROWS[:1]):
        both(name, peers(name, MODEL), TOLERANCES[name], inputs, target=1, n_samples=40, return_input_shape=False)


def test_a_model_and_sets_of_ones_own() -> None:
    def weight(_given: Any, _changed: Any, chosen: Tensor, **_: Any) -> Tensor:
        return 1.0 + chosen.sum()

    def drawn(_given: Any, **options: Any) -> Tensor:
        return torch.randint(0, 2, (1, options["num_interp_features"]))

    found = peers("Lime", MODEL, SkLearnLinearRegression(), weight, drawn)
    both("Lime", found, FITS, ROWS, target=1, n_samples=40)


@pytest.mark.parametrize("name", ["ShapleyValueSampling", "ShapleyValues", "KernelShap"])
def test_values_add_up_to_the_change_of_the_output(name: str) -> None:
    found = getattr(pysal.captum, name)(MODEL).attribute(ROWS, 0.25, 2, **SAMPLES.get(name, {}))
    with torch.no_grad():
        change = (MODEL(ROWS) - MODEL(torch.full_like(ROWS, 0.25)))[:, 2]
    # KernelShap weighs what it must not miss by 1e6, not infinitely
    assert difference(change.float(), found.sum(1)) < (64 * SINGLE if name != "KernelShap" else 1e-4)


def test_fits_of_all_sets_are_shapley_values() -> None:
    """With the kernel's weights for all sets, the fit is exact; here from many draws, to the error of their number."""
    exact = pysal.captum.ShapleyValues(MODEL).attribute(ROWS[:1], target=1)
    torch.manual_seed(0)
    fitted = pysal.captum.KernelShap(MODEL).attribute(ROWS[:1], target=1, n_samples=6000, perturbations_per_eval=6000)
    assert difference(exact, fitted) < 0.05


def test_one_feature_is_all_features() -> None:
    """captum has no distribution to draw from."""
    theirs, ours = peers("KernelShap", MODEL)
    mask = torch.zeros(1, 6, dtype=torch.int64)
    with pytest.raises((ValueError, RuntimeError), match="prob"):  # the latter where distributions do not check their arguments
        theirs.attribute(ROWS[:1], target=1, feature_mask=mask)
    with torch.no_grad():
        change = (MODEL(ROWS[:1]) - MODEL(ROWS[:1] * 0))[0, 1]
    assert float((ours.attribute(ROWS[:1], target=1, feature_mask=mask) - change).abs().max()) < 1e-5


def test_one_example_has_no_other_to_exchange_features_with() -> None:
    with pytest.warns(UserWarning, match="one example has no other"):
        found = pysal.captum.FeaturePermutation(MODEL).attribute(ROWS[:1], target=1)
    assert not found.any()
    with pytest.warns(UserWarning, match="no arguments speed: they change nothing"):
        pysal.captum.FeaturePermutation(MODEL).attribute(ROWS, target=1, speed=3)
    own = pysal.captum.FeaturePermutation(MODEL, lambda rows, mask: torch.where(mask, rows.flip(0), rows))
    theirs = peers("FeaturePermutation", MODEL, lambda rows, mask: torch.where(mask, rows.flip(0), rows))[0]
    assert difference(theirs.attribute(ROWS, 1), own.attribute(ROWS, 1, baselines=3)) < 1e-12


def test_all_sets_of_many_features_take_long() -> None:
    rows = torch.ones(1, 16)
    with pytest.warns(UserWarning, match="16 features have 65536 sets"):
        found = pysal.captum.ShapleyValues(lambda x: x.sum(1)).attribute(rows, perturbations_per_eval=8192)
    assert torch.allclose(found, rows, rtol=0, atol=64 * SINGLE)


def test_a_prepared_model_chooses_how_many_sets_run_together() -> None:
    model, images = NETWORKS["conv"].model(torch.float32), NETWORKS["conv"].inputs(1, torch.float32)
    prepared = pysal.prepare(model, images, batch_size=16)
    mask = torch.arange(64).reshape(1, 1, 8, 8) // 8
    for name in ("ShapleyValueSampling", "KernelShap"):
        found = []
        for one in (model, prepared):
            torch.manual_seed(0)
            found.append(getattr(pysal.captum, name)(one).attribute(images, target=1, feature_mask=mask, n_samples=12))
        assert difference(*found) < 1e-3


def test_what_is_refused() -> None:
    for name in ("ShapleyValueSampling", "Lime", "KernelShap"):
        with pytest.raises(AssertionError, match="n_samples must be a whole number of at least 1, got 0"):
            getattr(pysal.captum, name)(MODEL).attribute(ROWS, target=1, n_samples=0)
    with pytest.raises(ValueError, match="at least one example"):
        pysal.captum.ShapleyValueSampling(MODEL).attribute(ROWS[:0], target=1)


MASKED = ["FeatureAblation", "FeaturePermutation", "ShapleyValueSampling", "ShapleyValues", "Lime", "KernelShap"]


@pytest.mark.parametrize("name", MASKED)
def test_masks_that_fit_no_input(name: str) -> None:
    method = getattr(pysal.captum, name)(MODEL)
    for shape in ((1, 5), (2, 6), (0, 6), (1, 1, 6)):  # of columns, of rows, of no rows, of more dimensions
        expected = (
            rf"^pysal.captum.{name}: feature_mask must fit an input of shape \(4, 6\), got shape {re.escape(str(shape))}$"
        )
        with pytest.raises(AssertionError if name.startswith("Shapley") else RuntimeError, match=expected):
            method.attribute(ROWS, target=1, feature_mask=torch.zeros(shape).long())
    with pytest.raises(AssertionError, match="feature_mask must be a tensor or a tuple of tensors, got ndarray"):
        method.attribute(ROWS, target=1, feature_mask=GAPS.numpy())


@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int16, torch.float32])
def test_masks_of_other_dtypes(name: str, dtype: torch.dtype) -> None:
    found = []
    for mask in (GAPS.clamp(max=1), GAPS.clamp(max=1).to(dtype)):
        torch.manual_seed(0)
        found.append(getattr(pysal.captum, name)(MODEL).attribute(ROWS, target=1, feature_mask=mask))
    assert torch.equal(*found)


@pytest.mark.parametrize("name", ["ShapleyValueSampling", "ShapleyValues", "Lime", "KernelShap"])
def test_numbers_of_features_are_whole(name: str) -> None:
    with pytest.raises(IndexError, match="feature_mask must be whole numbers, got fractions among them"):
        getattr(pysal.captum, name)(MODEL).attribute(ROWS, target=1, feature_mask=GAPS / 2)


def test_elements_of_numbers_below_zero_are_never_there() -> None:
    mask = torch.tensor([[-1, 0, 1, 1, -1, 2]])
    both("ShapleyValueSampling", peers("ShapleyValueSampling", MODEL), SUMS, ROWS, 0.5, 1, feature_mask=mask, n_samples=4)
    both("ShapleyValues", peers("ShapleyValues", MODEL), SUMS, ROWS, 0.5, 1, feature_mask=(mask,))


@pytest.mark.parametrize("name", ["Lime", "KernelShap", "ShapleyValueSampling"])
def test_nan_stays_nan(name: str) -> None:
    found = getattr(pysal.captum, name)(lambda x: x.sum(1) * torch.nan).attribute(ROWS[:1])
    assert bool(found.isnan().all())


def test_progress_ends(capfd: pytest.CaptureFixture[str]) -> None:
    pysal.captum.ShapleyValueSampling(MODEL).attribute(ROWS, target=1, n_samples=3, show_progress=True)
    assert "Shapley Value Sampling attribution: 100%" in capfd.readouterr().err
    pysal.captum.KernelShap(MODEL).attribute(ROWS[:1], target=1, show_progress=True)
    assert "Kernel Shap attribution: 100%" in capfd.readouterr().err
