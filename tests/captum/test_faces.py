"""What a program sees of the classes but for the numbers: signatures, errors, progress, and their place among captum's."""

import inspect
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import captum.attr
import pytest
import torch
from captum.metrics import infidelity, sensitivity_max
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import pysal.captum
from pysal.engine.request.plan import Plan
from tests.captum.networks import NETWORKS
from tests.captum.peer import IGNORED, difference, peers

pytestmark = [pytest.mark.filterwarnings(one) for one in IGNORED]

CLASSES = [
    "Saliency", "GuidedBackprop", "Deconvolution", "GuidedGradCam", "LayerGradCam", "IntegratedGradients", "NoiseTunnel",
    "Occlusion", "FeatureAblation", "InputXGradient", "DeepLift", "DeepLiftShap", "GradientShap", "LayerActivation",
    "LayerGradientXActivation", "LayerIntegratedGradients", "FeaturePermutation", "ShapleyValueSampling", "ShapleyValues",
    "Lime", "KernelShap",
]  # fmt: skip
MODEL, INPUTS = NETWORKS["conv"].model(), NETWORKS["conv"].inputs(2)
MASK = torch.arange(64).reshape(1, 1, 8, 8) // 16
VECTORS = NETWORKS["linear"].inputs(3)


def made(name: str) -> tuple[Any, Any]:
    """The two objects of a class."""
    if name == "NoiseTunnel":
        return captum.attr.NoiseTunnel(captum.attr.Saliency(MODEL)), pysal.captum.NoiseTunnel(pysal.captum.Saliency(MODEL))
    return peers(name, MODEL, MODEL[0]) if name.startswith("Layer") or name == "GuidedGradCam" else peers(name, MODEL)


def parameters(function: Callable[..., Any], kinds: set[Any]) -> list[tuple[str, Any, Any]]:
    found = inspect.signature(function).parameters.values()
    return [
        (one.name, getattr(one.default, "__name__", one.default), one.kind) for one in found if one.kind in kinds
    ]  # functions by their names


POSITIONAL = {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL}


@pytest.mark.parametrize("name", CLASSES)
def test_signatures(name: str) -> None:
    theirs, ours = getattr(captum.attr, name), getattr(pysal.captum, name)
    assert parameters(ours.__init__, POSITIONAL) == parameters(theirs.__init__, POSITIONAL)
    assert parameters(ours.attribute, POSITIONAL) == parameters(theirs.attribute, POSITIONAL)
    for method in ("compute_convergence_delta", "interpolate"):
        if callable(getattr(theirs, method, None)):
            assert parameters(getattr(ours, method), POSITIONAL) == parameters(getattr(theirs, method), POSITIONAL)
    # what is ours alone is keyword-only and has a default
    assert all(one[1] is not inspect.Parameter.empty for one in parameters(ours.__init__, {inspect.Parameter.KEYWORD_ONLY}))


@pytest.mark.parametrize("name", CLASSES)
def test_what_wrappers_ask(name: str) -> None:
    theirs, ours = made(name)
    assert isinstance(ours, captum.attr.Attribution)
    for base in (captum.attr.GradientAttribution, captum.attr.PerturbationAttribution, captum.attr.LayerAttribution):
        assert isinstance(ours, base) == isinstance(theirs, base)
    assert isinstance(ours, captum.attr.Attribution)
    assert ours.get_name() == theirs.get_name()
    assert ours.has_convergence_delta() == theirs.has_convergence_delta()
    assert ours.multiplies_by_inputs == theirs.multiplies_by_inputs
    assert ours.forward_func is theirs.forward_func
    assert callable(ours.attribute.__wrapped__)
    futures = ("FeatureAblation", "FeaturePermutation", "ShapleyValueSampling", "ShapleyValues", "Lime", "KernelShap")
    if name not in futures:
        for one in [theirs] * hasattr(theirs, "attribute_future") + [ours]:
            with pytest.raises(NotImplementedError):
                one.attribute_future()


def test_the_forward_function_is_read_by_each_call() -> None:
    for name in ("Saliency", "IntegratedGradients", "FeatureAblation"):
        theirs, ours = peers(name, lambda x: x.sum(1))
        for one in (theirs, ours):
            one.forward_func = lambda x: x.square().sum(1)
        assert difference(theirs.attribute(VECTORS), ours.attribute(VECTORS)) < 1e-6


BAD: dict[str, tuple[str, Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = {
    "target too large": ("Saliency", MODEL, (INPUTS, 5), {}),
    "no target": ("Saliency", MODEL, (INPUTS,), {}),
    "target of too many dimensions": ("Saliency", MODEL, (INPUTS, (1, 1)), {}),
    "too few targets": ("Saliency", MODEL, (INPUTS, [1]), {}),
    "a matrix of targets": ("Saliency", MODEL, (INPUTS, torch.zeros(2, 2).long()), {}),
    "floating target": ("Saliency", MODEL, (INPUTS, 1.5), {}),
    "strings as targets": ("Saliency", MODEL, (INPUTS, ["a", "b"]), {}),
    "targets of vectors": ("Saliency", lambda x: x.sum((1, 2, 3)), (INPUTS, [0, 0]), {}),
    "inputs no tensor": ("Saliency", MODEL, ([1.0],), {}),
    "whole numbers": ("Saliency", lambda x: x.sum(1).float(), (torch.ones(2, 3).long(),), {}),
    "nothing to differentiate": ("Saliency", lambda x: torch.ones(len(x)), (INPUTS,), {}),
    "scalar to differentiate": ("Saliency", lambda x: x.sum(), (INPUTS,), {}),
    "no module": ("GuidedBackprop", lambda x: x, (INPUTS,), {}),
    "method": ("IntegratedGradients", MODEL, (INPUTS, 0, 1), {"method": "simpson"}),
    "no steps": ("IntegratedGradients", MODEL, (INPUTS, 0, 1), {"n_steps": 0}),
    "negative steps": ("IntegratedGradients", MODEL, (INPUTS, 0, 1), {"n_steps": -1}),
    "one Riemann step": ("IntegratedGradients", MODEL, (INPUTS, 0, 1), {"n_steps": 1, "method": "riemann_left"}),
    "baselines no tensor": ("IntegratedGradients", MODEL, (INPUTS, "black", 1), {}),
    "two baselines for one input": ("IntegratedGradients", MODEL, (INPUTS, (0, 0), 1), {}),
    "baselines of another shape": ("IntegratedGradients", MODEL, (INPUTS, INPUTS[:, :, :4], 1), {}),
    "window as an int": ("Occlusion", MODEL, (INPUTS, (3,)), {"target": 1}),
    "window too large": ("Occlusion", MODEL, (INPUTS, (3, 9, 3)), {"target": 1}),
    "stride too large": ("Occlusion", MODEL, (INPUTS, (3, 3, 3), (1, 4, 1)), {"target": 1}),
    "too few strides": ("Occlusion", MODEL, (INPUTS, (3, 3, 3), (1, 1)), {"target": 1}),
    "two windows for one input": ("Occlusion", MODEL, (INPUTS, ((3, 3, 3), (3, 3, 3))), {"target": 1}),
    "no perturbation": ("FeatureAblation", MODEL, (INPUTS,), {"target": 1, "perturbations_per_eval": 0}),
    "one and a half perturbations": ("FeatureAblation", MODEL, (INPUTS,), {"target": 1, "perturbations_per_eval": 1.5}),
    "an output that does not grow": ("FeatureAblation", lambda x: x.sum(), (VECTORS,), {"perturbations_per_eval": 2}),
    "a string as output": ("FeatureAblation", lambda x: "yes", (VECTORS,), {}),
    "a future for attribute": ("FeatureAblation", lambda x: torch.futures.Future(), (VECTORS,), {}),
    "noise type": ("NoiseTunnel", MODEL, (INPUTS, "smooth"), {"target": 1}),
    "deviation as an int": ("NoiseTunnel", MODEL, (INPUTS,), {"target": 1, "stdevs": 1}),
    "too many deviations": ("NoiseTunnel", MODEL, (INPUTS,), {"target": 1, "stdevs": (0.1, 0.1)}),
    "a negative deviation": ("NoiseTunnel", MODEL, (INPUTS,), {"target": 1, "stdevs": -0.1}),
    "no baselines to draw": ("GradientShap", MODEL, (INPUTS, INPUTS[:0]), {"target": 1}),
    "a mask of another shape": ("ShapleyValues", MODEL, (INPUTS,), {"target": 1, "feature_mask": VECTORS.long()}),
    "an unknown argument": ("NoiseTunnel", MODEL, (INPUTS,), {"target": 1, "speed": 3}),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_errors_are_of_captums_type(case: str) -> None:
    name, model, arguments, options = BAD[case]

    def run(package: Any) -> None:
        method = package.NoiseTunnel(package.Saliency(model)) if name == "NoiseTunnel" else getattr(package, name)(model)
        method.attribute(*arguments, **options)

    raised = []
    for package in (captum.attr, pysal.captum):
        with pytest.raises(Exception) as error:
            run(package)
        raised.append(error.type)
    assert issubclass(raised[1], raised[0])


def test_a_future_is_asked_for() -> None:
    for package in (captum.attr, pysal.captum):
        with pytest.raises(AssertionError):
            package.FeatureAblation(lambda x: x.sum(1)).attribute_future(VECTORS)


def test_a_layer_that_does_not_run() -> None:
    for name in ("LayerGradCam", "GuidedGradCam"):
        for one in peers(name, MODEL, nn.ReLU()):
            with pytest.raises(AssertionError):
                one.attribute(INPUTS, 1)


def test_a_layer_behind_whole_numbers() -> None:
    """Token ids, which no float32 can carry, go to the model as they are."""

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(10, 4), nn.Linear(4, 5)

        def forward(self, tokens: Tensor, weights: Tensor) -> Tensor:
            assert tokens.dtype == torch.int64
            assert weights.dtype == torch.float32
            return self.head((self.embedding(tokens - 2**40) * weights[..., None]).sum(1).tanh())

    model = Tokens().eval()
    inputs = (2**40 + torch.arange(12).reshape(2, 6) % 10, torch.rand(2, 6))
    theirs, ours = (one.attribute(inputs, 3) for one in peers("LayerGradCam", model, model.embedding))
    assert difference(theirs, ours) < 1e-6


def test_a_layer_that_the_inputs_do_not_reach() -> None:
    """It is on the way of a further argument, and nothing there requires gradients of its own."""

    class Asked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.side = nn.Linear(4, 5)

        def forward(self, images: Tensor, question: Tensor) -> Tensor:
            return images.mean((1, 2, 3))[:, None] * self.side(question).relu()

    model, question = Asked().double().eval().requires_grad_(False), torch.rand(2, 4, dtype=torch.float64)
    for at_input in (False, True):
        found = []
        for one in peers("LayerGradCam", model, model.side):
            found.append(one.attribute(INPUTS.detach(), 3, question.clone(), attribute_to_layer_input=at_input))
        assert difference(*found) < 1e-12
    shared = question[:1].expand(7, 4)[:3, :]  # no row for each example, so it is handed on as it is
    model.forward = lambda images, rows: images.mean((1, 2, 3))[:, None] * model.side(rows).relu().sum(0)  # type: ignore[method-assign]
    pysal.captum.LayerGradCam(model, model.side).attribute(INPUTS.detach(), 3, shared, attribute_to_layer_input=True)
    assert not shared.requires_grad


def test_a_layer_of_two_tensors() -> None:
    class Two(nn.Module):
        def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
            return images[:, :2].sin(), images[:, 1:].cos()

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.two = Two()

        def forward(self, images: Tensor) -> Tensor:
            first, second = self.two(images)
            return (first * second).relu().flatten(1)

    model = Model().eval()
    theirs, ours = (one.attribute(INPUTS, 3) for one in peers("LayerGradCam", model, model.two))
    assert len(ours) == 2
    assert difference(theirs, ours) < 1e-12
    for one in peers("GuidedGradCam", model, model.two):
        with pytest.raises(AssertionError):
            one.attribute(INPUTS, 3)


def test_a_layer_that_runs_twice() -> None:
    """Its last run counts."""
    act = nn.ReLU()
    model = nn.Sequential(nn.Conv2d(3, 3, 3), act, nn.Conv2d(3, 3, 3), act, nn.Flatten(), nn.Linear(48, 5)).double().eval()
    for at_input in (False, True):
        theirs, ours = (one.attribute(INPUTS, 3, None, at_input) for one in peers("LayerGradCam", model, act))
        assert difference(theirs, ours) < 1e-12


@pytest.mark.parametrize("together", [1, 4])
def test_progress(together: int, capfd: pytest.CaptureFixture[str]) -> None:
    mask = torch.arange(192).reshape(1, 3, 8, 8) // 8
    for choices in ({"feature_mask": mask}, {"feature_mask": mask[:, :1] // 4}):
        shown = []
        for one in peers("FeatureAblation", MODEL):
            one.attribute(INPUTS, target=1, perturbations_per_eval=together, show_progress=True, **choices)
            shown.append(capfd.readouterr().err.strip().split("\r")[-1].split("[")[0])
        assert shown[0] == shown[1]
        assert "Feature Ablation attribution: 100%" in shown[1]
    pysal.captum.Occlusion(MODEL).attribute(INPUTS, (3, 4, 4), (1, 2, 2), target=1, show_progress=True)
    assert "Occlusion attribution: 100%" in capfd.readouterr().err
    pysal.captum.Occlusion(MODEL).attribute(INPUTS, (3, 4, 4), (1, 2, 2), target=1)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_caps_are_caps(size: int, small: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    if not small:  # a batch that is worth cutting
        monkeypatch.setattr("pysal.captum._call.PHOTO_BYTES", INPUTS[0].nbytes)

    def forward(images: Tensor) -> Tensor:
        seen.append(len(images))
        return MODEL(images)

    pysal.captum.IntegratedGradients(forward).attribute(INPUTS, target=1, n_steps=7, internal_batch_size=size)
    # whole batches; parts of those that are worth it, where two rows in one pass, without gradients, say the same as each alone
    assert max(seen) == max(size - size % len(INPUTS), len(INPUTS))
    assert size > 1 or seen.count(len(INPUTS)) == (7 if small else 1)
    seen.clear()
    mask = torch.arange(64).reshape(1, 1, 8, 8) // 8
    for given in (mask, mask.expand(1, 3, 8, 8) + torch.tensor([0, 1, 2]).reshape(1, 3, 1, 1)):
        pysal.captum.FeatureAblation(forward).attribute(INPUTS, target=1, feature_mask=given, perturbations_per_eval=size)
        assert max(seen) == size * len(INPUTS)
    seen.clear()
    noise = pysal.captum.NoiseTunnel(pysal.captum.Saliency(forward))
    noise.attribute(INPUTS, nt_samples=5, nt_samples_batch_size=size, target=1)
    assert max(seen) <= size * len(INPUTS)


def test_noisy_rows_of_a_model_in_training_mode_stay_together() -> None:
    seen: list[int] = []
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 5)).double().train()
    model.register_forward_pre_hook(lambda _module, args: seen.append(len(args[0])))
    pysal.captum.NoiseTunnel(pysal.captum.Saliency(model)).attribute(INPUTS, nt_samples=9, target=1)
    assert set(seen) == {9 * len(INPUTS)}


def test_nothing_is_left_behind() -> None:
    inputs, state = INPUTS.detach().clone(), torch.get_rng_state()
    before = {name: value.clone() for name, value in MODEL.state_dict().items()}
    for name in CLASSES:
        if name in ("NoiseTunnel", "ShapleyValueSampling", "ShapleyValues", "Lime", "KernelShap", "FeaturePermutation"):
            continue  # which draw what captum draws
        ours = made(name)[1]
        options = {"Occlusion": {"sliding_window_shapes": (3, 4, 4)}, "GradientShap": {"baselines": inputs * 0}}
        options |= {"DeepLiftShap": {"baselines": torch.zeros_like(inputs)}}
        with torch.random.fork_rng():  # of which GradientShap takes its seed
            ours.attribute(inputs, **options.get(name, {}), **({} if name == "LayerActivation" else {"target": 1}))
    assert torch.equal(inputs, INPUTS)
    assert not inputs.requires_grad
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], value) for name, value in MODEL.state_dict().items())
    assert all(one.grad is None for one in MODEL.parameters())
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in MODEL.modules())


METRICS: dict[str, dict[str, Any]] = {
    "Saliency": {},
    "IntegratedGradients": {"n_steps": 6},
    "GuidedBackprop": {},
    "FeatureAblation": {"feature_mask": torch.arange(64).reshape(1, 1, 8, 8) // 16},
}


@pytest.mark.parametrize("name", METRICS)
def test_captums_metrics(name: str) -> None:
    def perturb(images: Tensor) -> tuple[Tensor, Tensor]:
        noise = torch.randn_like(images) * 0.01
        return noise, images - noise

    found = []
    for one in peers(name, MODEL):
        torch.manual_seed(0)
        sensitivity = sensitivity_max(one.attribute, INPUTS, target=1, **METRICS[name])
        found.append(
            (sensitivity, infidelity(MODEL, perturb, INPUTS, one.attribute(INPUTS, target=1, **METRICS[name]), target=1))
        )
    assert difference(*found) < 1e-6


@pytest.mark.parametrize("together", [1, 2])
def test_captums_data_loader_attribution(together: int) -> None:
    data = TensorDataset(torch.arange(60.0).reshape(20, 3), torch.arange(40.0).reshape(20, 2))
    weight = torch.tensor([1.0, 2.0, 3.0])
    found = []
    for one in peers("FeatureAblation", lambda x, y: x @ weight + y.prod(1)):
        loader = DataLoader(data, batch_size=7)
        found.append(captum.attr.DataLoaderAttribution(one).attribute(loader, perturbations_per_pass=together))
    assert difference(*found) < 1e-6


WITHOUT = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "captum":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocked())
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "captum" else find(name, package)
import pysal.captum
assert "torch" not in sys.modules
import torch
from pysal.captum import FeatureAblation, IntegratedGradients, LayerAttribution, LayerGradCam, NoiseTunnel, Occlusion, Saliency
assert not any(name.split(".")[0] == "captum" for name in sys.modules)
x = torch.rand(2, 3, 8, 8)
conv = torch.nn.Conv2d(3, 4, 3)
model = torch.nn.Sequential(conv, torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(144, 5)).eval()
assert Saliency(model).attribute(x, 1).shape == x.shape
assert NoiseTunnel(IntegratedGradients(model)).attribute(x, target=1, return_convergence_delta=True)[1].shape == (10,)
assert Occlusion(model).attribute(x, (3, 4, 4), target=1).shape == x.shape
assert FeatureAblation(model).get_name() == "Feature Ablation"
assert LayerAttribution.interpolate(LayerGradCam(model, conv).attribute(x, 1), (8, 8)).shape == (2, 1, 8, 8)
"""


def test_prepared_models() -> None:
    """What `pysal.prepare` makes goes where the model went."""
    model, images = NETWORKS["conv"].model(torch.float32), NETWORKS["conv"].inputs(2, torch.float32)
    prepared = pysal.prepare(model, images)
    assert prepared.fused
    calls: dict[str, dict[str, Any]] = {
        "Saliency": {}, "GuidedBackprop": {}, "Deconvolution": {}, "IntegratedGradients": {"n_steps": 4}, "LayerGradCam": {},
        "GuidedGradCam": {}, "Occlusion": {"sliding_window_shapes": (3, 4, 4)}, "FeatureAblation": {"feature_mask": MASK},
    }  # fmt: skip
    for name, options in calls.items():
        layer = (model[0],) if "GradCam" in name else ()
        expected, found = (
            getattr(pysal.captum, name)(one, *layer).attribute(images, target=3, **options) for one in (model, prepared)
        )
        assert difference(expected, found) < 1e-4, name


@pytest.mark.parametrize("name", ["Occlusion", "FeatureAblation"])
@pytest.mark.parametrize("at_once", [1, 3])
def test_a_prepared_model_chooses_how_many_features_run_together(
    name: str, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where captum's default asks for one: what comes out is the same."""
    model, images = NETWORKS["conv"].model(torch.float32), NETWORKS["conv"].inputs(1, torch.float32)
    prepared = pysal.prepare(model, images, batch_size=16)
    windows = {"sliding_window_shapes": (3, 2, 2), "strides": (3, 2, 2)}
    options = windows if name == "Occlusion" else {"feature_mask": torch.arange(64).reshape(1, 1, 8, 8) // 4}
    expected = getattr(pysal.captum, name)(model).attribute(images, target=1, **options)
    passes: list[int] = []
    scores = Plan.scores

    def counted(plan: Plan, batch: Tensor, *rest: Any) -> tuple[Tensor, Tensor | None]:
        passes.append(len(batch))
        return scores(plan, batch, *rest)

    monkeypatch.setattr(Plan, "scores", counted)
    found = getattr(pysal.captum, name)(prepared).attribute(images, target=1, perturbations_per_eval=at_once, **options)
    assert difference(expected, found) < 1e-4
    assert sum(passes) == 16
    assert (max(passes) > 3) == (at_once == 1)


def test_a_layer_of_a_prepared_model_is_found_in_its_recorded_pass() -> None:
    model, images = NETWORKS["conv"].model(torch.float32), NETWORKS["conv"].inputs(2, torch.float32)
    prepared, layer = pysal.prepare(model, images), model[0]
    expected = (
        pysal.captum.LayerGradCam(model, layer).attribute(images, 3),
        pysal.captum.GuidedGradCam(model, layer).attribute(images, 3),
    )
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model itself was run"))
    prepared._state = None  # which would see the hook
    found = (
        pysal.captum.LayerGradCam(prepared, layer).attribute(images, 3),
        pysal.captum.GuidedGradCam(prepared, layer).attribute(images, 3),
    )
    assert max(difference(one, other) for one, other in zip(expected, found, strict=True)) < 1e-4
    with pytest.raises(IndexError, match="99"):
        pysal.captum.LayerGradCam(prepared, layer).attribute(images, 99)


def test_captum_need_not_be_installed() -> None:
    subprocess.run([sys.executable, "-W", "ignore", "-c", WITHOUT], check=True, timeout=600)


class Speller(nn.Module):
    """A language model of letters, as captum's wrappers call one."""

    def __init__(self) -> None:
        super().__init__()
        self.letters, self.head, self.device = nn.Embedding(30, 8), nn.Linear(8, 30), torch.device("cpu")

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> Any:
        return SimpleNamespace(logits=self.head(self.letters(input_ids).cumsum(1).tanh()))


class Letters:
    """Its tokenizer."""

    sep_token = pad_token_id = None

    def encode(self, text: str, add_special_tokens: bool = True, return_tensors: str | None = None) -> Any:
        ids = [ord(letter) - 97 for letter in text]
        return torch.tensor([ids]) if return_tensors else ids

    def __call__(self, text: str, add_special_tokens: bool = True, return_offsets_mapping: bool = False) -> Any:
        return {"input_ids": self.encode(text), "offset_mapping": [(i, i + 1) for i in range(len(text))]}

    def decode(self, ids: Any, **_: Any) -> str:
        return "".join(chr(97 + int(one)) for one in torch.as_tensor(ids).reshape(-1))

    def convert_ids_to_tokens(self, ids: Any) -> Any:
        several = isinstance(ids, list) or (isinstance(ids, Tensor) and ids.ndim)
        return [chr(97 + int(one)) for one in ids] if several else chr(97 + int(ids))

    def convert_tokens_to_ids(self, token: Any) -> Any:
        return [ord(one) - 97 for one in token]


@pytest.mark.parametrize(
    "name",
    ["FeatureAblation", "ShapleyValueSampling", "ShapleyValues", "Lime", "KernelShap", "LayerIntegratedGradients",
     "LayerGradientXActivation"],
)  # fmt: skip
def test_captums_wrappers_of_language_models(name: str) -> None:
    torch.manual_seed(0)
    model, letters = Speller().eval(), Letters()
    found = []
    for one in peers(name, model, *([model.letters] if name.startswith("Layer") else [])):
        torch.manual_seed(0)
        if not name.startswith("Layer"):
            asked = captum.attr.TextTemplateInput("{}likes{}", ["ab", "cd"])
            answer = captum.attr.LLMAttribution(one, letters).attribute(asked, target="xyz", use_cached_outputs=False)
        else:
            asked = captum.attr.TextTokenInput("ablikes", letters)
            answer = captum.attr.LLMGradientAttribution(one, letters).attribute(asked, target="xyz")
        found.append((answer.seq_attr, *([] if answer.token_attr is None else [answer.token_attr])))
    assert difference(*found) < (1e-3 if name == "Lime" else 1e-4)


def test_what_a_guided_grad_cam_is_made_of() -> None:
    for one in peers("GuidedGradCam", MODEL, MODEL[3]):
        cam, guided = one.grad_cam.attribute(INPUTS, 1, relu_attributions=True), one.guided_backprop.attribute(INPUTS, 1)
        product = guided * one.grad_cam.interpolate(cam, (8, 8))
        assert difference(product.detach(), one.attribute(INPUTS, 1)) < 1e-12


def test_arguments_that_nobody_looks_at() -> None:
    theirs, ours = peers("FeatureAblation", MODEL)
    expected = theirs.attribute(INPUTS, target=1, feature_mask=MASK, speed=3)
    with pytest.warns(UserWarning, match="FeatureAblation: attribute has no arguments speed: they change nothing"):
        found = ours.attribute(INPUTS, target=1, feature_mask=MASK, speed=3)
    assert difference(expected, found) < 1e-12


def test_captums_concepts_take_a_method_of_a_layer() -> None:
    """TCAV sets the layer after the method is made."""
    ours = pysal.captum.LayerGradientXActivation(MODEL, None, multiply_by_inputs=False)  # type: ignore[arg-type]
    theirs = captum.attr.LayerGradientXActivation(MODEL, None, multiply_by_inputs=False)
    found = []
    for one in (theirs, ours):
        one.layer = MODEL[3]
        found.append(
            one.attribute.__wrapped__(one, INPUTS, target=1, additional_forward_args=None, attribute_to_layer_input=False)
        )
    assert difference(*found) < 1e-12
