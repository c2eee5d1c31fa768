"""Every name of grad-cam 1.5.7 is here, is its own where it is installed, or says that it must be; its README runs."""

import importlib
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_grad_cam as peer
import torch
from torch import nn

from tests.pytorch_grad_cam.networks import ResNet, pictures, seeded

PAGE = (Path(__file__).parents[2] / "docs/migrating.md").read_text().split("## Coming from pytorch-grad-cam")[1]
MODULES = [
    "",
    *(one.name.removeprefix("pytorch_grad_cam.") for one in pkgutil.walk_packages(peer.__path__, "pytorch_grad_cam.")),
]


def names_of(module: Any) -> list[str]:
    """What a module of the peer defines itself."""
    own = [name for name, value in vars(module).items() if getattr(value, "__module__", "").startswith("pytorch_grad_cam")]
    return [name for name in own if (name[0] != "_" and vars(module)[name].__module__ == module.__name__) or module is peer]


@pytest.mark.parametrize("path", MODULES)
def test_every_module_has_every_name(path: str) -> None:
    theirs = importlib.import_module(".".join(filter(None, ["pytorch_grad_cam", path])))
    mine = importlib.import_module(".".join(filter(None, ["pysal.pytorch_grad_cam", path])))
    for name in names_of(theirs):
        if inspect.isclass(getattr(theirs, name)) or inspect.isfunction(getattr(theirs, name)):
            assert getattr(mine, name) is not None, name


@pytest.mark.parametrize("name", [name for name in vars(peer) if name[0].isupper()])
def test_every_class_is_in_the_table(name: str) -> None:
    assert f"`{name}`" in PAGE


@pytest.mark.parametrize("name", [name for name in vars(peer) if name[0].isupper()])
def test_constructors_take_what_the_peers_take(name: str) -> None:
    theirs, mine = getattr(peer, name), getattr(importlib.import_module("pysal.pytorch_grad_cam"), name)
    if theirs is mine or name.startswith("AblationLayer"):
        return
    wanted, found = (list(inspect.signature(one).parameters) for one in (theirs, mine))
    assert found[: len(wanted)] == wanted or "kwargs" in wanted


def test_where_the_peer_is_missing() -> None:
    source = """
import sys
sys.modules["pytorch_grad_cam"] = None
sys.modules["cv2"] = None
import pysal.pytorch_grad_cam as ours
import pysal.pytorch_grad_cam.guided_backprop
from pysal.pytorch_grad_cam.utils.image import show_cam_on_image
for statement in sys.argv[1:]:
    try:
        exec(statement)
    except (AttributeError, ImportError) as error:
        print(type(error).__name__, error)
import numpy as np
show_cam_on_image(np.zeros((4, 4, 3)), np.zeros((4, 4)))
try:
    show_cam_on_image(np.zeros((4, 4, 3)), np.zeros((4, 4)), colormap=16)
except ImportError as error:
    print(error)
"""
    said = {
        "ours.SESS": "AttributeError pysal.pytorch_grad_cam has no SESS",
        "from pysal.pytorch_grad_cam import SESS": "ImportError pysal.pytorch_grad_cam has no SESS",
        "from pysal.pytorch_grad_cam.sess import SESS": "ImportError pysal.pytorch_grad_cam has no sess",
        "import pysal.pytorch_grad_cam.metrics.arcc": "ImportError pysal.pytorch_grad_cam.metrics has no arcc",
        "ours.guided_backprop.Rule": "AttributeError pysal.pytorch_grad_cam.guided_backprop has no Rule",
    }
    run = subprocess.run([sys.executable, "-c", source, *said], capture_output=True, text=True, check=True)
    found = [one.split(" (did you mean")[0] for one in run.stdout.splitlines()]
    rest = " of its own: pytorch_grad_cam, whose names it hands on, must be installed (pip install grad-cam==1.5.7)"
    image = "pysal.pytorch_grad_cam.utils.image.show_cam_on_image"
    assert found == [
        *(one + rest for one in said.values()),
        f"{image}: colormap must be JET (2) where cv2 is not installed, got 16",
    ]


README = """
import numpy as np, torch
from LIBRARY import GradCAM, HiResCAM, ScoreCAM, GradCAMPlusPlus, AblationCAM, XGradCAM, EigenCAM, FullGrad
from LIBRARY import GuidedBackpropReLUModel
from LIBRARY.utils.model_targets import ClassifierOutputTarget, ClassifierOutputSoftmaxTarget
from LIBRARY.utils.image import show_cam_on_image, deprocess_image, preprocess_image
from LIBRARY.metrics.cam_mult_image import CamMultImageConfidenceChange
from LIBRARY.metrics.road import ROADMostRelevantFirst, ROADCombined

rgb_img = np.random.default_rng(0).random((32, 32, 3), dtype=np.float32)
input_tensor = preprocess_image(rgb_img, mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
target_layers = [model.layer2]
targets = [ClassifierOutputTarget(2)]
with GradCAM(model=model, target_layers=target_layers) as cam:
    grayscale_cam = cam(input_tensor=input_tensor, targets=targets)
    grayscale_cam = grayscale_cam[0, :]
    visualization = show_cam_on_image(rgb_img, grayscale_cam, use_rgb=True)
    model_outputs = cam.outputs

gb_model = GuidedBackpropReLUModel(model=model, device="cpu")
gb = gb_model(input_tensor.clone(), target_category=None)  # the peer leaves a gradient in it
cam_mask = np.stack([grayscale_cam] * 3, axis=-1)
cam_gb = deprocess_image(cam_mask * gb)

cam = GradCAM(model=model, target_layers=target_layers)
grayscale_cams = cam(input_tensor=input_tensor, targets=targets, aug_smooth=True)
inverse_cams = 1 - grayscale_cams
targets = [ClassifierOutputSoftmaxTarget(2)]
metric = CamMultImageConfidenceChange()
scores, batch_visualizations = metric(input_tensor, inverse_cams, targets, model, return_visualization=True)
picture = deprocess_image(batch_visualizations[0, :].numpy())
torch.manual_seed(0)
removed, _ = ROADMostRelevantFirst(percentile=75)(input_tensor, grayscale_cams, targets, model, return_visualization=True)
combined = ROADCombined(percentiles=[20, 60])(input_tensor, grayscale_cams, targets, model)
"""
ANSWERS = ["grayscale_cam", "model_outputs", "grayscale_cams", "scores", "removed", "combined"]


@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning")
def test_the_readmes_program_with_both() -> None:
    found = []
    for library in ("pytorch_grad_cam", "pysal.pytorch_grad_cam"):
        # modules that run once and not in place, for the peer replaces them under the guided rule
        net = seeded(ResNet, 1).float()
        space: dict[str, Any] = {"model": net}
        exec(README.replace("LIBRARY", library), space)
        found.append(space)
    for name in ANSWERS:
        theirs, mine = (
            np.asarray(space[name].detach() if isinstance(space[name], torch.Tensor) else space[name]) for space in found
        )
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-4, err_msg=name)
    # rounding may move a level of the map by one, which is 4 of a colour, half of it mixed in, over 1/2 or more
    assert int(np.abs(found[0]["visualization"].astype(int) - found[1]["visualization"]).max()) <= 5
    assert found[0]["cam_gb"].shape == found[1]["cam_gb"].shape == (32, 32, 3)


def test_a_list_of_a_program_of_ones_own() -> None:
    # every class under the same call, as the peer's own example script has it
    net = seeded(ResNet).float()
    library = importlib.import_module("pysal.pytorch_grad_cam")
    target = importlib.import_module("pysal.pytorch_grad_cam.utils.model_targets").ClassifierOutputTarget
    names = ["GradCAM", "HiResCAM", "ScoreCAM", "GradCAMPlusPlus", "AblationCAM", "XGradCAM", "EigenCAM", "EigenGradCAM"]
    names += ["LayerCAM", "FullGrad", "GradCAMElementWise", "KPCA_CAM", "ShapleyCAM", "SegEigenCAM", "FEM", "RandomCAM"]
    for name in names:
        with getattr(library, name)(model=net, target_layers=[net.layer2]) as cam:
            cam.batch_size = 32
            found = cam(input_tensor=pictures(1).float(), targets=[target(1)], aug_smooth=False, eigen_smooth=True)
        assert found.shape == (1, 32, 32)
        assert 0 <= float(found.min()) <= float(found.max()) == pytest.approx(1, abs=1e-6)


DETECTION = """
import numpy as np, torch
from LIBRARY import AblationCAM, EigenCAM, GradCAM
from LIBRARY.utils.image import scale_cam_image, show_cam_on_image
from LIBRARY.utils.model_targets import FasterRCNNBoxScoreTarget

tensor = torch.from_numpy(np.random.default_rng(0).random((1, 3, 32, 32)))
found = model(tensor)[0]
boxes, labels = found["boxes"].detach().numpy(), found["labels"].numpy()
targets = [FasterRCNNBoxScoreTarget(labels=labels, bounding_boxes=boxes)]
eigen = EigenCAM(model, [model.body[2]])(tensor, targets=targets)[0]
gradient = GradCAM(model, [model.body[2]])(tensor, targets=targets)[0]
inside = np.zeros_like(gradient)
for left, top, right, bottom in boxes.astype(int):
    inside[top:bottom, left:right] = scale_cam_image(gradient[None, top:bottom, left:right].copy())[0]
cam = AblationCAM(model, [model.body[2]])
cam.batch_size = 1
ablated = cam(tensor, targets=targets)[0]
"""


class Boxes(nn.Module):
    """Answers with a list of dictionaries, as torchvision's detectors do: boxes that stay, scores that differ."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.score = nn.Linear(8, 2)

    def forward(self, images: torch.Tensor) -> list[dict[str, torch.Tensor]]:
        boxes = torch.tensor([[2.0, 3.0, 20.0, 18.0], [8.0, 10.0, 30.0, 28.0]], dtype=images.dtype)
        scores = self.score(self.body(images).mean((2, 3))).sigmoid()
        return [{"boxes": boxes, "labels": torch.tensor([1, 7]), "scores": one} for one in scores]


def test_the_program_of_a_detector_with_both() -> None:
    found = []
    for library in ("pytorch_grad_cam", "pysal.pytorch_grad_cam"):
        space: dict[str, Any] = {"model": seeded(Boxes, 20)}
        exec(DETECTION.replace("LIBRARY", library), space)
        found.append(space)
    for name in ("gradient", "inside", "ablated"):
        assert found[0][name].max() > 0.5, name
        np.testing.assert_allclose(found[1][name], found[0][name], rtol=0, atol=1e-4, err_msg=name)
    assert found[1]["eigen"].shape == found[0]["eigen"].shape == (32, 32)


class Detector(nn.Module):
    """Answers with what no class is told from: boxes, scales, names."""

    def __init__(self) -> None:
        super().__init__()
        self.net = seeded(ResNet)

    def forward(self, images: torch.Tensor) -> Any:
        return [{"boxes": torch.zeros(3, 4), "names": ["a"] * 3} for _ in images], (self.net(images).abs(),), None


@pytest.mark.parametrize("name", ["EigenCAM", "KPCA_CAM", "FEM"])
def test_a_map_without_a_score_of_a_detector(name: str) -> None:
    library = importlib.import_module("pysal.pytorch_grad_cam")
    net, detector, images = seeded(ResNet), Detector(), pictures(2)
    cam = getattr(library, name)(detector, [detector.net.layer2])
    expected = getattr(library, name)(net, [net.layer2])(images, None)
    np.testing.assert_array_equal(cam(images, None), expected)
    assert len(cam.outputs[0]) == 2


def test_similarity_to_an_embedding() -> None:
    # the peer's tutorial of embeddings: the target compares the output with that of another picture
    class Embedding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = seeded(ResNet, 1)
            self.net.fc = nn.Identity()

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.net(images)

    class Similarity:
        def __init__(self, features: torch.Tensor) -> None:
            self.features = features

        def __call__(self, output: torch.Tensor) -> torch.Tensor:
            return nn.CosineSimilarity(dim=0)(output, self.features)

    model, images = Embedding().eval(), pictures(3)
    targets = [Similarity(model(images[2:])[0].detach())] * 2
    mine = importlib.import_module("pysal.pytorch_grad_cam")
    found = [library.GradCAM(model, [model.net.layer2])(images[:2], targets) for library in (peer, mine)]
    np.testing.assert_allclose(found[1], found[0], rtol=0, atol=1e-5)


def test_data_parallel_and_wrapped_models() -> None:
    class Logits(nn.Module):
        """As around a model of transformers, whose answer is an object."""

        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.net(images)

    net, images = seeded(ResNet), pictures(2)
    library = importlib.import_module("pysal.pytorch_grad_cam")
    expected = library.HiResCAM(net, [net.layer2])(images, None)
    for wrapped in (Logits(net), nn.DataParallel(net)):
        np.testing.assert_allclose(library.HiResCAM(wrapped, [net.layer2])(images, None), expected, rtol=0, atol=1e-6)
