"""Every way to call what explains: methods, explain, figures and the peers' faces, as call(model, images)."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import pysal
from pysal import captum, pair, plots, pytorch_grad_cam
from pysal.pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from tests.methods.calls import VARIANTS, row_by_row

IMAGES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
MAPS = IMAGES.sum(1, keepdim=True)
MASK = (MAPS[:1] > 1).long()
MODEL = row_by_row().float()
OPTIONS = {"leave_one_out": {"segments": pysal.Grid(2, 2)}, "smooth_grad": {"samples": 2}}
STEPS = {"IntegratedGradients": {"x_steps": 3}, "BlurIG": {"steps": 3}}  # of PAIR's classes
FACES: dict[str, Callable[[Any, Tensor], Any]] = {
    "Saliency": lambda model, images: captum.Saliency(model).attribute(images, 1),
    "Saliency of two inputs": lambda model, images: captum.Saliency(lambda a, b: model(a + b)).attribute((images, images), 1),
    "Saliency of a whole batch": lambda model, images: captum.Saliency(lambda x: model(x).sum().reshape(1)).attribute(images),
    "GuidedBackprop": lambda model, images: captum.GuidedBackprop(model).attribute(images, 1),
    "LayerGradCam": lambda model, images: captum.LayerGradCam(model, layer(model)).attribute(images, 1),
    "GuidedGradCam": lambda model, images: captum.GuidedGradCam(model, layer(model)).attribute(images, 1),
    "IntegratedGradients": lambda model, images: captum.IntegratedGradients(model).attribute(images, target=1, n_steps=3),
    "NoiseTunnel": lambda model, images: captum.NoiseTunnel(captum.Saliency(model)).attribute(images, target=1),
    "Occlusion": lambda model, images: captum.Occlusion(model).attribute(images, (3, 4, 4), (3, 4, 4), target=1),
    "Occlusion of channels": lambda model, images: captum.Occlusion(model).attribute(images, (1, 4, 4), (1, 4, 4), target=1),
    "InputXGradient": lambda model, images: captum.InputXGradient(model).attribute(images, 1),
    "DeepLift": lambda model, images: captum.DeepLift(model).attribute(images, target=1),
    "GradientShap": lambda model, images: captum.GradientShap(model).attribute(images, images.flip(0), 2, 0.1, target=1),
    "LayerActivation": lambda model, images: captum.LayerActivation(model, layer(model)).attribute(images),
    "LayerGradientXActivation": lambda model, images: captum.LayerGradientXActivation(model, layer(model)).attribute(images, 1),
    "LayerIntegratedGradients": lambda model, images: captum.LayerIntegratedGradients(model, layer(model)).attribute(
        images, target=1, n_steps=3
    ),
    "FeaturePermutation": lambda model, images: captum.FeaturePermutation(model).attribute(images, 1, feature_mask=MASK),
    "ShapleyValueSampling": lambda model, images: captum.ShapleyValueSampling(model).attribute(
        images, target=1, feature_mask=MASK, n_samples=2
    ),
    "KernelShap": lambda model, images: captum.KernelShap(model).attribute(images[:1], target=1, feature_mask=MASK),
    "Lime": lambda model, images: captum.Lime(model).attribute(images[:1], target=1, feature_mask=MASK),
    "FeatureAblation": lambda model, images: captum.FeatureAblation(model).attribute(images, target=1, feature_mask=MASK),
    **{
        f"pair {name}": lambda model, images, name=name: getattr(pair, name)().GetMask(
            images[0].cpu().movedim(0, -1).numpy().astype(np.float32), pair.torch_model(model, 1), **STEPS.get(name, {})
        )
        for name in ("GradientSaliency", "IntegratedGradients", "BlurIG", "GradCam", "Occlusion", "GuidedIG", "XRAI")
    },
    **{
        f"pytorch_grad_cam {name}": lambda model, images, name=name: torch.from_numpy(
            getattr(pytorch_grad_cam, name)(model, [layer(model)])(images, [ClassifierOutputTarget(1)] * len(images))
        )
        for name in ("GradCAM", "GradCAMPlusPlus", "EigenCAM", "ScoreCAM", "AblationCAM", "FullGrad")
    },
}
FIGURES: dict[str, dict[str, Any]] = {
    "deletion": {},
    "insertion": {},
    "road": {"options": {"shares": [0.3]}},
    "average_drop": {},
    "infidelity": {},
    "max_sensitivity": {"method": "smooth_grad", "method_options": {"samples": 2}},
    "mass_in_mask": {"masks": MAPS[:, 0] > 1},
}
WORK: dict[str, Callable[[Any, Tensor], Any]] = {
    **{name: lambda model, images, call=call: call(model, images, 1) for name, call in VARIANTS.items()},
    "an open target": lambda model, images: pysal.gradient(model, images),
    "fills": lambda model, images: pysal.leave_one_out(model, images, fill=images.flip(0), segments=pysal.Grid(2, 2)),
    "class_gradients": lambda model, images: pysal.class_gradients(model, images, [1, 2]),
    "explain": lambda model, images: pysal.explain(model, images, method_options=OPTIONS),
    **{
        f"metrics {name}": lambda model, images, name=name, given=given: pysal.metrics.per_image(
            name, model, images, MAPS, 1, **given
        )
        for name, given in FIGURES.items()
    },
    # an image from which blurring takes nothing has no curve
    "metrics pic": lambda model, images: pysal.metrics.per_image(
        "pic", model, images, MAPS, 1, options={"shares": [0.3], "points": 9}
    ).nan_to_num(-1.0),
    "grid pointing": lambda model, images: pysal.metrics.grid_pointing_game(
        model, torch.cat([images, images.flip(3)]), [0, 1, 2, 3], cells="shrunk"
    ),
    "randomisation": lambda model, images: pysal.metrics.parameter_randomisation(model, images, 1),
    "converge": lambda model, images: plots.converge(model, images[:1], 1, steps=(2, 4), reference=8),
}


def layer(model: nn.Module) -> nn.Module:
    return next(module for module in model.modules() if isinstance(module, nn.Conv2d))
