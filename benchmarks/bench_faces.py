"""Each class of the faces (of pytorch_grad_cam, some) against the class it stands in for: the same program, another import."""

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from captum import attr
from torch import Tensor

import pysal.captum
import pysal.pair
import pysal.pytorch_grad_cam
from benchmarks.bench_methods import (
    DROPS,
    GATES,
    OURS,
    SAMPLES,
    STEPS,
    WINDOW,
    Candidate,
    Comparison,
    Subject,
    measure,
    of_largest,
    subject_of,
)
from benchmarks.conftest import MethodReport
from benchmarks.peers import PairModel, as_map, last_channels, pair
from tests.models.torchvision_ops import define

NETWORK = "efficientnet_lite0"


def noise_tunnel(faces: ModuleType, model: Any, subject: Subject) -> Tensor:
    """SmoothGrad, with captum's noise each time, so that the maps can be compared."""
    torch.manual_seed(0)
    saliency = faces.Saliency(model)
    tunnel = faces.NoiseTunnel(saliency) if faces is attr else faces.NoiseTunnel(saliency, rng="captum")
    result: Tensor = tunnel.attribute(subject.image, nt_samples=SAMPLES, stdevs=0.15, target=subject.target)
    return result


FACES: dict[str, Callable[[ModuleType, Any, Subject], Tensor]] = {
    "captum.Saliency": lambda faces, model, s: faces.Saliency(model).attribute(s.image, s.target),
    "captum.GuidedBackprop": lambda faces, model, s: faces.GuidedBackprop(model).attribute(s.image, s.target),
    "captum.Deconvolution": lambda faces, model, s: faces.Deconvolution(model).attribute(s.image, s.target),
    "captum.LayerGradCam": lambda faces, model, s: faces.LayerGradCam(model, s.layer).attribute(s.image, s.target),
    "captum.GuidedGradCam": lambda faces, model, s: faces.GuidedGradCam(model, s.layer).attribute(s.image, s.target),
    "captum.IntegratedGradients": lambda faces, model, s: faces.IntegratedGradients(model).attribute(
        s.image, target=s.target, n_steps=STEPS
    ),
    "captum.NoiseTunnel": noise_tunnel,
    "captum.Occlusion": lambda faces, model, s: faces.Occlusion(model).attribute(
        s.image, (3, WINDOW, WINDOW), (3, WINDOW, WINDOW), target=s.target
    ),
    "captum.FeatureAblation": lambda faces, model, s: faces.FeatureAblation(model).attribute(
        s.image, target=s.target, feature_mask=s.labels.long()[None, None]
    ),
    "pair.GradientSaliency": lambda faces, model, s: as_map(faces.GradientSaliency().GetMask(last_channels(s.image)[0], model)),
    "pair.IntegratedGradients": lambda faces, model, s: as_map(
        faces.IntegratedGradients().GetMask(last_channels(s.image)[0], model, x_steps=STEPS)
    ),
    "pair.XRAI": lambda faces, model, s: as_map(
        faces.XRAI().GetMask(last_channels(s.image)[0], model, batch_size=20, extra_parameters=faces.XRAIParameters(steps=10))[
            ..., None
        ]
    ),
    "pair.BlurIG": lambda faces, model, s: as_map(faces.BlurIG().GetMask(last_channels(s.image)[0], model)),
    **{
        f"pytorch_grad_cam.{name}": lambda faces, model, s, name=name: torch.from_numpy(
            getattr(faces, name)(model, [s.layer])(s.image, [lambda output: output[s.target]])
        )[:, None]
        for name in (
            "GradCAM",
            "HiResCAM",
            "GradCAMPlusPlus",
            "XGradCAM",
            "LayerCAM",
            "GradCAMElementWise",
            "EigenCAM",
            "EigenGradCAM",
            "ShapleyCAM",
            "FEM",
            "FullGrad",
            "ScoreCAM",
            "AblationCAM",
        )
    },
    "pair.GradCam": lambda faces, model, s: as_map(
        faces.GradCam().GetMask(last_channels(s.image)[0], model, should_resize=False, three_dims=False)[..., None]
    ),
}
# What peers get wrong, or leave to chance, on this network (docs/migrating.md): not compared with them.
APART = {
    *("captum.GuidedBackprop", "captum.Deconvolution", "captum.GuidedGradCam"),
    *("pytorch_grad_cam.GradCAMPlusPlus", "pytorch_grad_cam.AblationCAM"),
    *("pytorch_grad_cam.EigenCAM", "pytorch_grad_cam.EigenGradCAM"),
}


def comparison(name: str, subject: Subject) -> Comparison:
    """The peer's class, ours under the same program, and ours on a prepared model."""
    run = FACES[name]
    peer: Callable[[], Tensor]
    if name.startswith("captum."):
        peer = lambda: run(attr, subject.model, subject).detach()  # noqa: E731
        same = lambda: run(pysal.captum, subject.model, subject)  # noqa: E731
        fast = lambda: run(pysal.captum, subject.fast, subject)  # noqa: E731
    elif name.startswith("pytorch_grad_cam."):
        define()  # what torchvision needs beside a CPU torch
        theirs = importlib.import_module("pytorch_grad_cam")
        peer = lambda: run(theirs, subject.model, subject)  # noqa: E731
        same = lambda: run(pysal.pytorch_grad_cam, subject.model, subject)  # noqa: E731
        fast = lambda: run(pysal.pytorch_grad_cam, subject.fast, subject)  # noqa: E731
    else:
        layer = subject.layer if name == "pair.GradCam" else None
        peer = lambda: run(pair, PairModel(subject.model, subject.target, layer), subject)  # noqa: E731
        same = lambda: run(pysal.pair, PairModel(subject.model, subject.target, layer), subject)  # noqa: E731
        fast = lambda: run(  # noqa: E731
            pysal.pair, pysal.pair.torch_model(subject.fast, subject.target, layer=layer), subject
        )
    drops = name in ("captum.Occlusion", "captum.FeatureAblation")
    return Comparison(
        [
            Candidate(OURS, fast, "prepared", True),
            Candidate(f"{OURS}, unprepared", same, "import changed", True),
            Candidate(name.split(".")[0], peer, "", True),
        ],
        reference=same if name in APART else peer,
        bound=DROPS if drops else GATES,
        distance=of_largest if drops else None,
    )


@pytest.mark.parametrize("method", FACES)
@pytest.mark.parametrize("network", [NETWORK])
@pytest.mark.filterwarnings("ignore")  # the peers'
def test_face(method: str, network: str, benchmark: Any, method_report: MethodReport, request: pytest.FixtureRequest) -> None:
    subject = subject_of(network)
    measure(method, network, comparison(method, subject), benchmark, method_report, request.config.getoption("--rounds"))
