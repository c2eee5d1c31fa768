"""Every kind of class activation map from its paper's formula in loops, in float64, and what holds of all of them."""

import functools
import math
from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.linalg import svd
from torch import Tensor, nn

import pysal
from pysal.methods.cam_kinds import KINDS, KindName, grad_cam_plus_plus, kernel_projection, kind_of, projection, unit
from pysal.methods.traits import CAMS
from tests.methods.networks import Counting, assert_rounding, images, rectified, seeded, smooth

SIZE = (9, 7)
# sums over a map of 4 x 3 cells and 5 channels of products of at most eight factors
OPERATIONS = 8 * 60 * 8


def of_layer(model: nn.Module, inputs: Tensor, layer: int, target: int) -> tuple[Tensor, Tensor]:
    """Activation and gradient by plain autograd."""
    activations = model[: layer + 1](inputs).detach().requires_grad_()
    (gradients,) = torch.autograd.grad(model[layer + 1 :](activations)[:, target].sum(), activations)
    return activations.detach(), gradients


def half_the_curvature(model: nn.Module, a: Tensor, layer: int, target: int) -> Tensor:
    """H A / 2 of each image, from the whole second derivative."""
    found = []
    for one in a:
        hessian = torch.autograd.functional.hessian(lambda value: model[layer + 1 :](value[None])[0, target], one)
        size = one.numel()
        found.append((hessian.reshape(size, size) @ one.reshape(size)).reshape(one.shape) / 2)
    return torch.stack(found)


def cells(maps: Tensor) -> list[tuple[int, int]]:
    return [(u, v) for u in range(maps.shape[2]) for v in range(maps.shape[3])]


def channel_weights(name: str, a: Tensor, g: Tensor) -> Tensor:
    """w_k of one image, (K,), as the papers write them."""
    found = []
    for k in range(a.shape[1]):
        ak, gk = a[0, k].tolist(), g[0, k].tolist()
        at = cells(a)
        if name in ("grad_cam", "shapley_cam"):
            w = sum(gk[u][v] for u, v in at) / len(at)
        elif name == "grad_cam_plus_plus":  # equation 19, then equation 5 with relu
            whole, w = sum(ak[u][v] for u, v in at), 0.0
            for u, v in at:
                if gk[u][v]:
                    alpha = gk[u][v] ** 2 / (2 * gk[u][v] ** 2 + whole * gk[u][v] ** 3)
                    w += alpha * max(gk[u][v], 0)
        elif name == "xgrad_cam":
            whole = sum(ak[u][v] for u, v in at)
            w = sum(ak[u][v] / whole * gk[u][v] for u, v in at) if whole else 0.0
        else:
            mean = sum(ak[u][v] for u, v in at) / len(at)
            deviation = math.sqrt(sum((ak[u][v] - mean) ** 2 for u, v in at) / len(at))
            w = sum(ak[u][v] > mean + 2 * deviation for u, v in at) / len(at)
        found.append(w)
    return torch.tensor(found, dtype=torch.float64)


def cell_terms(name: str, a: Tensor, g: Tensor) -> Tensor:
    """What each channel says of each cell of one image, (1, K, h, w)."""
    rule: dict[str, Callable[[float, float], float]] = {
        "hirescam": lambda x, d: d * x,
        "layer_cam": lambda x, d: max(d, 0.0) * x,
        "grad_cam_elementwise": lambda x, d: max(d * x, 0.0),
        "eigen_cam": lambda x, d: x,
        "eigen_grad_cam": lambda x, d: d * x,
        "seg_eigen_cam": lambda x, d: abs(d) * x,
        "kpca_cam": lambda x, d: x,
    }
    pairs = zip(a.flatten().tolist(), g.flatten().tolist(), strict=True)
    return torch.tensor([rule[name](x, d) for x, d in pairs], dtype=torch.float64).reshape(a.shape)


def principal(terms: Tensor, *, centred: bool) -> np.ndarray:
    """M v by LAPACK's other driver, of one image; its sign is anybody's guess."""
    rows = terms[0].flatten(1).T.numpy()
    rows = rows - rows.mean(0) if centred else rows
    _, _, right = svd(rows, full_matrices=False, lapack_driver="gesvd")
    return rows @ right[0]


def kernel_principal(terms: Tensor) -> np.ndarray:
    """The first kernel principal component of one image by its definition: a feature space of pairwise products."""
    rows = terms[0].flatten(1).T.numpy()
    rows = rows - rows.mean(0)
    n = len(rows)
    gram = np.array([[math.tanh(float(r @ s) / rows.shape[1] + 1) for s in rows] for r in rows])
    ones = np.full((n, n), 1 / n)
    values, vectors = np.linalg.eigh(gram - ones @ gram - gram @ ones + ones @ gram @ ones)
    return vectors[:, -1] * math.sqrt(values[-1])


def by_hand(name: str, a: Tensor, g: Tensor) -> Tensor:
    """The map (B, 1, h, w) of a kind that needs no passes of its own."""
    maps = []
    for i in range(len(a)):
        one, slope = a[i : i + 1], g[i : i + 1]
        if name in ("grad_cam", "grad_cam_plus_plus", "xgrad_cam", "fem", "shapley_cam"):
            found = (channel_weights(name, one, slope)[:, None, None] * one[0]).sum(0)
        else:
            terms = cell_terms(name, one, slope)
            found = terms[0].sum(0)
            if name in ("eigen_cam", "eigen_grad_cam", "seg_eigen_cam", "kpca_cam"):
                line = kernel_principal(terms) if name == "kpca_cam" else principal(terms, centred=name != "eigen_cam")
                if name != "eigen_grad_cam":
                    positive = line[np.abs(line).argmax()] > 0
                else:
                    positive = float(line @ found.flatten().numpy()) > 0
                found = torch.from_numpy(line if positive else -line).reshape(found.shape)
        maps.append(found.clamp_min(0))
    return torch.stack(maps)[:, None]


def enlarged(maps: Tensor) -> Tensor:
    return F.interpolate(maps, SIZE, mode="bilinear", align_corners=False)


def explained(model: nn.Module, inputs: Tensor, target: Any, **options: Any) -> Any:
    return pysal.explain(model, inputs, target, methods=["grad_cam"], method_options={"grad_cam": options})["grad_cam"]


@pytest.mark.parametrize("layer", [1, 2, 3])
@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.passes == "none"])
def test_is_the_formula(name: str, layer: int) -> None:
    inputs, model = images(2, 3, *SIZE), rectified() if layer != 2 else smooth()
    a, g = of_layer(model, inputs, layer, 2)
    if name == "shapley_cam":
        g = g - half_the_curvature(model, a, layer, 2)
    native = by_hand(name, a, g)
    assert layer == 2 or float(native.max()) > 0

    found = explained(model, inputs, 2, layer=str(layer), kind=name)
    assert_rounding(found.details["native"], native, OPERATIONS)
    assert_rounding(found.map, enlarged(native), OPERATIONS)
    assert found.title == CAMS[name]
    assert found.details.get("cam", "grad_cam") == name
    assert torch.equal(pysal.grad_cam(model, inputs, 2, layer=model[layer], kind=name, batch_size=2), found.map)


def test_score_cam_is_algorithm_1() -> None:
    inputs, model = images(2, 3, *SIZE), rectified()
    a, _ = of_layer(model, inputs, 3, 1)
    maps = []
    for i in range(2):
        scores = []
        for k in range(a.shape[1]):
            mask = enlarged(a[i : i + 1, k : k + 1])
            spread = mask.max() - mask.min()
            mask = (mask - mask.min()) / spread if spread > 0 else torch.zeros_like(mask)
            black = model(torch.zeros_like(inputs[:1]))[0, 1]
            scores.append(model(inputs[i : i + 1] * mask)[0, 1] - black)
        weights = torch.stack(scores).exp()
        maps.append((weights / weights.sum())[:, None, None].mul(a[i]).sum(0).clamp_min(0))
    native = torch.stack(maps)[:, None].detach()
    found = explained(model, inputs, 1, layer="3", kind="score_cam")
    # the scores pass through the network, of some thousand roundings, before the softmax
    assert_rounding(found.details["native"], native, 2000)
    assert_rounding(found.map, enlarged(found.details["native"]), OPERATIONS)


@pytest.mark.parametrize("make", [rectified, smooth])
def test_ablation_cam_is_the_drop_without_each_channel(make: Callable[[], nn.Module]) -> None:
    inputs, model = images(2, 3, *SIZE), make()
    a, _ = of_layer(model, inputs, 2, 1)
    weights = torch.zeros(a.shape[:2], dtype=torch.float64)
    for k in range(a.shape[1]):
        without = a.clone()
        without[:, k] = 0
        weights[:, k] = (model[3:](a) - model[3:](without))[:, 1].detach()
    native = (weights[:, :, None, None] * a).sum(1, keepdim=True).clamp_min(0)
    assert_rounding(explained(model, inputs, 1, layer="2", kind="ablation_cam").details["native"], native, 4000)


def test_of_a_pooled_linear_head_the_kinds_are_the_same_split() -> None:
    # G_k is v_k / (h w) everywhere: Grad-CAM, HiResCAM, XGrad-CAM and Ablation-CAM's drops, v_k mean(A_k), follow from it
    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4)))
    inputs = images(2, 3, *SIZE)
    a, v = model[:2](inputs).detach(), model[4].weight.detach()
    split = torch.einsum("k,bkhw->bhw", v[1], a)[:, None].clamp_min(0) / 35
    for kind in ("grad_cam", "hirescam", "xgrad_cam"):
        assert_rounding(explained(model, inputs, 1, layer="1", kind=kind).details["native"], split, OPERATIONS)
    drops = (v[1] * a.mean((2, 3)))[:, :, None, None] * a
    found = explained(model, inputs, 1, layer="1", kind="ablation_cam").details["native"]
    assert_rounding(found, drops.sum(1, keepdim=True).clamp_min(0), 4000)


@pytest.mark.parametrize("name", ["hirescam", "layer_cam", "grad_cam_elementwise", "eigen_grad_cam", "seg_eigen_cam"])
def test_a_score_ten_times_as_large_has_the_same_map_in_tenfold(name: str) -> None:
    inputs, model = images(2, 3, *SIZE), rectified()
    once, ten = (pysal.grad_cam(model, inputs, lambda output, f=f: f * output[:, 1], layer="3", kind=name) for f in (1, 10))
    assert_rounding(ten, 10 * once, OPERATIONS)


def test_grad_cam_plus_plus_holds_for_the_smallest_gradients() -> None:
    # gradients whose squares are no float32 numbers: 1 / (2 + sum A G) is 1/2
    a, g = torch.rand(1, 2, 3, 3), torch.full((1, 2, 3, 3), 1e-30)
    assert torch.allclose(grad_cam_plus_plus(a, g), torch.tensor(9 * 0.5e-30), rtol=1e-6, atol=0)
    assert not torch.allclose(grad_cam_plus_plus(a, g, epsilon=1e-6), torch.tensor(9 * 0.5e-30), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["eigen_cam", "eigen_grad_cam", "seg_eigen_cam", "kpca_cam"])
def test_a_projection_has_a_sign_of_its_own(name: str) -> None:
    # the order of the channels, and which of them come first, mean nothing; LAPACK's sign turns with them
    kind = KINDS[name]
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        a, g = (torch.randn(1, 6, 4, 5, generator=generator, dtype=torch.float64) for _ in range(2))
        order = torch.randperm(6, generator=generator)
        here, there = kind.collapse(kind.terms(a, g)), kind.collapse(kind.terms(a[:, order], g[:, order]))
        assert torch.allclose(here, there, rtol=0, atol=1e-9)


def test_both_gram_matrices_give_the_same_projection() -> None:
    rows = torch.rand(1, 6, 3, 2, dtype=torch.float64)
    wide = torch.cat([rows, torch.zeros(1, 1, 3, 2, dtype=torch.float64)], 1)  # a seventh channel of nothing
    for centred in (True, False):
        assert torch.allclose(projection(rows, centred=centred), projection(wide, centred=centred), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kernel", ["linear", "cosine", "rbf", "poly"])
def test_kernels(kernel: Any) -> None:
    terms = images(1, 4, 3, 5)
    rows = terms[0].flatten(1).T.numpy()
    rows = rows - rows.mean(0)
    value = {
        "linear": lambda r, s: r @ s,
        "cosine": lambda r, s: r @ s / math.sqrt((r @ r) * (s @ s)),
        "rbf": lambda r, s: math.exp(-0.7 * ((r - s) ** 2).sum()),
        "poly": lambda r, s: (0.7 * (r @ s) + 1) ** 3,
    }[kernel]
    gram = np.array([[value(r, s) for s in rows] for r in rows])
    n = len(rows)
    keep = np.eye(n) - np.full((n, n), 1 / n)
    values, vectors = np.linalg.eigh(keep @ gram @ keep)
    line = vectors[:, -1] * math.sqrt(values[-1])
    line = line if line[np.abs(line).argmax()] > 0 else -line
    found = kernel_projection(terms, kernel=kernel, gamma=0.7)
    assert torch.allclose(found.flatten(), torch.from_numpy(line), rtol=0, atol=1e-9)


def test_eigen_smooth_is_the_first_principal_component_of_the_terms() -> None:
    inputs, model = images(2, 3, *SIZE), rectified()
    a, g = of_layer(model, inputs, 3, 2)
    for i in range(2):
        terms = cell_terms("layer_cam", a[i : i + 1], g[i : i + 1])
        line = principal(terms, centred=True)
        line = line if float(line @ terms[0].sum(0).flatten().numpy()) > 0 else -line
        found = explained(model, inputs, 2, layer="3", kind="layer_cam", eigen_smooth=True).details["native"][i, 0]
        assert torch.allclose(found.flatten(), torch.from_numpy(line).clamp_min(0), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("fuse", "join"), [("mean", Tensor.mean), ("max", Tensor.amax), ("product", Tensor.prod)])
@pytest.mark.parametrize("kind", ["layer_cam", "eigen_cam", "ablation_cam"])
def test_several_layers(kind: str, fuse: str, join: Callable[..., Tensor]) -> None:
    inputs, model = images(2, 3, *SIZE), rectified()
    each = [explained(model, inputs, 1, layer=layer, kind=kind).details["native"] for layer in ("1", "3")]
    scaled = [(one - one.amin((2, 3), True)) / (one.amax((2, 3), True) - one.amin((2, 3), True)) for one in each]
    found = explained(model, inputs, 1, layer=["1", model[3]], kind=kind, fuse=fuse)
    assert_rounding(found.map, join(torch.stack([enlarged(one) for one in scaled]), 0), OPERATIONS)
    assert found.details["layer"] == "1, 3"


def test_several_layers_take_one_pass() -> None:
    inputs, model = images(2, 3, *SIZE, dtype=torch.float32), Counting(rectified().float())
    pysal.grad_cam(model, inputs, 1, layer=["model.1", "model.3"], kind="layer_cam")
    assert model.passes == [2]


@pytest.mark.parametrize("batch_size", [None, 1, 5])
def test_augmented_copies_are_averaged(batch_size: int | None) -> None:
    inputs, model = images(2, 3, *SIZE), smooth()
    total = torch.zeros(2, 1, *SIZE, dtype=torch.float64)
    for factor in (0.9, 1.0, 1.1):
        for flip in (False, True):
            copy = (inputs.flip(3) if flip else inputs) * factor
            one = pysal.grad_cam(model, copy, 1, layer="2", kind="hirescam")
            one = (one - one.amin((2, 3), True)) / (one.amax((2, 3), True) - one.amin((2, 3), True))
            total += (one.flip(3) if flip else one) / 6
    found = pysal.grad_cam(model, inputs, 1, layer="2", kind="hirescam", augment=True, batch_size=batch_size)
    assert_rounding(found, total, 20 * OPERATIONS)


def test_augmented_copies_explain_the_class_of_the_image() -> None:
    # the model's highest class changes with the sign of what it sees; a copy of minus the image has the other one
    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 35, 2)))
    inputs = images(1, 3, *SIZE)
    negated = [(torch.neg, torch.clone)]
    found = pysal.grad_cam(model, inputs, layer="0", augment=negated)
    target = int(model(inputs).argmax())
    assert int(model(-inputs).argmax()) != target
    assert torch.equal(found, unit(pysal.grad_cam(model, -inputs, target, layer="0")))


def test_a_function_is_a_kind() -> None:
    inputs, model = images(2, 3, *SIZE), rectified()
    expected = pysal.grad_cam(model, inputs, 1, layer="3", kind="layer_cam")
    for kind in (
        lambda a, g: g.clamp_min(0) * a,
        lambda a, g: (g.clamp_min(0) * a).sum(1, keepdim=True),
        lambda a, g: (g.clamp_min(0) * a).sum(1),
    ):
        assert torch.equal(pysal.grad_cam(model, inputs, 1, layer="3", kind=kind), expected)
    by_weights = pysal.grad_cam(model, inputs, 1, layer="3", kind=lambda a, g: g.mean((2, 3)))
    assert_rounding(by_weights, pysal.grad_cam(model, inputs, 1, layer="3"), OPERATIONS)


class Tokens(nn.Module):
    """A class token and 3 x 4 patches, in rows (N, 13, 6); an in-place ReLU behind the layer; the score reads all rows."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.norm, self.act = nn.Conv2d(3, 6, 2, stride=2), nn.LayerNorm(6), nn.ReLU(inplace=True)
        self.token, self.head = nn.Parameter(torch.randn(1, 1, 6)), nn.Linear(13 * 6, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        rows = torch.cat([self.token.expand(len(inputs), -1, -1), self.patches(inputs).flatten(2).mT], 1)
        return self.head(self.act(self.norm(rows)).flatten(1))


@pytest.mark.parametrize("name", list(KINDS))
def test_of_tokens_before_an_activation_in_place(name: str) -> None:
    model, inputs = seeded(Tokens), images(2, 3, 6, 8)
    read = lambda rows: rows[:, 1:].mT.unflatten(2, (3, 4))  # noqa: E731
    rows = model.norm(torch.cat([model.token.expand(2, -1, -1), model.patches(inputs).flatten(2).mT], 1)).detach()
    if KINDS[name].passes == "none":
        leaf = rows.clone().requires_grad_()
        (slope,) = torch.autograd.grad(model.head(leaf.relu().flatten(1))[:, 1].sum(), leaf)
        native = by_hand(name, read(rows), read(slope))
    elif name == "ablation_cam":
        scores = []
        for k in range(6):
            without = rows.clone()
            without[:, 1:, k] = 0
            scores.append((model.head(rows.relu().flatten(1)) - model.head(without.relu().flatten(1)))[:, 1])
        native = (torch.stack(scores, 1)[:, :, None, None] * read(rows)).sum(1, keepdim=True).clamp_min(0).detach()
    else:
        native = explained(model, inputs, 1, layer="norm", kind=name).details["native"]
    found = explained(model, inputs, 1, layer="norm", tokens=read, kind=name)
    assert_rounding(found.details["native"], native, 4000)


class Twice(nn.Module):
    """One module, run twice, whose second run is not its first."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act, self.head = nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(inplace=True), nn.Linear(3, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.act(self.conv(self.act(self.conv(inputs)))).mean((2, 3)))


@pytest.mark.parametrize(("label", "run"), [("act@0", 0), ("act@1", 1), ("act@-1", 1)])
def test_ablation_of_one_run_of_a_module(label: str, run: int) -> None:
    model, inputs = seeded(Twice), images(2, 3, 6, 6)
    first = model.conv(inputs).relu().detach()
    second = model.conv(first).relu().detach()
    a = (first, second)[run]

    def scores(value: Tensor) -> Tensor:
        return model.head((model.conv(value).relu() if run == 0 else value).mean((2, 3)))[:, 2].detach()

    weights = torch.zeros(2, 3, dtype=torch.float64)
    for k in range(3):
        without = a.clone()
        without[:, k] = 0
        weights[:, k] = scores(a) - scores(without)
    native = (weights[:, :, None, None] * a).sum(1, keepdim=True).clamp_min(0)
    assert_rounding(explained(model, inputs, 2, layer=label, kind="ablation_cam").details["native"], native, 4000)


class Onward(nn.Module):
    """A layer, and what reads it, alone or with something from before it."""

    def __init__(self, reads: str) -> None:
        super().__init__()
        self.reads, self.stem, self.conv = reads, nn.Conv2d(3, 24, 3, padding=1), nn.Conv2d(24, 24, 3, padding=1)
        self.head = nn.Linear(24 * 9 if reads == "the first size" else 24, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        before = self.stem(inputs).relu()
        return self.read(self.conv(before).relu(), before)

    def read(self, value: Tensor, before: Tensor) -> Tensor:
        if self.reads == "the first size":
            return self.head(F.adaptive_avg_pool2d(value, 3).view(len(before), -1))
        if self.reads == "what was before":
            value = value + before
        elif self.reads == "a gate of the images":
            value = value * before.mean((1, 2, 3), keepdim=True)
        return self.head(value.mean((2, 3)))


@pytest.mark.parametrize("batch_size", [None, 1, 2, 3, 4])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("reads", ["it alone", "the first size", "what was before", "a gate of the images"])
def test_ablation_runs_what_comes_before_the_layer_where_it_must(reads: str, count: int, batch_size: int | None) -> None:
    model, inputs = seeded(lambda: Onward(reads)), images(count, 3, 7, 6)
    before = model.stem(inputs).relu().detach()
    a = model.conv(before).detach()
    weights = torch.zeros(count, 24, dtype=torch.float64)
    for k in range(24):
        without = a.clone()
        without[:, k] = 0
        weights[:, k] = (model.read(a.relu(), before) - model.read(without.relu(), before))[:, 1].detach()
    native = (weights[:, :, None, None] * a).sum(1, keepdim=True).clamp_min(0)
    rows = []
    model.stem.register_forward_hook(lambda _module, given, _output: rows.append(len(given[0])))
    options = {"grad_cam": {"layer": "conv", "kind": "ablation_cam"}}
    found = pysal.explain(model, inputs, 1, methods=["grad_cam"], method_options=options, batch_size=batch_size)
    assert_rounding(found["grad_cam"].details["native"], native, 4000)
    if batch_size is None and count == 3:
        assert (sum(rows) < 3 * 24) == (reads == "it alone")


@pytest.mark.parametrize("name", list(KINDS))
def test_no_trace_is_left(name: str) -> None:
    model, inputs = rectified(), images(2, 3, *SIZE)
    model[1].inplace = model[3].inplace = True
    before = {key: value.clone() for key, value in model.state_dict().items()}
    kept = inputs.clone()
    found = pysal.grad_cam(model, inputs, 1, layer="2", kind=name)
    plain = rectified()
    assert torch.equal(found, pysal.grad_cam(plain, inputs, 1, layer="2", kind=name))
    assert torch.equal(inputs, kept)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._backward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("name", list(KINDS))
@pytest.mark.parametrize("batch_size", [1, 3])
def test_does_not_depend_on_the_batch_size(name: str, batch_size: int) -> None:
    model, inputs = rectified(), images(3, 3, *SIZE)
    whole = pysal.grad_cam(model, inputs, [0, 1, 2], layer="3", kind=name)
    assert_rounding(pysal.grad_cam(model, inputs, [0, 1, 2], layer="3", kind=name, batch_size=batch_size), whole, 4000)


@pytest.mark.parametrize("name", list(KINDS))
def test_of_prepared_models_in_half_and_smoothed(name: str) -> None:
    model, inputs = rectified().float(), images(2, 3, 16, 16, dtype=torch.float32)
    expected = pysal.grad_cam(model, inputs, 1, layer="3", kind=name)
    prepared = pysal.prepare(model, inputs[:1])
    assert torch.allclose(pysal.grad_cam(prepared, inputs, 1, layer="3", kind=name), expected, rtol=1e-3, atol=1e-4)
    last = pysal.grad_cam(model, inputs.contiguous(memory_format=torch.channels_last), 1, layer="3", kind=name)
    assert torch.allclose(last, expected, rtol=1e-3, atol=1e-4)
    half = pysal.grad_cam(rectified().to(torch.bfloat16), inputs.to(torch.bfloat16), 1, layer="3", kind=name)
    assert half.dtype == torch.float32
    assert bool(half.isfinite().all())
    smoothed = pysal.smooth_grad(
        model, inputs, 1, base="grad_cam", method_options={"layer": "3", "kind": name}, samples=2, noise=0
    )
    assert torch.allclose(smoothed, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", list(KINDS))
def test_every_kind_of_target(name: str) -> None:
    model, inputs = rectified(), images(2, 3, *SIZE)
    call = functools.partial(pysal.grad_cam, model, inputs, layer="3", kind=name)
    expected = call([2, 2])
    assert torch.equal(call(2), expected)
    assert_rounding(call(lambda output: output[:, 2]), expected, OPERATIONS)
    assert_rounding(call(pysal.RowTarget(lambda output, images: output[:, 2])), expected, OPERATIONS)
    probabilities = call(2, score="softmax")
    assert_rounding(call(lambda output: output.softmax(1)[:, 2]), probabilities, 4000)


def test_what_needs_no_gradient_explains_what_has_none() -> None:
    class Decided(nn.Module):
        """Its answer is cut off from its layers."""

        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 3)

        def forward(self, inputs: Tensor) -> Tensor:
            with torch.no_grad():
                return self.head(self.conv(inputs).relu().mean((2, 3)))

    model, inputs = seeded(Decided), images(2, 3, *SIZE)
    for name, kind in KINDS.items():
        if kind.gradient:
            with pytest.raises(pysal.NotApplicable):
                pysal.grad_cam(model, inputs, 1, layer="conv", kind=name)
        else:
            assert float(pysal.grad_cam(model, inputs, 1, layer="conv", kind=name).max()) > 0


def test_the_tables_agree() -> None:
    assert list(KINDS) == list(CAMS) == list(get_args(KindName))
    assert all(kind_of("pysal.grad_cam", name) is kind for name, kind in KINDS.items())


NAMES = ", ".join(map(repr, KINDS))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"kind": "zebra"}, ValueError, f"kind must be a function or one of {NAMES}, got 'zebra'"),
        ({"kind": 3}, TypeError, f"kind must be a function or one of {NAMES}, got 3"),
        ({"fuse": "sum"}, ValueError, "fuse must be one of 'mean', 'max', 'product', got 'sum'"),
        ({"eigen_smooth": 1}, TypeError, "eigen_smooth must be True or False, got 1"),
        ({"layer": []}, ValueError, "layer must name at least one layer, got none"),
        ({"layer": ["3", 7]}, TypeError, "layer must be a module or its name, got 7"),
        (
            {"augment": "flip"},
            TypeError,
            "augment must be True, False or a list of pairs of functions (image -> image, map -> map), got 'flip'",
        ),
        (
            {"kind": lambda a, g: a[:, :2]},
            ValueError,
            "kind must return a tensor of shape (2, 5, 4, 3), (2, 5) or (2, 1, 4, 3), got shape (2, 2, 4, 3)",
        ),
        (
            {"augment": [(lambda images: images[:, :, 1:], torch.clone)]},
            ValueError,
            "augment must keep the shape (2, 3, 9, 7), got shape (2, 3, 8, 7)",
        ),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        pysal.grad_cam(rectified(), images(2, 3, *SIZE), 1, **{"layer": "3", **options})
    assert str(raised.value) == f"pysal.grad_cam: {message}"


def test_guided_grad_cam_is_of_one_layer() -> None:
    with pytest.raises(TypeError) as raised:
        pysal.guided_grad_cam(rectified(), images(2, 3, *SIZE), 1, layer=["1", "3"])  # type: ignore[arg-type]
    assert str(raised.value) == "pysal.guided_grad_cam: layer must be a module or its name, got ['1', '3']"
