"""Where pysal.captum differs from captum by design: each test shows captum's error against something known in closed form."""

import itertools
import math
from typing import Any

import captum.attr
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pysal.captum
from tests.captum.networks import NETWORKS, Functional, Shared
from tests.captum.peer import IGNORED, difference, peers

pytestmark = [pytest.mark.filterwarnings(one) for one in IGNORED]

RULES = {"GuidedBackprop": True, "Deconvolution": False}


class Ruled(torch.autograd.Function):
    """ReLU whose backward is the rule, line for line."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, guided: bool) -> Tensor:
        ctx.save_for_backward(value)
        ctx.guided = guided
        return value.clamp_min(0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (value,) = ctx.saved_tensors
        positive = gradient * (gradient > 0)
        return (positive * (value > 0) if ctx.guided else positive), None


def by_hand(model: nn.Module, inputs: Tensor, target: int, guided: bool) -> Tensor:
    """The rule at every ReLU of the two networks below."""

    def relu(value: Tensor) -> Tensor:
        return Ruled.apply(value, guided)

    leaf = inputs.detach().clone().requires_grad_()
    if isinstance(model, Functional):
        value = relu(model.second(relu(model.conv(leaf)))).mean((2, 3))
    else:
        assert isinstance(model, Shared)
        value = model.conv(leaf)
        value = (relu(value) + value).square().mean((2, 3))
    return torch.autograd.grad(model.head(value)[:, target].sum(), leaf)[0]


@pytest.mark.parametrize("method", RULES)
@pytest.mark.parametrize("name", ["functional", "shared"])
def test_rules_hold_at_the_operator(name: str, method: str) -> None:
    model, inputs = NETWORKS[name].model(), NETWORKS[name].inputs(2)
    right = by_hand(model, inputs, 2, RULES[method])
    theirs, ours = (one.attribute(inputs, 2) for one in peers(method, model))
    assert difference(right, ours) < 1e-12
    assert difference(right, theirs) > 0.1
    if name == "functional":  # captum saw no ReLU at all, and said nothing
        assert difference(captum.attr.Saliency(model).attribute(inputs, 2, abs=False), theirs) < 1e-12


@pytest.mark.parametrize("activation", [nn.SiLU, nn.GELU, nn.Tanh])
@pytest.mark.parametrize("method", ["GuidedBackprop", "Deconvolution", "GuidedGradCam"])
def test_strict(method: str, activation: type[nn.Module]) -> None:
    """Without a ReLU captum returns the plain gradient; ours says so, unless told not to."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), activation(), nn.Flatten(), nn.Linear(144, 5)).double().eval()
    inputs = NETWORKS["conv"].inputs(2)
    arguments = (model, model[0]) if method == "GuidedGradCam" else (model,)
    theirs, lenient = (one.attribute(inputs, 1) for one in peers(method, *arguments, strict=False))
    assert difference(theirs, lenient) < 1e-12
    with pytest.raises(ValueError, match="ReLU"):
        getattr(pysal.captum, method)(*arguments).attribute(inputs, 1)


def test_noise_tunnel_does_not_depend_on_batching() -> None:
    model, inputs = NETWORKS["conv"].model(), NETWORKS["conv"].inputs(3)
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    for size in (None, 1, 3):
        for package, results in zip((captum.attr, pysal.captum), found, strict=True):
            torch.manual_seed(5)
            tunnel = package.NoiseTunnel(package.Saliency(model))
            results.append(tunnel.attribute(inputs, nt_samples=7, nt_samples_batch_size=size, stdevs=0.5, target=1))
    theirs, ours = found
    assert all(difference(ours[0], other) < 1e-12 for other in ours[1:])
    assert all(difference(theirs[0], other) > 0.05 for other in theirs[1:])


def test_noise_tunnel_follows_its_seed_or_torchs() -> None:
    model, inputs = NETWORKS["conv"].model(), NETWORKS["conv"].inputs(2)

    def run(seed: int | None, manual: int) -> Tensor:
        torch.manual_seed(manual)
        return pysal.captum.NoiseTunnel(pysal.captum.Saliency(model), seed=seed).attribute(inputs, target=1)

    assert torch.equal(run(None, 0), run(None, 0))
    assert not torch.equal(run(None, 0), run(None, 1))
    assert torch.equal(run(3, 0), run(3, 1))
    state = torch.get_rng_state()
    pysal.captum.NoiseTunnel(pysal.captum.Saliency(model), seed=3).attribute(inputs, target=1)
    assert torch.equal(torch.get_rng_state(), state)


def test_noise_of_several_inputs_is_independent() -> None:
    inputs = (torch.zeros(1, 4000), torch.zeros(1, 4000))
    tunnel = pysal.captum.NoiseTunnel(pysal.captum.Saliency(lambda x, y: (x.square() + y.square()).sum(1) / 2), seed=1)
    first, second = tunnel.attribute(inputs, nt_samples=1, stdevs=(1.0, 2.0), abs=False)
    assert abs(float(first.std()) - 1) < 5 / 4000**0.5
    assert abs(float(second.std()) - 2) < 10 / 4000**0.5
    assert abs(float(torch.corrcoef(torch.cat([first, second]))[0, 1])) < 5 / 4000**0.5


@pytest.mark.parametrize("size", [None, 2])
def test_captums_noise_bit_for_bit(size: int | None) -> None:
    """What the forward function is given is the same to the last bit, in the same order."""
    inputs = (NETWORKS["linear"].inputs(3, torch.float32), NETWORKS["sequence"].inputs(3, torch.float32))
    seen: list[list[Tensor]] = []

    def forward(x: Tensor, y: Tensor) -> Tensor:
        seen[-1].append(torch.cat([x.detach(), y.detach().flatten(1)], 1).clone())
        return x.sum(1) * y.sum((1, 2))

    for package, options in ((captum.attr, {}), (pysal.captum, {"rng": "captum"})):
        seen.append([])
        torch.manual_seed(9)
        package.NoiseTunnel(package.Saliency(forward), **options).attribute(
            inputs, nt_samples_batch_size=size, stdevs=(0.3, 0.4)
        )
    assert torch.equal(torch.cat(seen[0]), torch.cat(seen[1]))


def test_a_variance_is_never_negative() -> None:
    inputs = torch.full((2, 50), 1e4)
    forward = lambda x: x.square().sum(1)  # noqa: E731
    found = []
    for package in (captum.attr, pysal.captum):
        torch.manual_seed(0)
        tunnel = package.NoiseTunnel(package.Saliency(forward))
        found.append(tunnel.attribute(inputs, nt_type="vargrad", nt_samples=9, stdevs=1.0))
    assert float(found[0].min()) < 0  # the true variance is about 4
    assert float(found[1].min()) > 0
    assert 2 < float(found[1].mean()) < 5


def test_the_weights_of_the_trapezoid_rule_add_up() -> None:
    """On a linear function every rule is exact: x times the weight of x."""
    inputs, weight = NETWORKS["linear"].inputs(3), torch.linspace(-1, 2, 6, dtype=torch.float64)
    theirs, ours = peers("IntegratedGradients", lambda x: x @ weight)
    for steps in (2, 10, 50):
        choices = {"n_steps": steps, "method": "riemann_trapezoid", "return_convergence_delta": True}
        found, delta = ours.attribute(inputs, **choices)
        assert difference(inputs * weight, found) < 1e-12
        assert float(delta.abs().max()) < 1e-12
        short, missing = theirs.attribute(inputs, **choices)
        assert difference(inputs * weight * (1 - 1 / steps), short) < 1e-6
        assert torch.allclose(missing, -(inputs @ weight) / steps, rtol=1e-6)
        exact = pysal.captum.IntegratedGradients(lambda x: x @ weight, exact_captum=True).attribute(inputs, **choices)
        assert difference((short, missing), exact) < 1e-12


def test_weights_are_not_rounded_to_float32() -> None:
    """Two Gauss-Legendre nodes integrate a quadratic gradient exactly: x^3 from 0 adds up to x^3."""
    inputs = NETWORKS["linear"].inputs(3)
    theirs, ours = (one.attribute(inputs, n_steps=20) for one in peers("IntegratedGradients", lambda x: x.pow(3).sum(1)))
    assert difference(inputs.pow(3), ours) < 1e-14
    assert difference(inputs.pow(3), theirs) > 1e-10


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_noise_tunnel_in_half_precision(dtype: torch.dtype) -> None:
    model, inputs = NETWORKS["conv"].model(dtype), NETWORKS["conv"].inputs(2, dtype)
    with pytest.raises(RuntimeError):
        captum.attr.NoiseTunnel(captum.attr.Saliency(model)).attribute(inputs, target=1)
    found = pysal.captum.NoiseTunnel(pysal.captum.IntegratedGradients(model), seed=2).attribute(inputs, stdevs=0.1, target=1)
    wide = pysal.captum.NoiseTunnel(pysal.captum.IntegratedGradients(NETWORKS["conv"].model(torch.float32)), seed=2)
    right = wide.attribute(inputs.float(), stdevs=0.1, target=1)
    assert difference(right, found) < 16 * torch.finfo(dtype).eps


def test_guided_grad_cam_says_what_it_cannot_do() -> None:
    """A vector has no size to resize a map to: captum returns an empty tensor and warns."""
    network = NETWORKS["two_inputs"]
    model, inputs = network.model(), network.inputs(2)
    theirs, ours = peers("GuidedGradCam", model, model.conv)
    with pytest.warns(UserWarning, match="returning empty tensor"):
        assert theirs.attribute(inputs, 1)[1].numel() == 0
    with pytest.raises(ValueError, match="spatial dimensions"):
        ours.attribute(inputs, 1)


def test_masks_of_fewer_dimensions() -> None:
    """A mask (F,) is one for all rows, however many features go together."""
    inputs = NETWORKS["linear"].inputs(3)
    weight = torch.linspace(-1, 2, 6, dtype=torch.float64)
    theirs, ours = peers("FeatureAblation", lambda x: x @ weight)
    for together in (1, 3, 6):
        found = ours.attribute(inputs, feature_mask=torch.arange(6), perturbations_per_eval=together)
        assert difference(inputs * weight, found) < 1e-12
    wrong = theirs.attribute(inputs, feature_mask=torch.arange(6), perturbations_per_eval=3)
    assert difference(inputs * weight, wrong) > 0.1


def test_masks_of_each_example_with_several_outputs() -> None:
    """Every number of an example's output is explained with that example's own mask."""
    inputs = NETWORKS["linear"].inputs(2)
    mask = torch.tensor([[0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 1, 0]])
    weight = torch.arange(18.0, dtype=torch.float64).reshape(6, 3)
    theirs, ours = peers("FeatureAblation", lambda x: x @ weight)
    expected = torch.zeros(6, 6, dtype=torch.float64)
    for row, column, element in itertools.product(range(2), range(3), range(6)):
        of_feature = (inputs[row] * weight[:, column])[mask[row] == mask[row, element]]
        expected[3 * row + column, element] = of_feature.sum()
    for together in (1, 2):
        found = ours.attribute(inputs, feature_mask=mask, perturbations_per_eval=together)
        assert difference(expected, found) < 1e-12
    with pytest.raises(RuntimeError):
        theirs.attribute(inputs, feature_mask=mask)
    for one in peers("FeatureAblation", lambda x: x.sum()):
        with pytest.raises(RuntimeError):
            one.attribute(inputs, feature_mask=mask)


def test_infinity_can_be_left_out() -> None:
    """What fills a feature replaces it, whatever was there; captum multiplies it by 0."""
    inputs = torch.tensor([[1.0, float("inf")]])
    theirs, ours = (one.attribute(inputs) for one in peers("FeatureAblation", lambda x: x.tanh().sum(1)))
    assert torch.allclose(ours, inputs.tanh())
    assert torch.isnan(theirs[0, 1])


def test_errors_leave_inputs_alone() -> None:
    """After an exception captum leaves requires_grad on the caller's tensor."""
    marked = []
    for package in (captum.attr, pysal.captum):
        inputs = torch.rand(2, 3)
        with pytest.raises(AssertionError):
            package.Saliency(lambda x: F.relu(x)).attribute(inputs)
        marked.append(inputs.requires_grad)
    assert marked == [True, False]


def test_an_input_without_effect_has_no_attribution() -> None:
    inputs = (torch.rand(2, 3), torch.rand(2, 4))
    theirs, ours = peers("Saliency", lambda x, y: x.square().sum(1))
    found = ours.attribute(inputs)
    assert torch.equal(found[0], 2 * inputs[0])
    assert not found[1].any()
    with pytest.raises(RuntimeError):
        theirs.attribute(inputs)


def test_progress_of_occlusion_counts_windows(capfd: pytest.CaptureFixture[str]) -> None:
    for one, arrives in zip(peers("Occlusion", lambda x: x.sum((1, 2))), (False, True), strict=True):
        one.attribute(torch.rand(2, 6, 6), (3, 3), show_progress=True)
        assert ("100%" in capfd.readouterr().err) == arrives


def deep_lifts(model: nn.Module, inputs: Tensor, starts: Tensor, target: int) -> tuple[float, float]:
    """How far the shares of captum and ours are from the change of the output, relative to the largest share."""
    found = []
    for one in peers("DeepLift", model):
        shares = one.attribute(inputs, starts, target).detach()
        with torch.no_grad():
            change = (model(inputs) - model(starts))[:, target]
        found.append(float((shares.flatten(1).sum(1) - change).abs().max() / shares.abs().max()))
    return found[0], found[1]


class Reused(nn.Module):
    """One ReLU module in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.act, self.first, self.second = nn.ReLU(), nn.Linear(6, 7), nn.Linear(7, 4)

    def forward(self, vectors: Tensor) -> Tensor:
        return self.act(self.second(self.act(self.first(vectors))))


@pytest.mark.filterwarnings("ignore:Setting forward, backward hooks")
def test_deep_lift_of_a_module_that_runs_twice() -> None:
    torch.manual_seed(0)
    model, inputs = Reused().double().eval(), torch.randn(3, 6, dtype=torch.float64)
    theirs, ours = peers("DeepLift", model)
    with pytest.raises(RuntimeError, match="used more than once"):
        theirs.attribute(inputs, inputs.flip(0), 2)
    shares = ours.attribute(inputs, inputs.flip(0), 2)
    with torch.no_grad():
        change = (model(inputs) - model(inputs.flip(0)))[:, 2]
    assert difference(change, shares.sum(1)) < 1e-12


DEEP = {
    "a function": lambda: NETWORKS["functional"].model(),
    "GELU": lambda: nn.Sequential(nn.Flatten(), nn.Linear(126, 8), nn.GELU(), nn.Linear(8, 5)),
    "a maximum before an activation": lambda: nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5)
    ),
    "a softmax": lambda: nn.Sequential(nn.Flatten(), nn.Linear(126, 5), nn.Softmax(1)),
}


@pytest.mark.parametrize("kind", DEEP)
@pytest.mark.filterwarnings("ignore:Setting forward, backward hooks")
def test_shares_of_deep_lift_add_up(kind: str) -> None:
    torch.manual_seed(0)
    model = DEEP[kind]().double().eval()
    inputs, starts = (torch.randn(3, 3, 7, 6, dtype=torch.float64) for _ in range(2))
    theirs, ours = deep_lifts(model, inputs, starts, 2)
    assert ours < 1e-9
    assert theirs > 0.01


@pytest.mark.filterwarnings("ignore:Setting forward, backward hooks")
def test_deep_lift_does_not_depend_on_the_batch() -> None:
    """captum takes the mean over the whole batch from the shares of a softmax."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Softmax(1)).double()
    inputs = torch.randn(3, 6, dtype=torch.float64)
    theirs, ours = peers("DeepLift", model)
    for one, least, most in ((theirs, 0.001, math.inf), (ours, 0.0, 1e-12)):
        together = one.attribute(inputs, 0, 2)
        alone = torch.cat([one.attribute(row, 0, 2) for row in inputs.split(1)])
        assert least <= difference(together, alone) <= most


def test_deep_lift_of_a_softmax_is_off_by_the_rounding_of_its_logits() -> None:
    """Large logits that move together: what they share goes, its rounding stays. In float64 next to nothing does."""
    torch.manual_seed(0)
    weights = 1e4 * torch.rand(40) + 0.01 * torch.randn(10, 40)
    inputs = torch.rand(3, 40)
    errors = []
    for dtype in (torch.float32, torch.float64):
        linear = nn.Linear(40, 10)
        linear.weight.data, linear.bias.data = weights.clone(), torch.zeros(10)
        model = nn.Sequential(linear, nn.Softmax(1)).to(dtype)
        _, delta = pysal.captum.DeepLift(model).attribute(inputs.to(dtype), 0, 2, return_convergence_delta=True)
        errors.append(float(delta.detach().abs().max()))
        # Sums of 40 products and of 10 multipliers, which are at most 1/4 in sum of either sign, forward and back.
        size = float((inputs.double() @ weights.double().abs().T).max())
        assert errors[-1] <= (40 + 10) * 4 * torch.finfo(dtype).eps * size
    assert errors[1] < 1e-4 * errors[0]


def test_draws_of_gradient_shap() -> None:
    """torch's seed decides all draws, and an example has its own; captum needs NumPy's seed, and has none of a batch's."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    inputs, starts = (torch.randn(number, 6, dtype=torch.float64) for number in (2, 3))
    theirs, ours = peers("GradientShap", model)

    def maps(of: Any, rows: int) -> Tensor:
        torch.manual_seed(1)
        found: Tensor = of.attribute(inputs[:rows], starts, n_samples=4, stdevs=0.1, target=1)
        return found.detach()

    assert torch.equal(maps(ours, 2), maps(ours, 2))
    assert difference(maps(ours, 2)[:1], maps(ours, 1)) < 1e-12
    assert difference(maps(theirs, 2), maps(theirs, 2)) > 0.001
    assert difference(maps(theirs, 2)[:1], maps(theirs, 1)) > 0.001


def test_layers_that_captum_cannot_integrate_to() -> None:
    """One whose output a ReLU overwrites in place; and one whose first dimension is time."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 7), nn.ReLU(inplace=True), nn.Linear(7, 4)).double()
    inputs = torch.randn(3, 6, dtype=torch.float64)
    theirs, ours = peers("LayerIntegratedGradients", model, model[0])
    with pytest.raises(RuntimeError, match="leaf Variable"):
        theirs.attribute(inputs, target=1)
    _, delta = ours.attribute(inputs, target=1, n_steps=400, method="riemann_middle", return_convergence_delta=True)
    with torch.no_grad():
        assert float(delta.abs().max()) < 0.01 * float((model(inputs) - model(inputs * 0))[:, 1].abs().max())


@pytest.mark.parametrize("name", ["GradientShap", "DeepLiftShap"])
@pytest.mark.parametrize(
    ("function", "got"),
    [(lambda inputs, more: inputs, "(inputs, more)"), (lambda *, inputs: inputs, "(*, inputs)")],
    ids=["two", "by name"],
)
def test_baselines_by_a_function_of_something_else(name: str, function: Any, got: str) -> None:
    network = NETWORKS["conv"]
    message = f"pysal.captum.{name}: baselines must be a function of the inputs or of nothing, got one of {got}"
    with pytest.raises(TypeError) as raised:
        getattr(pysal.captum, name)(network.model()).attribute(network.inputs(2), function, target=0)
    assert str(raised.value) == message


def test_baselines_by_a_function_with_defaults() -> None:
    network = NETWORKS["conv"]
    inputs = network.inputs(2)
    model = network.model()
    found = [
        pysal.captum.DeepLiftShap(model).attribute(inputs, one, target=0)
        for one in (lambda given, factor=0.0: given * factor, lambda: inputs * 0, inputs * 0)
    ]
    assert all(torch.equal(one, found[0]) for one in found)
