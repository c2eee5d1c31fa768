"""Every network of the zoo through every method and face: right to the oracle, or refused in one sentence."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pysal
from pysal import captum, pair
from pysal.methods.registry import method_names
from tests.methods.networks import images
from tests.zoo.networks import NETWORKS, RULED, Network, user
from tests.zoo.oracle import DEVIATION, DISTANCE, FRACTION, RADIUS, SAMPLES, SIGMA, STEPS, Oracle

IG = {"steps": STEPS, "placement": "uniform", "quadrature": "midpoint"}
BLUR = {"steps": STEPS, "placement": "uniform", "quadrature": "left", "max_sigma": SIGMA}
USUAL = method_names("pysal.explain", "all")
OPTIONS: dict[str, dict[str, Any]] = {
    "leave_one_out": {"segments": pysal.Grid(1, 2)},
    "gradient": {},
    "guided_backprop": {},
    "grad_cam": {},
    "guided_grad_cam": {},
    "smooth_grad": {"samples": SAMPLES},
    "integrated_gradients": IG,
    "blur_integrated_gradients": BLUR,
    "guided_integrated_gradients": {"steps": STEPS, "fraction": FRACTION, "max_distance": DISTANCE},
    "xrai": {"steps": STEPS, "segments": pysal.Grid(1, 2)},
}


@dataclass
class Case:
    """A network as one test asks it."""

    network: Network
    model: Any
    images: Tensor

    @property
    def target(self) -> Any:
        return self.network.target


@functools.cache
def truth(name: str, question: str, dtype: torch.dtype, whole: bool) -> Tensor | Exception:
    """What the oracle says, or the network's own error where it cannot be asked this."""
    torch.manual_seed(0)
    try:
        found: Tensor = getattr(Oracle(NETWORKS[name], dtype, whole=whole), question)()
        return found.detach()
    except Exception as error:
        return error


def native(method: str, **request: Any) -> Callable[[Case], Tensor]:
    score = {"score": "raw"} if method == "leave_one_out" else {}
    return lambda case: getattr(pysal, method)(case.model, case.images, case.target, **OPTIONS[method], **score, **request)


def deconvnet(case: Case) -> Tensor:
    return pysal.guided_backprop(case.model, case.images, case.target, rule="deconvnet")


def class_gradients(case: Case) -> Tensor:
    classes = [case.target] if isinstance(case.target, int) else [0]
    return pysal.class_gradients(case.model, case.images, classes)[:, 0]


def whole_batches(case: Case, method: str) -> Tensor:
    return native(method, batch_size=len(case.images))(case)


def deletion(case: Case) -> Tensor:
    return pysal.metrics.deletion(case.model, case.images, case.images, case.target, steps=2, score="raw").scores


def insertion(case: Case) -> Tensor:
    found = pysal.metrics.insertion(case.model, case.images, case.images, case.target, steps=2, substrate="zero", score="raw")
    return found.scores


def infidelity(case: Case) -> Tensor:
    options: dict[str, Any] = {"perturbation": "noise", "meaning": "slopes", "noise": DEVIATION, "scaled": False}
    return pysal.metrics.infidelity(case.model, case.images, case.images, case.target, samples=SAMPLES, score="raw", **options)


def max_sensitivity(case: Case) -> Tensor:
    return pysal.metrics.max_sensitivity(case.model, case.images, case.target, radius=RADIUS, samples=SAMPLES)


def captum_column(name: str, *, layer: bool = False, **named: Any) -> Callable[[Case], Tensor]:
    """A class of captum's, which picks a column of the output where that is all that is meant."""

    def ask(case: Case) -> Tensor:
        forward, target = case.model, case.target
        if callable(target):
            forward, target = (lambda images: case.target(case.model(images))), None
        elif case.network.numbers:
            target = None
        original = case.model.original if isinstance(case.model, pysal.PreparedModel) else case.model
        made = getattr(captum, name)(forward, *([find(original, case.network.layer)] if layer else []))
        return made.attribute(case.images, target=target, **named)  # type: ignore[no-any-return]

    return ask


def find(model: Any, name: str) -> nn.Module:
    if not name:
        pytest.skip("no layer to ask for")
    model = getattr(model, "_orig_mod", model)
    return model.get_submodule(name.partition("@")[0])  # type: ignore[no-any-return]


def saliency(case: Case) -> Tensor:
    return captum_column("Saliency", abs=False)(case)


def noise_tunnel(case: Case, *, deviation: float) -> Tensor:
    forward, target = case.model, case.target
    if callable(target):
        forward, target = (lambda images: case.target(case.model(images))), None
    elif case.network.numbers:
        target = None
    made = captum.NoiseTunnel(captum.Saliency(forward), seed=0)
    return made.attribute(  # type: ignore[no-any-return]
        case.images, nt_samples=SAMPLES, stdevs=deviation, target=target, abs=False
    )


def feature_ablation(case: Case) -> Tensor:
    width = case.images.shape[3]
    mask = (torch.arange(width) >= width // 2).long().expand(1, *case.images.shape[1:])
    return captum_column("FeatureAblation", feature_mask=mask)(case)[:, :1]


def occlusion(case: Case) -> Tensor:
    return captum_column("Occlusion", sliding_window_shapes=(case.images.shape[1], 1, 1))(case)


def pairs(name: str, **options: Any) -> Callable[[Case], Tensor]:
    def ask(case: Case) -> Tensor:
        model = pair.torch_model(case.model, case.target)
        masks = [
            getattr(pair, name)().GetMask(
                image.movedim(0, -1).float().numpy() if image.dtype == torch.bfloat16 else image.movedim(0, -1).numpy(),
                model,
                **options,
            )
            for image in case.images
        ]
        found = torch.from_numpy(np.stack(masks))
        return found.movedim(-1, 1) if found.ndim == 4 else found[:, None]

    return ask


# the face, the question of the oracle that it answers, and whether it keeps the caller's batch together
FACES: dict[str, tuple[Callable[[Case], Tensor], str, bool | None]] = {
    **{name: (native(name), name, None) for name in OPTIONS},
    "deconvnet": (deconvnet, "deconvnet", None),
    "class_gradients": (class_gradients, "gradient", None),
    "deletion": (deletion, "deletion", None),
    "insertion": (insertion, "insertion", None),
    "infidelity": (infidelity, "infidelity", None),
    "max_sensitivity": (max_sensitivity, "max_sensitivity", None),
    **{f"{name}, row by row": (native(name, batch_size=1), name, False) for name in OPTIONS},
    **{f"{name}, whole batches": (functools.partial(whole_batches, method=name), name, True) for name in OPTIONS},
    "captum.Saliency": (saliency, "gradient", True),
    "captum.GuidedBackprop": (captum_column("GuidedBackprop"), "guided_backprop", True),
    "captum.Deconvolution": (captum_column("Deconvolution"), "deconvnet", True),
    "captum.IntegratedGradients": (
        captum_column("IntegratedGradients", n_steps=STEPS, method="riemann_middle"),
        "stacked",
        True,
    ),
    "captum.NoiseTunnel": (functools.partial(noise_tunnel, deviation=DEVIATION), "tunnel", True),
    "captum.NoiseTunnel, without noise": (functools.partial(noise_tunnel, deviation=0.0), "repeated", True),
    "captum.LayerGradCam": (captum_column("LayerGradCam", layer=True), "cam", True),
    "captum.FeatureAblation": (feature_ablation, "leave_one_out", True),
    "captum.Occlusion": (occlusion, "summed_columns", True),
    "pair.GradientSaliency": (pairs("GradientSaliency"), "gradient", False),
    "pair.IntegratedGradients": (pairs("IntegratedGradients", x_steps=STEPS), "ends_and_middle", False),
    "pair.BlurIG": (pairs("BlurIG", steps=STEPS, max_sigma=SIGMA), "blur_integrated_gradients", False),
    "pair.GuidedIG": (
        pairs("GuidedIG", x_steps=STEPS, fraction=FRACTION, max_dist=DISTANCE),
        "guided_integrated_gradients",
        False,
    ),
    "pair.GradCam": (pairs("GradCam", should_resize=False, three_dims=False), "cam_relu", False),
    "pair.Occlusion": (pairs("Occlusion", size=1), "summed_columns", False),
}


def close(name: str, question: str, found: Tensor, *, whole: bool | None) -> bool:
    """Whether a map is the oracle's, but for rounding; of rows that act on each other, `whole` or, for None, in either way.

    Error model: no result is a sum of more than 1,000 roundings of numbers of its own size, or of 0.001; in fewer digits than
    float64's it is at most twice as far away as the same loop of plain torch, and these.
    """
    network = NETWORKS[name]
    for together in ((True, False) if whole is None else (whole,)) if network.coupled else (False,):
        expected = truth(name, question, network.exact, together)
        if isinstance(expected, Exception) or found.shape != expected.shape:
            continue
        plain = truth(name, question, network.dtype, together)
        assert isinstance(plain, Tensor)
        digits = [torch.finfo(one).eps for one in (network.dtype, found.dtype) if one.is_floating_point or one.is_complex]
        limit = 2 * float((plain - expected).abs().max()) + 1000 * max(digits) * max(float(expected.abs().max()), 1e-3)
        if float((found - expected).abs().max()) <= limit:
            return True
    return False


def is_own_error(name: str, question: str, error: Exception) -> bool:
    """Whether the network itself fails so in the pass that a face of captum's or PAIR's is to make: theirs hand it on."""
    own = [truth(name, question, NETWORKS[name].exact, whole) for whole in (True, False)]
    return any(type(one) is type(error) and str(one) == str(error) for one in own)


def may_refuse(network: Network, face: str) -> bool:
    if any(part in face for part in network.refuses) or network.chance:
        return True
    if not network.layer and ("rad_cam" in face or "radCam" in face):
        return True
    return network.coupled and not face.startswith("captum")


def is_a_sentence(said: str) -> bool:
    """Whether an error is of this package, and one sentence."""
    return said.startswith("pysal") and "\n" not in said


def fault(name: str, face: str, model: Any, *, refuses: bool = False) -> str:
    """Return what is wrong with a face's answer for a network, in words, or nothing; `refuses`: whether it may refuse it."""
    network, (ask, question, whole) = NETWORKS[name], FACES[face]
    if face in network.unlike or (face == "captum.LayerGradCam" and not network.layer):
        return ""
    case = Case(network, model, images(*network.shape).to(network.dtype))
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            found = ask(case)
    except Exception as error:
        said = str(error)
        if is_a_sentence(said):
            return "" if refuses or may_refuse(network, face) else f"{name}, {face}: refused: {said}"
        if face.startswith(("captum", "pair")) and is_own_error(name, question, error):
            return ""
        return f"{name}, {face}: {type(error).__name__}: {said}"
    if network.chance or close(name, question, found, whole=whole):  # what is drawn anew has no right answer
        return ""
    return f"{name}, {face}: another map"


WAYS: dict[str, list[str]] = {
    "native": [face for face in FACES if "." not in face and "," not in face],
    "row by row": [face for face in FACES if face.endswith("row by row")],
    "whole batches": [face for face in FACES if face.endswith("whole batches")],
    "captum": [face for face in FACES if face.startswith("captum")],
    "pair": [face for face in FACES if face.startswith("pair")],
}
PREPARED = [
    *WAYS["native"],
    "gradient, row by row",
    "captum.Saliency",
    "captum.LayerGradCam",
    "captum.FeatureAblation",
    *WAYS["pair"],
]
# What has a graph of its own, and of which faces the layers are out of reach once it is prepared, beside those under rules.
HIDDEN = {"compiled": ("rad_cam", "radCam"), "frozen script": ()}
CAMS = ("rad_cam", "radCam", "GradCam")
UNPREPARED = ("a function", "a method of an object")  # are no modules, and so cannot be


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NETWORKS)
def test_right_or_refused(name: str, way: str) -> None:
    model = user(NETWORKS[name])
    assert not [found for found in (fault(name, face, model) for face in WAYS[way]) if found]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in NETWORKS if name not in UNPREPARED])
def test_prepared(name: str) -> None:
    network = NETWORKS[name]
    model = pysal.prepare(user(network), images(*network.shape).to(network.dtype)[:1])
    compiled = RULED if name in HIDDEN else ()

    def refuses(face: str) -> bool:
        return network.coupled or any(part in face for part in (*compiled, *HIDDEN.get(name, ())))

    # a prepared program has layers, which it has not as it is: tests/engine/test_exported.py compares their maps
    faces = [face for face in PREPARED if not (name.startswith("exported") and any(cam in face for cam in CAMS))]
    assert not [found for found in (fault(name, face, model, refuses=refuses(face)) for face in faces) if found]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NETWORKS)
def test_explain(name: str) -> None:
    network = NETWORKS[name]
    batch = images(*network.shape).to(network.dtype)
    options = {method: some for method, some in OPTIONS.items() if some and method in USUAL}
    try:
        found = pysal.explain(user(network), batch, target=network.target, method_options=options, score="raw")
    except Exception as error:
        said = str(error)
    else:
        said = ""
    if said:
        assert is_a_sentence(said)
        assert may_refuse(network, "explain"), said
        return
    assert set(found.skipped) | set(found.results) == set(USUAL)
    for method, said in found.skipped.items():
        assert is_a_sentence(said)
        assert may_refuse(network, method), said
    if not network.chance:
        assert not [method for method, one in found.results.items() if not close(name, method, one.map, whole=None)]


def test_most_networks_are_explained() -> None:
    """A refusal is right only where a network says so: these are the exceptions."""
    assert sum("" in network.refuses for network in NETWORKS.values()) < len(NETWORKS) / 10
