"""The same calls of captum and of pysal.captum, side by side: float64 agreement to 1e-9 wherever captum is right."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.captum.networks import NETWORKS
from tests.captum.peer import IGNORED, agree, both, difference, peers

pytestmark = [pytest.mark.filterwarnings(one) for one in IGNORED]

EXACT = 1e-9  # of the largest value, float64
SINGLE = 2 * torch.finfo(torch.float32).eps  # what captum rounds to float32, rounded twice
ALL = list(NETWORKS)
IMAGES = [name for name, one in NETWORKS.items() if len(one.shapes) == 1 and len(one.shapes[0]) == 3]
Combinations = Callable[..., list[tuple[Any, ...]]]
ROWS = (1, 3, 11)  # below, at and beyond one chunk of the queue


def asked(name: str, rows: int, dtype: torch.dtype = torch.float64) -> list[tuple[Any, Any, dict[str, Any]]]:
    """(model, inputs, arguments) of every target of a network."""
    network = NETWORKS[name]
    further = network.further(rows)
    further = further.to(dtype) if isinstance(further, Tensor) else further
    options = {} if further is None else {"additional_forward_args": further}
    model, inputs = network.model(dtype), network.inputs(rows, dtype)
    return [(model, inputs, {"target": target, **options}) for target in network.targets(rows)]


@pytest.mark.parametrize("name", ALL)
def test_saliency(name: str, combinations: Combinations) -> None:
    for rows, number, absolute in combinations(ROWS, range(len(asked(name, 1))), (True, False)):
        model, inputs, options = asked(name, rows)[number]
        both("Saliency", peers("Saliency", model), EXACT, inputs, abs=absolute, **options)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", [name for name in ALL if NETWORKS[name].relu_modules])
@pytest.mark.parametrize("method", ["GuidedBackprop", "Deconvolution"])
def test_guided_backprop(method: str, name: str, rows: int) -> None:
    for model, inputs, options in asked(name, rows):
        both(method, peers(method, model), EXACT, inputs, **options)


@pytest.mark.parametrize("name", ALL)
def test_integrated_gradients(name: str, combinations: Combinations) -> None:
    """With captum's own nodes and weights the rest of the computation is the same to rounding."""
    methods = ["gausslegendre", "riemann_left", "riemann_right", "riemann_middle", "riemann_trapezoid"]
    axes = (asked(name, 3), methods, ((7, None), (12, 9), (5, 3)), (True, False))
    for (model, inputs, options), method, (steps, size), local in combinations(*axes):
        pair = peers("IntegratedGradients", model, local, exact_captum=True)
        choices: dict[str, Any] = {"n_steps": steps, "method": method, "internal_batch_size": size, **options}
        both("IntegratedGradients", pair, EXACT, inputs, return_convergence_delta=True, **choices)


@pytest.mark.parametrize("name", ["conv", "linear", "two_inputs", "one_feature"])
def test_integrated_gradients_from_baselines(name: str) -> None:
    model, inputs, options = asked(name, 3)[4]
    several = inputs if isinstance(inputs, tuple) else (inputs,)
    kinds: list[Any] = [
        None,
        tuple(0.5 for _ in several),
        tuple(one[:1] for one in several),
        tuple(one.flip(0) for one in several),
    ]
    for baselines in kinds + ([1, several[0][:1]] if len(several) == 1 else []):
        both("IntegratedGradients", peers("IntegratedGradients", model, exact_captum=True), EXACT, inputs, baselines, **options)


@pytest.mark.parametrize("name", ALL)
def test_integrated_gradients_as_it_is(name: str) -> None:
    """Float64 weights differ from captum's float32 ones by their rounding."""
    for model, inputs, options in asked(name, 3):
        for method in ("gausslegendre", "riemann_left", "riemann_right", "riemann_middle"):
            pair = peers("IntegratedGradients", model)
            both("IntegratedGradients float64", pair, 4e-7, inputs, n_steps=8, method=method, **options)


@pytest.mark.parametrize("name", ALL)
def test_layer_grad_cam(name: str, combinations: Combinations) -> None:
    switch = (False, True)
    axes = (asked(name, 3), NETWORKS[name].layers, switch, switch, switch)
    for (model, inputs, options), layer, at_input, relu, add_up in combinations(*axes):
        pair = peers("LayerGradCam", model, model.get_submodule(layer))
        choices = {"relu_attributions": relu, "attr_dim_summation": add_up, "attribute_to_layer_input": at_input}
        both("LayerGradCam", pair, EXACT, inputs, **choices, **options)


@pytest.mark.parametrize("name", [name for name in IMAGES if NETWORKS[name].relu_modules])
def test_guided_grad_cam(name: str, combinations: Combinations) -> None:
    axes = (asked(name, 3), NETWORKS[name].layers, ("nearest", "bilinear"))
    for (model, inputs, options), layer, mode in combinations(*axes):
        pair = peers("GuidedGradCam", model, model.get_submodule(layer))
        both("GuidedGradCam", pair, EXACT, inputs, interpolate_mode=mode, **options)


@pytest.mark.parametrize("mode", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(9, 5), 7])
def test_interpolate(mode: str, size: Any) -> None:
    theirs, ours = peers("LayerAttribution", torch.nn.ReLU(), torch.nn.ReLU())
    cam = NETWORKS["conv"].inputs(2)
    assert torch.equal(ours.interpolate(cam, size, mode), theirs.interpolate(cam, size, mode))


@pytest.mark.parametrize("together", [1, 4, 100])
@pytest.mark.parametrize("name", ALL)
def test_feature_ablation(name: str, together: int) -> None:
    for model, inputs, options in asked(name, 2)[-3:]:
        pair = peers("FeatureAblation", model)
        both("FeatureAblation", pair, EXACT, inputs, perturbations_per_eval=together, **options)


@pytest.mark.parametrize("together", [1, 3])
@pytest.mark.parametrize("name", IMAGES)
def test_feature_ablation_of_segments(name: str, together: int) -> None:
    model, inputs, options = asked(name, 3)[4]
    image = inputs[:1, :1]
    blocks = (torch.arange(image.numel()).reshape(image.shape) // 7) * 5 - 10
    own = torch.stack([blocks[0], blocks[0].flip(1), blocks[0] * 0])  # a mask for each image
    channels = torch.cat([blocks, blocks + 1, blocks], 1)  # a feature of two channels, another of one
    for mask in (blocks, blocks[0], blocks[0, 0], own, channels, blocks.expand(1, 3, -1, -1)):
        if mask.ndim < 4 and together > 1:
            continue  # captum broadcasts such a mask along the wrong dimension
        for baselines in (None, 0.5, inputs.mean(0, keepdim=True), inputs.flip(0)):
            choices = {"feature_mask": mask, "baselines": baselines, "perturbations_per_eval": together}
            both("FeatureAblation", peers("FeatureAblation", model), EXACT, inputs, **choices, **options)


@pytest.mark.parametrize("together", [1, 5])
def test_features_across_inputs(together: int) -> None:
    model, inputs, options = asked("two_inputs", 3)[4]
    masks = (torch.arange(50).reshape(1, 2, 5, 5) // 13, torch.tensor([[2, 3, 9, 9]]))
    choices = {"feature_mask": masks, "baselines": (0.5, inputs[1][:1]), "perturbations_per_eval": together}
    both("FeatureAblation", peers("FeatureAblation", model), EXACT, inputs, **choices, **options)


def answers(inputs: Tensor) -> dict[str, Any]:
    """Forward functions of every kind of output for inputs (B, 4)."""
    return {
        "number": lambda x: float(x.sum()),
        "whole number": lambda x: int(x.sum()),
        "scalar": lambda x: x.square().sum(),
        "one for the batch": lambda x: x.square().sum().reshape(1),
        "per row": lambda x: x.square().sum(1),
        "several per row": lambda x: x[:, :3].square(),
        "a table per row": lambda x: x[:, :3, None] * x[:, None, 1:],
        "whole numbers": lambda x: x.long().sum(1),
    }


@pytest.mark.parametrize("kind", list(answers(torch.zeros(1))))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.int64, torch.bool], ids=str)
def test_ablation_of_any_output(kind: str, dtype: torch.dtype) -> None:
    inputs = (NETWORKS["linear"].inputs(3)[:, :4] * 3).to(dtype)
    forward = answers(inputs)[kind] if dtype == torch.float64 else lambda x: answers(x)[kind](x.double())
    for baselines in (None, 1, 0.5) if dtype != torch.bool else (None, True):
        both("FeatureAblation", peers("FeatureAblation", forward), EXACT, inputs, baselines)
        if dtype != torch.bool:
            both("Occlusion", peers("Occlusion", forward), SINGLE, inputs, (2,), baselines=baselines)


def test_ablation_of_sparse_inputs() -> None:
    """Indices into an embedding, whose number of rows is not the batch's."""
    table = torch.linspace(-1, 1, 20, dtype=torch.float64).reshape(10, 2)

    def forward(dense: Tensor, indices: Tensor, offsets: Tensor) -> Tensor:
        return dense.sum(1) * torch.nn.functional.embedding_bag(indices, table, offsets, mode="sum").sum(1)

    inputs = (NETWORKS["linear"].inputs(2)[:, :3], torch.tensor([1, 7, 2, 4, 5]))
    offsets = torch.tensor([0, 3])
    both("FeatureAblation", peers("FeatureAblation", forward), EXACT, inputs, (0, 9), additional_forward_args=offsets)


@pytest.mark.parametrize("together", [1, 4])
def test_ablation_of_empty_inputs(together: int) -> None:
    inputs = (NETWORKS["linear"].inputs(2), torch.zeros(2, 0, dtype=torch.float64))
    pair = peers("FeatureAblation", lambda x, y: x.square().sum(1) + y.sum(1))
    both("FeatureAblation", pair, EXACT, inputs, perturbations_per_eval=together)
    both("FeatureAblation", pair, EXACT, inputs, feature_mask=(torch.tensor([[0, 0, 1, 1, 2, 2]]), torch.zeros(1, 0).long()))


@pytest.mark.filterwarnings("ignore:.*at least one input tensor with 0th dim less than 2")
@pytest.mark.parametrize("name", ["FeatureAblation", "FeaturePermutation"])
def test_an_empty_list_beside_a_table(name: str) -> None:
    """One number for all, of a table and a list of whole numbers that has no entry for each of its rows."""

    def forward(table: Tensor, entries: Tensor) -> Tensor:
        return table.prod(0).sum() + entries.sum()

    table = torch.tensor([[1.0, -2.0, 3.0], [2.0, -1.0, 3.0]])
    both(name, peers(name, forward), SINGLE, (table, torch.tensor([])))


@pytest.mark.parametrize("rng", ["philox", "captum"])
@pytest.mark.parametrize("columns", [None, 0])
def test_noise_on_rows_without_columns(columns: int | None, rng: str) -> None:
    """(B,) is a number for each example; (B, 0) is nothing at all beside it."""
    numbers = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    inputs = numbers if columns is None else (numbers, numbers.new_zeros(3, columns))
    theirs, ours = peers("Saliency", lambda one, other=None: one.pow(3) + (0 if other is None else other.sum(1)))
    pair = (peers("NoiseTunnel", theirs)[0], peers("NoiseTunnel", ours, rng=rng)[1])
    both("NoiseTunnel", pair, EXACT, inputs, nt_samples=4, stdevs=0.0)


@pytest.mark.parametrize("together", [1, 3])
def test_ablation_of_futures(together: int) -> None:
    model, inputs, options = asked("conv", 2)[4]

    def forward(images: Tensor) -> torch.futures.Future[Tensor]:
        future: torch.futures.Future[Tensor] = torch.futures.Future()
        future.set_result(model(images))
        return future

    mask = torch.arange(192).reshape(1, 3, 8, 8) // 9
    theirs, ours = peers("FeatureAblation", forward)
    choices = {"feature_mask": mask, "perturbations_per_eval": together, **options}
    agree(
        "FeatureAblation",
        theirs.attribute_future(inputs, **choices).wait(),
        ours.attribute_future(inputs, **choices).wait(),
        EXACT,
    )


OCCLUSIONS: dict[str, list[tuple[Any, Any]]] = {
    "conv": [
        ((3, 3, 3), None), ((3, 3, 2), (1, 2, 2)), ((1, 4, 8), (1, 3, 50)), ((2, 2, 2), (1, 2, 2)), ((3, 3, 3), 3),
        ((3, 8, 8), (7, 9, 9)),
    ],
    "residual": [((3, 2, 4), (3, 2, 3))],
    "linear": [((2,), None), ((4,), 3), ((6,), (9,))],
    "sequence": [((1, 3), (1, 2)), ((2, 2), 2)],
    "volume": [((1, 2, 2, 2), (1, 1, 2, 1)), ((1, 3, 3, 1), 1)],
    "places": [((3,), ((2,),))],
    "two_inputs": [(((2, 3, 2), (2,)), ((1, 2, 2), 1)), (((1, 2, 2), (4,)), None)],
}  # fmt: skip


@pytest.mark.parametrize("together", [1, 3, 100])
@pytest.mark.parametrize("name", OCCLUSIONS)
def test_occlusion(name: str, together: int) -> None:
    """captum rounds these to float32, whatever the output."""
    for windows, strides in OCCLUSIONS[name]:
        for model, inputs, options in asked(name, 2)[-2:]:
            for baselines in (None, inputs if isinstance(inputs, tuple) else 0.25):
                choices = {"strides": strides, "baselines": baselines, "perturbations_per_eval": together, **options}
                both("Occlusion", peers("Occlusion", model), SINGLE, inputs, windows, **choices)


@pytest.mark.parametrize("together", [1, 4])
def test_occlusion_of_three_inputs(together: int) -> None:
    inputs = tuple(NETWORKS["linear"].inputs(2)[:, :size] for size in (3, 4, 2))
    pair = peers("Occlusion", lambda x, y, z: x.square().sum(1) * y.sum(1) + z.exp().sum(1))
    both("Occlusion", pair, SINGLE, inputs, ((1,), (3,), (1,)), perturbations_per_eval=together)


INNER: dict[str, dict[str, Any]] = {
    "Saliency": {},
    "GuidedBackprop": {},
    "IntegratedGradients": {"n_steps": 4, "return_convergence_delta": True},
    "FeatureAblation": {},
}


@pytest.mark.parametrize("name", ["linear", "conv", "two_inputs"])
@pytest.mark.parametrize("inner", INNER)
def test_noise_tunnel(inner: str, name: str, combinations: Combinations) -> None:
    """With captum's noise the results are captum's, whichever of the two is inside."""
    model, inputs, options = asked(name, 2)[4]
    options |= INNER[inner] | {"stdevs": 0.25}
    if inner == "FeatureAblation":
        several = inputs if isinstance(inputs, tuple) else (inputs,)
        masks = tuple(torch.arange(one[:1].numel()).reshape(one[:1].shape) % 4 for one in several)
        options["feature_mask"] = masks if isinstance(inputs, tuple) else masks[0]
    for kind, size, owner in combinations(("smoothgrad", "smoothgrad_sq", "vargrad"), (None, 1, 2, 5, 9), range(2)):
        exact = {"exact_captum": True} if inner == "IntegratedGradients" else {}
        method = peers(inner, model, **exact)[owner]
        choices = {"nt_type": kind, "nt_samples_batch_size": size, **options}
        both("NoiseTunnel", peers("NoiseTunnel", method, rng="captum"), EXACT, inputs, **choices)


@pytest.mark.parametrize("size", [None, 2])
def test_noise_tunnel_draws_baselines(size: int | None) -> None:
    import numpy as np

    model, inputs, options = asked("conv", 2)[4]
    pair = peers("NoiseTunnel", peers("IntegratedGradients", model, exact_captum=True)[1], rng="captum")
    baselines = NETWORKS["conv"].inputs(7)
    found = []
    for one in pair:
        torch.manual_seed(0)
        np.random.seed(0)
        choices = {"baselines": baselines, "draw_baseline_from_distrib": True, "nt_samples_batch_size": size, "n_steps": 3}
        found.append(one.attribute(inputs, **choices, **options))
    agree("NoiseTunnel", *found, EXACT)


@pytest.mark.parametrize("method", ["Saliency", "GuidedBackprop", "IntegratedGradients", "FeatureAblation", "Occlusion"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_dtypes(method: str, dtype: torch.dtype) -> None:
    """Shapes and dtypes are captum's; a lower precision is as far from captum's as its own rounding allows."""
    for name in ("conv", "linear"):
        model, inputs, options = asked(name, 2, dtype)[4]
        options |= {"sliding_window_shapes": (3, 4, 4) if name == "conv" else (2,)} if method == "Occlusion" else {}
        pair = peers(method, model)
        expected, found = (one.attribute(inputs, **options) for one in pair)
        assert difference(expected, found) <= 64 * torch.finfo(dtype).eps


def test_batch_statistics_are_those_of_all_rows() -> None:
    """A model in training mode is run as captum runs it: every row in one pass."""
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.Flatten())
    model = model.append(torch.nn.Linear(144, 5)).double().train()
    inputs = NETWORKS["conv"].inputs(11)
    both("Saliency", peers("Saliency", model), EXACT, inputs, 2)
    both("IntegratedGradients", peers("IntegratedGradients", model, exact_captum=True), EXACT, inputs, target=2, n_steps=6)
    for together in (1, 3):
        both(
            "Occlusion",
            peers("Occlusion", model),
            SINGLE,
            inputs,
            (3, 4, 4),
            (3, 4, 4),
            target=2,
            perturbations_per_eval=together,
        )


def test_a_sum_over_the_batch() -> None:
    """One answer for the whole batch: captum differentiates it, and so must a queue that splits batches."""
    inputs = NETWORKS["linear"].inputs(20)

    def forward(x: Tensor) -> Tensor:
        return x.square().sum().reshape(1)

    both("Saliency", peers("Saliency", forward), EXACT, inputs)
    both("IntegratedGradients", peers("IntegratedGradients", forward, exact_captum=True), EXACT, inputs, n_steps=5)


def test_whole_numbers_have_integrated_gradients() -> None:
    inputs = torch.arange(12).reshape(3, 4)
    pair = peers("IntegratedGradients", lambda x: x.sin().sum(1), exact_captum=True)
    both("IntegratedGradients float32", pair, 64 * SINGLE, inputs)


def test_nan_stays_nan() -> None:
    model, inputs, options = asked("conv", 3)[4]
    inputs[1, 0, 2, 2] = float("nan")
    for name in ("Saliency", "IntegratedGradients"):
        theirs, ours = (one.attribute(inputs, **options) for one in peers(name, model))
        assert torch.equal(torch.isnan(theirs), torch.isnan(ours))
