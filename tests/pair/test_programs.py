"""A program as PyTorch users of PAIR write it, from the model's function to the pictures, under both imports."""

from types import ModuleType
from typing import Any

import numpy as np
import saliency.core
import torch
from torch import nn

import pysal.pair
from tests.pair.test_against_pair import quantile_of_older_numpy  # noqa: F401, used by every test

CLASS = "class_idx_str"
# Of a gradient one chain is the 96 features and 5 classes, back and forth, and the 27 taps of 6 channels: about 500 roundings.
# A sum of pixels or a blur adds at most the image's 2,016 values; pictures are scaled by their range, a tenth of the values.
ROUNDINGS = 10 * (500 + 2016)
# What PAIR's code adds up in float32 where all it is given is float64: at most 16 cells, or 6 steps and two baselines.
SINGLE, SINGLE_ROUNDINGS = ("smooth", "integrated", "grad_cam", "regions"), 10 * 16


def masks_of(saliency: ModuleType) -> dict[str, np.ndarray]:
    """Explain an image by every method, with hooks on a layer, and return the pictures by name."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = (
            nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(96, 5))
            .double()
            .eval()
        )
    seen: dict[str, np.ndarray] = {}

    def keep(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> None:
        seen[saliency.base.CONVOLUTION_LAYER_VALUES] = output.movedim(1, -1).detach().numpy()
        if output.requires_grad:
            gradients = saliency.base.CONVOLUTION_OUTPUT_GRADIENTS
            output.register_hook(lambda gradient: seen.update({gradients: gradient.movedim(1, -1).numpy()}))

    model[0].register_forward_hook(keep)

    def call_model_function(images: np.ndarray, call_model_args: Any = None, expected_keys: Any = None) -> dict[str, Any]:
        batch = torch.tensor(np.transpose(images, (0, 3, 1, 2)), dtype=torch.float64, requires_grad=True)
        output = model(batch).softmax(1)[:, call_model_args[CLASS]]
        if saliency.base.INPUT_OUTPUT_GRADIENTS in expected_keys:
            (gradients,) = torch.autograd.grad(output, batch, grad_outputs=torch.ones_like(output))
            return {saliency.base.INPUT_OUTPUT_GRADIENTS: np.moveaxis(gradients.numpy(), 1, -1)}
        if saliency.base.OUTPUT_LAYER_VALUES in expected_keys:
            return {saliency.base.OUTPUT_LAYER_VALUES: output.detach().numpy()}
        output.sum().backward()
        return dict(seen)

    random = np.random.default_rng(4)
    image = random.random((28, 24, 3)) * 0.2
    image[6:18, 8:20] += 0.6
    given = (image, call_model_function, {CLASS: 2})
    zeros = np.zeros(image.shape)
    np.random.seed(0)
    fast = saliency.XRAIParameters(steps=5, algorithm="fast")
    found = {
        "vanilla": saliency.GradientSaliency().GetMask(*given),
        "smooth": saliency.GradientSaliency().GetSmoothedMask(*given, nsamples=4),
        "integrated": saliency.IntegratedGradients().GetMask(*given, x_steps=6, x_baseline=zeros, batch_size=4),
        "guided": saliency.GuidedIG().GetMask(*given, x_steps=6, x_baseline=zeros, max_dist=1.0, fraction=0.5),
        "blur": saliency.BlurIG().GetMask(*given, steps=5, batch_size=4),
        "grad_cam": saliency.GradCam().GetMask(*given),
        "occlusion": saliency.Occlusion().GetMask(*given, size=9),
    }
    pictures = {name: saliency.VisualizeImageGrayscale(mask) for name, mask in found.items()}
    pictures |= {f"{name} diverging": saliency.VisualizeImageDiverging(mask) for name, mask in found.items()}
    regions = saliency.XRAI().GetMask(*given, batch_size=8, extra_parameters=saliency.XRAIParameters(steps=5))
    quick = saliency.XRAI().GetMask(*given, batch_size=8, extra_parameters=fast)
    return {**pictures, "regions": regions, "regions, fast": quick, "best": regions > np.percentile(regions, 70)}


def test_a_whole_program_draws_the_same_pictures() -> None:
    """Pictures agree to what their sums are rounded by, as shares of their range."""
    expected, found = masks_of(saliency.core), masks_of(pysal.pair)
    assert list(found) == list(expected)
    for name, picture in found.items():
        if picture.dtype == bool:
            assert np.array_equal(picture, expected[name]), name
        else:
            scale = float(np.abs(expected[name]).max())
            single = name.startswith(SINGLE)
            roundoff = SINGLE_ROUNDINGS * np.finfo(np.float32).eps if single else ROUNDINGS * np.finfo(np.float64).eps
            atol = roundoff * scale
            np.testing.assert_allclose(picture, expected[name], rtol=0, atol=atol, err_msg=name)
