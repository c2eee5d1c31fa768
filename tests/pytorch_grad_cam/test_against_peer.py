"""The same programs with grad-cam 1.5.7 and with the face, to 1e-5 of maps that are scaled to [0, 1]."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import pytorch_grad_cam as peer
import pytorch_grad_cam.base_cam as peer_base
import pytorch_grad_cam.utils.image as peer_image
import pytorch_grad_cam.utils.model_targets as peer_targets
import torch
from torch import nn

import pysal
import pysal.pytorch_grad_cam as ours
import pysal.pytorch_grad_cam.base_cam as our_base
import pysal.pytorch_grad_cam.utils.image as our_image
import pysal.pytorch_grad_cam.utils.model_targets as our_targets
from tests.pytorch_grad_cam.networks import NETWORKS, Network, ResNet, pictures, seeded

# The networks are float64: what is left is the float32 of the peer's pictures and constants of 1e-7 and 1e-8 that it adds.
CLOSE = 1e-5
LIBRARIES = [(peer, peer_targets), (ours, our_targets)]
CLASSES: dict[str, dict[str, bool]] = {
    **{name: {} for name in ("GradCAM", "HiResCAM", "GradCAMElementWise", "XGradCAM", "LayerCAM", "EigenCAM")},
    **{name: {} for name in ("EigenGradCAM", "SegEigenCAM", "ShapleyCAM", "FEM", "KPCA_CAM", "FullGrad")},
    "GradCAMPlusPlus": {"exact_peer": True},
}


@pytest.fixture
def signed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the peer's singular vectors the sign that the face's have, in the place of LAPACK's."""
    svd, whatever_the_score = np.linalg.svd, request.node.callspec.params["name"] == "EigenCAM"

    def flipped(rows: Any, full_matrices: bool = True) -> Any:
        left, values, right = svd(rows, full_matrices=False)
        line = rows @ right[0]
        if (line[np.abs(line).argmax()] if whatever_the_score else line @ rows.sum(1)) < 0:
            right[0] *= -1
        return left, values, right

    monkeypatch.setattr(np.linalg, "svd", flipped)


@pytest.fixture(autouse=True)
def without_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TQDM_DISABLE", "1")


def close(found: Any, expected: Any) -> None:
    assert isinstance(found, np.ndarray)
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert float(expected.max()) > 0.5, "the case shows something"
    np.testing.assert_allclose(found, expected, rtol=0, atol=CLOSE)


def both(name: str, net: nn.Module, network: Network, layers: list[nn.Module], targets: Callable[[ModuleType], Any]) -> Any:
    """Return the peer's object and ours, and the targets of each."""
    answers = []
    for library, words in LIBRARIES:
        options = CLASSES.get(name, {}) if library is ours else {}
        cam = getattr(library, name)(model=net, target_layers=layers, reshape_transform=network.reshape, **options)
        answers.append((cam, targets(words)))
    return answers


def targets_of(name: str, number: int) -> Callable[[ModuleType], Any]:
    if name == "segmenter":
        mask = np.zeros((32, 32), np.float32)
        mask[8:20, 4:30] = 1
        return lambda words: [words.SemanticSegmentationTarget(1 + n % 2, mask) for n in range(number)]
    return lambda words: [words.ClassifierOutputTarget(1 + n) for n in range(number)]


@pytest.mark.parametrize(
    ("place", "options"),
    [
        *(("first", {}), ("last", {}), ("both", {}), ("last", {"eigen_smooth": True}), ("last", {"aug_smooth": True})),
        ("both", {"aug_smooth": True, "eigen_smooth": True}),
    ],
    ids=["first", "last", "both", "smoothed", "augmented", "all"],
)
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.usefixtures("signed")
def test_maps(name: str, network: str, place: str, options: dict[str, bool], capsys: pytest.CaptureFixture[str]) -> None:
    case = NETWORKS[network]
    if name == "FullGrad" and network not in ("resnet", "vgg", "segmenter"):
        pytest.skip("one bias alone is that of a map")
    if name == "ShapleyCAM" and (network in ("vit", "swin") or place == "both"):
        pytest.skip("torch has no second derivative of fused attention, and the peer lets go of the graph after one layer")
    net = seeded(case.make)
    layers = case.layers(net)
    chosen = {"first": layers[:1], "last": layers[-1:], "both": layers}[place]
    images = pictures(2)
    maps = [cam(images, targets, **options) for cam, targets in both(name, net, case, chosen, targets_of(network, 2))]
    close(maps[1], maps[0])


@pytest.mark.parametrize("network", ["resnet", "vgg", "segmenter"])
@pytest.mark.parametrize("name", ["ScoreCAM", "AblationCAM"])
@pytest.mark.parametrize("place", ["first", "last"])
def test_maps_from_many_passes(name: str, network: str, place: str) -> None:
    # scores are made positive: the peer's ablation turns the map around where they are not
    case, images = NETWORKS[network], pictures(2)
    net = seeded(case.make)
    layers = case.layers(net)
    given = targets_of(network, 2)

    with torch.no_grad():
        signs = [float(one(output).sign()) for one, output in zip(given(peer_targets), net(images), strict=True)]

    def raised(words: ModuleType) -> Any:
        return [lambda output, one=one, sign=sign: sign * one(output) for one, sign in zip(given(words), signs, strict=True)]

    chosen = layers[:1] if place == "first" else layers[-1:]
    words = given if name == "ScoreCAM" else raised
    maps = [cam(images, targets) for cam, targets in both(name, net, case, chosen, words)]
    close(maps[1], maps[0])


@pytest.mark.parametrize("network", ["resnet", "swin"])
def test_score_cam_of_tokens_and_in_batches_of_three(network: str) -> None:
    case, images = NETWORKS[network], pictures(3)
    net = seeded(case.make)
    maps = []
    for cam, targets in both("ScoreCAM", net, case, case.layers(net)[-1:], targets_of(network, 3)):
        cam.batch_size = 3
        maps.append(cam(images, targets))
    close(maps[1], maps[0])


@pytest.mark.parametrize(
    "make",
    [
        lambda words: None,
        lambda words: [words.ClassifierOutputSoftmaxTarget(n) for n in range(3)],
        lambda words: [words.ClassifierOutputReST(n) for n in range(3)],
        lambda words: [words.FinerWeightedTarget(n, [4, 5], 0.7) for n in range(3)],
        lambda words: [lambda output: output[2] - output[3].square() for _ in range(3)],
        lambda words: [words.ClassifierOutputTarget(-1), words.ClassifierOutputTarget(np.int64(2)), lambda output: output[0]],
    ],
    ids=["None", "softmax", "ReST", "finer", "function", "mixed"],
)
@pytest.mark.parametrize("name", ["GradCAM", "LayerCAM", "ShapleyCAM"])
def test_targets(name: str, make: Callable[[ModuleType], Any]) -> None:
    case, images = NETWORKS["resnet"], pictures(3)
    net = seeded(case.make, 1)
    maps = [cam(images, targets) for cam, targets in both(name, net, case, case.layers(net)[-1:], make)]
    close(maps[1], maps[0])


@pytest.mark.parametrize("category", [0, 1])
def test_binary_and_raw_targets(category: int) -> None:
    net = seeded(lambda: nn.Sequential(NETWORKS["resnet"].make(), nn.Linear(7, 1, bias=False)))
    layers, images = [net[0].layer2], pictures(2)
    for make in (lambda words: words.BinaryClassifierOutputTarget(category), lambda words: words.RawScoresOutputTarget()):
        maps = [library.GradCAMElementWise(net, layers)(images, [make(words), make(words)]) for library, words in LIBRARIES]
        close(maps[1], maps[0])


@pytest.mark.parametrize(
    "options",
    [{}, {"alpha": 0.5}, {"target_idx": 2}, {"comparison_categories": [1, 4]}, {"comparison_categories": [2, 99]}],
    ids=str,
)
def test_finer_cam(options: dict[str, Any]) -> None:
    net, images = seeded(NETWORKS["resnet"].make, 1), pictures(2)
    maps = [library.FinerCAM(net, [net.layer2], base_method=library.HiResCAM)(images, **options) for library, _ in LIBRARIES]
    close(maps[1], maps[0])


def test_refine_cam() -> None:
    net, images = seeded(NETWORKS["resnet"].make), pictures(2)
    layers = [net.layer1, net.layer2]
    maps = [
        library.RefineCAM(net, layers, base_method=library.LayerCAM)(images, [words.ClassifierOutputTarget(1)] * 2)
        for library, words in LIBRARIES
    ]
    close(maps[1], maps[0])


def test_random_cam_draws_from_numpys_generator() -> None:
    net, images, maps = seeded(NETWORKS["resnet"].make), pictures(2), []
    for library, words in LIBRARIES:
        np.random.seed(3)
        maps.append(library.RandomCAM(net, [net.layer1, net.layer2])(images, [words.ClassifierOutputTarget(1)] * 2))
    close(maps[1], maps[0])


@pytest.mark.parametrize("options", [{"k": 1}, {"k": 3.0}], ids=str)
def test_fem(options: dict[str, Any]) -> None:
    net, images = seeded(NETWORKS["vgg"].make), pictures(2)
    maps = [library.FEM(net, [net.features[2]], **options)(images, None) for library, _ in LIBRARIES]
    close(maps[1], maps[0])


@pytest.mark.parametrize("kernel", ["linear", "cosine", "sigmoid", "rbf", "poly"])
def test_kernels(kernel: str) -> None:
    net, images = seeded(NETWORKS["vgg"].make), pictures(2)
    maps = [library.KPCA_CAM(net, [net.features[2]], kernel=kernel, gamma=0.3)(images, None) for library, _ in LIBRARIES]
    close(maps[1], maps[0])


def test_augmentations_of_ones_own() -> None:
    import ttach

    net, images = seeded(NETWORKS["resnet"].make), pictures(2)
    transforms = ttach.Compose([ttach.VerticalFlip(), ttach.Rotate90(angles=[0, 180])])
    maps = []
    for library, words in LIBRARIES:
        cam = library.GradCAM(net, [net.layer2])
        cam.tta_transforms = transforms
        maps.append(cam(images, [words.ClassifierOutputTarget(1)] * 2, aug_smooth=True))
    close(maps[1], maps[0])


def test_classes_of_ones_own() -> None:
    net, images = seeded(NETWORKS["resnet"].make), pictures(2)
    maps = []
    for bases, words in ((peer_base, peer_targets), (our_base, our_targets)):

        class Largest(bases.BaseCAM):
            """Channels weighted by their largest gradient."""

            def get_cam_weights(self, input_tensor, target_layer, targets, activations, grads):  # type: ignore[no-untyped-def]
                assert input_tensor.shape == (2, 3, 32, 32)
                assert target_layer is net.layer2
                return grads.max(axis=(2, 3))

        class Squares(bases.BaseCAM):
            """No weights at all."""

            def __init__(self, model: Any, target_layers: Any) -> None:
                super().__init__(model, target_layers, uses_gradients=False)

            def get_cam_image(self, input_tensor, target_layer, targets, activations, grads, eigen_smooth):  # type: ignore[no-untyped-def]
                return (activations**2).sum(axis=1)

        targets = [words.ClassifierOutputTarget(1)] * 2
        maps.append([cls(net, [net.layer2])(images, targets) for cls in (Largest, Squares)])
    close(maps[1][0], maps[0][0])
    close(maps[1][1], maps[0][1])


@pytest.mark.parametrize(
    "name",
    ["GradCAM", "XGradCAM", "LayerCAM", "HiResCAM", "GradCAMElementWise", "EigenCAM", "FEM", "KPCA_CAM", "RandomCAM"],
)
def test_classes_made_of_the_peers_classes(name: str) -> None:
    """What such a class says itself is asked for, and what it asks its base for is answered."""
    net, images = seeded(NETWORKS["resnet"].make), pictures(2)
    maps: list[list[Any]] = []
    for library, words in ((peer, peer_targets), (ours, our_targets)):
        base: Any = getattr(library, name)

        class Cut(base):  # type: ignore[misc]
            def get_cam_image(self, *args: Any, **kwargs: Any) -> Any:
                return np.cbrt(super().get_cam_image(*args, **kwargs))

        class Rectified(base):  # type: ignore[misc]
            def get_cam_weights(self, *args: Any) -> Any:
                return np.maximum(super().get_cam_weights(*args), 0)

        classes = [Cut, Rectified] if name in ("GradCAM", "XGradCAM", "RandomCAM") else [Cut]
        np.random.seed(0)
        targets = [words.ClassifierOutputTarget(1)] * 2
        maps.append([one(net, [net.layer2])(images, targets) for one in classes])
        np.random.seed(0)
        assert not np.allclose(maps[-1][0], base(net, [net.layer2])(images, targets))
    for theirs, mine in zip(*maps, strict=True):
        close(mine, theirs)


@pytest.mark.parametrize("category", [None, 3])
def test_guided_backprop(category: int | None) -> None:
    # one ReLU of one module each: the peer replaces modules
    torch.manual_seed(0)
    net = (
        nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 28 * 28, 4))
        .double()
        .eval()
    )
    found, expected = (library.GuidedBackpropReLUModel(net)(pictures(1), target_category=category) for library in (ours, peer))
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype) == ((32, 32, 3), np.float64)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", ["GradCAM", "EigenCAM", "ScoreCAM"])
def test_outputs(name: str) -> None:
    case, images = NETWORKS["resnet"], pictures(2)
    net = seeded(case.make)
    for make in (targets_of("resnet", 2), lambda words: [lambda output: output[1]] * 2, lambda words: None):
        for cam, targets in both(name, net, case, case.layers(net)[-1:], make):
            cam(images, targets)
            torch.testing.assert_close(cam.outputs.detach(), net(images).detach(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", list(CLASSES))
def test_of_a_prepared_model(name: str) -> None:
    case, images = NETWORKS["resnet"], pictures(2)
    net = seeded(case.make)
    prepared = pysal.prepare(net, images[:1])
    targets = [our_targets.ClassifierOutputTarget(1)] * 2
    found, expected = (getattr(ours, name)(model, [net.layer2])(images, targets) for model in (prepared, net))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)


# Pictures ----------------------------------------------------------------------------------------------------------------


def test_jet_is_opencvs() -> None:
    import cv2

    levels = np.arange(256, dtype=np.uint8)[None]
    from pysal.viz.heat import jet

    assert np.array_equal(jet(levels), cv2.applyColorMap(levels, cv2.COLORMAP_JET)[..., ::-1])


@pytest.mark.parametrize("use_rgb", [True, False])
@pytest.mark.parametrize("weight", [0.0, 0.3, 0.5, 1.0])
def test_show_cam_on_image(use_rgb: bool, weight: float) -> None:
    import cv2

    generator = np.random.default_rng(0)
    photo, mask = generator.random((20, 30, 3), dtype=np.float32), generator.random((20, 30), dtype=np.float32)
    for colormap in (cv2.COLORMAP_JET, cv2.COLORMAP_VIRIDIS):
        found, expected = (
            image.show_cam_on_image(photo, mask, use_rgb=use_rgb, colormap=colormap, image_weight=weight)
            for image in (our_image, peer_image)
        )
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
        assert int(np.abs(found.astype(int) - expected).max()) <= 1, "float32 in another order, cut off at whole numbers"


@pytest.mark.parametrize("shape", [(20, 30, 3), (3, 7, 5), (11,)])
def test_deprocess_image(shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(0).normal(size=shape)
    assert np.array_equal(our_image.deprocess_image(values), peer_image.deprocess_image(values))


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
def test_preprocess_image(dtype: Any) -> None:
    generator = np.random.default_rng(0)
    image = (generator.random((20, 30, 3)) * (255 if dtype == np.uint8 else 1)).astype(dtype)
    for levels in ({}, {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}):
        found, expected = (library.preprocess_image(image, **levels) for library in (our_image, peer_image))
        assert found.shape == expected.shape == (1, 3, 20, 30)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("size", [None, (30, 20), (3, 5), (7, 7)])
def test_scale_cam_image(size: Any) -> None:
    maps = np.random.default_rng(0).normal(size=(3, 8, 9)).astype(np.float32)
    close(our_image.scale_cam_image(maps, size), peer_image.scale_cam_image(maps, size))
    if size is not None:
        many = maps[None].repeat(2, 0)
        close(our_image.scale_accross_batch_and_channels(many, size), peer_image.scale_accross_batch_and_channels(many, size))


def test_labels_of_concepts() -> None:
    scores = np.random.default_rng(0).random((3, 4))
    labels = {0: "a, b, c, d", 1: "e", 2: "f, g", 3: "h"}
    for top in (1, 2, 4):
        assert our_image.create_labels_legend(scores, labels, top) == peer_image.create_labels_legend(scores, labels, top)


def test_factorization_on_image() -> None:
    generator = np.random.default_rng(0)
    photo, maps = generator.random((10, 12, 3)), generator.random((3, 10, 12)).astype(np.float32)
    colours = [np.array(one) for one in ([1.0, 0, 0], [0, 0.5, 1.0], [0.2, 1.0, 0.4])]
    expected = peer_image.show_factorization_on_image(photo, maps.copy(), colours, 0.3).astype(int)
    found = our_image.show_factorization_on_image(photo, maps, colours, 0.3)
    # OpenCV's hues are whole numbers of 2 degrees
    assert int(np.abs(found - expected).max()) <= 4 + 255 * 0.7 / 60


def test_projections() -> None:
    from pytorch_grad_cam.utils import svd_on_activations as theirs

    from pysal.pytorch_grad_cam.utils import svd_on_activations as mine

    values = np.random.default_rng(0).normal(size=(2, 5, 4, 6))
    values[0, 1, 2, 3] = np.nan
    for name in ("get_2d_projection_kernel", "get_2d_projection_with_sign_correction"):
        found, expected = getattr(mine, name)(values), getattr(theirs, name)(values)
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(
        np.abs(mine.get_2d_projection(values)), np.abs(theirs.get_2d_projection(values)), rtol=0, atol=1e-5
    )


def test_reshape_transforms_and_layers() -> None:
    from pytorch_grad_cam.utils import find_layers as their_layers
    from pytorch_grad_cam.utils import reshape_transforms as theirs

    from pysal.pytorch_grad_cam.utils import find_layers as my_layers
    from pysal.pytorch_grad_cam.utils import reshape_transforms as mine

    rows = torch.rand(2, 13, 5)
    assert torch.equal(mine.vit_reshape_transform(rows, 3, 4), theirs.vit_reshape_transform(rows, 3, 4))
    assert torch.equal(mine.swinT_reshape_transform(rows[:, 1:], 3, 4), theirs.swinT_reshape_transform(rows[:, 1:], 3, 4))
    pyramid = {"0": torch.randn(1, 4, 8, 8), "pool": torch.randn(1, 4, 3, 3)}
    assert torch.equal(mine.fasterrcnn_reshape_transform(pyramid), theirs.fasterrcnn_reshape_transform(pyramid))

    net = seeded(NETWORKS["resnet"].make)
    types = [nn.Conv2d, nn.Linear]
    assert my_layers.find_layer_types_recursive(net, types) == their_layers.find_layer_types_recursive(net, types)
    assert my_layers.replace_layer_recursive(net, net.layer1.conv1, nn.Identity())
    assert isinstance(net.layer1.conv1, nn.Identity)
    assert not my_layers.replace_layer_recursive(net, nn.Identity(), nn.Identity())
    my_layers.replace_all_layer_type_recursive(net, nn.ReLU, nn.GELU())
    assert isinstance(net.layer2.relu, nn.GELU)


def test_box_scores() -> None:
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(6, 2, generator=generator) * 20
    boxes = torch.cat([corners, corners + 5 + 10 * torch.rand(6, 2, generator=generator)], 1)
    output = {"boxes": boxes, "scores": torch.rand(6, generator=generator), "labels": torch.tensor([1, 2, 1, 2, 3, 1])}
    wanted = (boxes[:4] + torch.rand(4, 4, generator=generator)).numpy()
    for labels in ([1, 2, 1, 2], [3, 2, 2, 1]):
        for limit in (0.1, 0.5, 0.99):
            found, expected = (
                words.FasterRCNNBoxScoreTarget(labels, wanted, limit)(output) for words in (our_targets, peer_targets)
            )
            torch.testing.assert_close(found, expected)
    nothing = {name: value[:0] for name, value in output.items()}
    assert our_targets.FasterRCNNBoxScoreTarget([1], wanted[:1])(nothing).tolist() == [0.0]


# Metrics -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["CamMultImageConfidenceChange", "DropInConfidence", "IncreaseInConfidence"])
def test_image_times_map(name: str) -> None:
    import pytorch_grad_cam.metrics.cam_mult_image as theirs

    import pysal.pytorch_grad_cam.metrics.cam_mult_image as mine

    net, images = seeded(NETWORKS["resnet"].make), pictures(3)
    maps = np.random.default_rng(0).random((3, 32, 32), dtype=np.float32)
    answers = [
        getattr(library, name)()(images, maps, [words.ClassifierOutputSoftmaxTarget(n) for n in range(3)], net)
        for library, words in ((theirs, peer_targets), (mine, our_targets))
    ]
    assert answers[1].dtype == answers[0].dtype
    np.testing.assert_allclose(answers[1], answers[0], rtol=0, atol=1e-6)


# what NumPy says of the peer's own
NUMPY = pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning")


@NUMPY
@pytest.mark.parametrize("name", ["ROADMostRelevantFirst", "ROADLeastRelevantFirst"])
@pytest.mark.parametrize("percentile", [20, 75])
def test_road(name: str, percentile: int) -> None:
    import pytorch_grad_cam.metrics.road as theirs

    import pysal.pytorch_grad_cam.metrics.road as mine

    net, images = seeded(NETWORKS["resnet"].make, 1).float(), pictures(2).float()
    maps = np.random.default_rng(0).random((2, 32, 32), dtype=np.float32)
    answers = []
    for library, words in ((theirs, peer_targets), (mine, our_targets)):
        torch.manual_seed(0)
        targets = [words.ClassifierOutputTarget(n) for n in range(2)]
        answers.append(getattr(library, name)(percentile=percentile)(images, maps, targets, net, return_visualization=True))
    np.testing.assert_allclose(answers[1][0], answers[0][0], rtol=0, atol=1e-5)
    torch.testing.assert_close(answers[1][1], answers[0][1], rtol=0, atol=1e-5)


@NUMPY
def test_road_over_percentiles() -> None:
    import pytorch_grad_cam.metrics.road as theirs

    import pysal.pytorch_grad_cam.metrics.road as mine

    net, images = seeded(NETWORKS["resnet"].make, 1).float(), pictures(2).float()
    maps = np.random.default_rng(0).random((2, 32, 32), dtype=np.float32)
    answers = []
    for library, words in ((theirs, peer_targets), (mine, our_targets)):
        torch.manual_seed(0)
        combined = library.ROADCombined(percentiles=[30, 70])
        answers.append(combined(images, maps, [words.ClassifierOutputTarget(n) for n in range(2)], net))
    assert answers[1].dtype == answers[0].dtype
    np.testing.assert_allclose(answers[1], answers[0], rtol=0, atol=1e-5)


@NUMPY
def test_the_peers_arcc_takes_our_class() -> None:
    import pysal.pytorch_grad_cam.metrics.arcc as falls_through
    from pytorch_grad_cam.metrics.arcc import ARCC

    assert falls_through.ARCC is ARCC
    net, images, answers = seeded(NETWORKS["resnet"].make, 1).float(), pictures(2).float(), []
    for library, words in LIBRARIES:
        torch.manual_seed(0)
        cam = library.HiResCAM(net, [net.layer2])
        targets = [words.ClassifierOutputTarget(n) for n in range(2)]
        answers.append(ARCC(cam, [40, 60])(images, cam(images, targets), targets, net))
    np.testing.assert_allclose(answers[1], answers[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["GradCAM", "LayerCAM", "XGradCAM"])
def test_methods_that_a_subclass_overrides(name: str) -> None:
    """A map that is sharpened by a `forward` of one's own; what reads hooks is refused."""
    net, images, found = seeded(ResNet), pictures(2), []
    for library in (peer, ours):

        class Sharp(getattr(library, name)):  # type: ignore[misc]
            def forward(self, input_tensor: Any, targets: Any, eigen_smooth: bool = False) -> Any:
                return super().forward(input_tensor, targets, eigen_smooth) ** 2

        found.append(Sharp(net, [net.layer1, net.layer2])(images, None))
    np.testing.assert_allclose(found[1], found[0], rtol=0, atol=1e-5)
    with pytest.raises(NotImplementedError, match="aug_smooth must be False for a class with its own forward"):
        Sharp(net, [net.layer1])(images, None, aug_smooth=True)

    for method in ("compute_cam_per_layer", "aggregate_multi_layers"):
        own = type("Own", (getattr(ours, name),), {method: lambda *_: []})
        with pytest.raises(NotImplementedError, match=f"cam must be of a class without its own {method}"):
            own(net, [net.layer1])(images, None)


@pytest.mark.parametrize("name", [one for one in vars(peer) if one[0].isupper()])
def test_every_method_is_there_or_says_why_not(name: str) -> None:
    theirs, mine = getattr(peer, name), getattr(ours, name)
    if mine is theirs or issubclass(mine, nn.Module):
        return
    for method in dir(theirs):
        if not method.startswith("_") and not hasattr(mine, method):
            with pytest.raises(AttributeError) as raised:
                getattr(mine, method)
            start = f"pysal.pytorch_grad_cam.{name}.{method}: belongs to the peer's hooks"
            assert str(raised.value).startswith(start)


def test_layers_put_together_by_hand() -> None:
    net, layers = seeded(ResNet), [np.random.default_rng(one).normal(size=(2, 1, 6, 5)).astype(np.float32) for one in (0, 1)]
    cams = [library.GradCAM(net, [net.layer1]) for library in (peer, ours)]
    expected, found = (cam.aggregate_multi_layers(layers) for cam in cams)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    assert cams[1].get_target_width_height(pictures(1)) == cams[0].get_target_width_height(pictures(1))
    with pytest.raises(ValueError, match="inputs must be a batch of images"):
        cams[1].get_target_width_height(pictures(1)[None])
    with pytest.raises(NotImplementedError, match=r"ScoreCAM\.get_cam_weights: channels have no weights"):
        ours.ScoreCAM(net, [net.layer1]).get_cam_weights(None, None, None, layers[0], layers[0])
