"""What people use instead: captum, PAIR's saliency and pytorch-grad-cam, each fed by the same torch model."""

import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

Array = NDArray[np.floating[Any]]


class Missing:
    """Stands for a peer that cannot be imported: whatever is asked of it fails with the reason, which its rows then say."""

    def __init__(self, error: ImportError) -> None:
        self._error = error

    def __getattr__(self, name: str) -> Any:
        raise self._error


def imported(name: str) -> Any:
    """Return a peer's module."""
    try:
        with np.errstate(all="ignore"):
            return importlib.import_module(name)
    except ImportError as error:
        return Missing(error)


attr, pair = imported("captum.attr"), imported("saliency.core")


def captum_occlusion(model: nn.Module, image: Tensor, target: int, size: int, at_once: int) -> Tensor:
    window = (image.shape[1], size, size)
    drops = attr.Occlusion(model).attribute(
        image, sliding_window_shapes=window, strides=window, target=target, perturbations_per_eval=at_once
    )
    return drops[:, :1]


def captum_ablation(model: nn.Module, image: Tensor, target: int, labels: Tensor, at_once: int) -> Tensor:
    mask = labels.long().expand(1, 1, -1, -1)
    drops = attr.FeatureAblation(model).attribute(image, feature_mask=mask, target=target, perturbations_per_eval=at_once)
    return drops[:, :1]


def captum_integrated_gradients(model: nn.Module, image: Tensor, target: int, steps: int, batch: int | None) -> Tensor:
    return attr.IntegratedGradients(model).attribute(image, target=target, n_steps=steps, internal_batch_size=batch)


def captum_smooth_grad(model: nn.Module, image: Tensor, target: int, samples: int, noise: float, batch: int | None) -> Tensor:
    tunnel = attr.NoiseTunnel(attr.Saliency(model))
    return tunnel.attribute(
        image,
        nt_type="smoothgrad",
        nt_samples=samples,
        nt_samples_batch_size=batch,
        stdevs=noise * float(image.max() - image.min()),
        target=target,
        abs=False,
    )


def captum_gradient(model: nn.Module, image: Tensor, target: int | Sequence[int]) -> Tensor:
    targets = target if isinstance(target, int) else list(target)
    return attr.Saliency(model).attribute(image, target=targets, abs=False).detach()


def captum_gradients_of_classes(model: nn.Module, image: Tensor, targets: Sequence[int], batch: int) -> Tensor:
    parts = [targets[start : start + batch] for start in range(0, len(targets), batch)]
    return torch.cat([captum_gradient(model, image.repeat(len(part), 1, 1, 1), part) for part in parts])


def captum_guided_backprop(model: nn.Module, image: Tensor, target: int) -> Tensor:
    return attr.GuidedBackprop(model).attribute(image, target=target).detach()


def captum_grad_cam(model: nn.Module, image: Tensor, target: int, layer: nn.Module) -> Tensor:
    cam = attr.LayerGradCam(model, layer).attribute(image, target=target, relu_attributions=True)
    return attr.LayerAttribution.interpolate(cam, image.shape[2:], "bilinear").detach()


def captum_guided_grad_cam(model: nn.Module, image: Tensor, target: int, layer: nn.Module) -> Tensor:
    found = attr.GuidedGradCam(model, layer).attribute(image, target=target, interpolate_mode="bilinear")
    return found.detach()


class PairModel:
    """The function PAIR asks for: a batch (N, H, W, C) in, arrays of the same layout out."""

    def __init__(self, model: nn.Module, target: int, layer: nn.Module | None = None) -> None:
        self.model, self.target, self.layer = model, target, layer
        self.device = next((one.device for one in model.parameters()), torch.device("cpu"))

    def __call__(self, images: Array, call_model_args: object = None, expected_keys: Sequence[str] = ()) -> dict[str, Array]:
        batch = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2), dtype=np.float32)).to(self.device)
        if pair.base.OUTPUT_LAYER_VALUES in expected_keys:
            with torch.no_grad():
                return {pair.base.OUTPUT_LAYER_VALUES: self.model(batch)[:, self.target].cpu().numpy()}
        kept: list[Tensor] = [batch.requires_grad_()]
        if self.layer is None:
            score = self.model(batch)[:, self.target].sum()
        else:
            handle = self.layer.register_forward_hook(lambda _module, _args, output: kept.append(output))
            score = self.model(batch)[:, self.target].sum()
            handle.remove()
        (grad,) = torch.autograd.grad(score, kept[-1])
        if self.layer is None:
            return {pair.base.INPUT_OUTPUT_GRADIENTS: last_channels(grad)}
        return {
            pair.base.CONVOLUTION_LAYER_VALUES: last_channels(kept[-1]),
            pair.base.CONVOLUTION_OUTPUT_GRADIENTS: last_channels(grad),
        }


def last_channels(values: Tensor) -> Array:
    return values.detach().permute(0, 2, 3, 1).cpu().numpy()


def as_map(values: Array) -> Tensor:
    return torch.from_numpy(np.asarray(values, dtype=np.float32)).permute(2, 0, 1)[None]


def pair_gradient(model: nn.Module, image: Tensor, target: int) -> Tensor:
    return as_map(pair.GradientSaliency().GetMask(last_channels(image)[0], PairModel(model, target)))


def pair_integrated_gradients(model: nn.Module, image: Tensor, target: int, steps: int, batch: int) -> Tensor:
    return as_map(
        pair.IntegratedGradients().GetMask(last_channels(image)[0], PairModel(model, target), x_steps=steps, batch_size=batch)
    )


def pair_smooth_grad(model: nn.Module, image: Tensor, target: int, samples: int, noise: float) -> Tensor:
    return as_map(
        pair.GradientSaliency().GetSmoothedMask(
            last_channels(image)[0], PairModel(model, target), nsamples=samples, stdev_spread=noise, magnitude=False
        )
    )


def pair_blur_integrated_gradients(
    model: nn.Module, image: Tensor, target: int, steps: int, max_sigma: float, batch: int
) -> Tensor:
    return as_map(
        pair.BlurIG().GetMask(
            last_channels(image)[0], PairModel(model, target), max_sigma=max_sigma, steps=steps, batch_size=batch
        )
    )


def pair_grad_cam(model: nn.Module, image: Tensor, target: int, layer: nn.Module) -> Tensor:
    """PAIR's small map, enlarged as in the paper; its own enlargement scales the map to a maximum of 1 first."""
    small = pair.GradCam().GetMask(
        last_channels(image)[0], PairModel(model, target, layer), should_resize=False, three_dims=False
    )
    return F.interpolate(torch.from_numpy(small)[None, None], image.shape[2:], mode="bilinear", align_corners=False)


def why_no_pytorch_grad_cam() -> str:
    """Say why pytorch-grad-cam is not among the candidates."""
    try:
        importlib.import_module("pytorch_grad_cam")
    except ImportError as error:
        return f"{error}; it wants torchvision, opencv, ttach and scikit-learn, which this repository does without"
    except Exception as error:  # of a torchvision that does not fit torch, say
        return f"it cannot be imported: {type(error).__name__}: {error}".splitlines()[0]
    return "installed, but its maps are scaled to [0, 1] image by image and have no unit to be compared in"
