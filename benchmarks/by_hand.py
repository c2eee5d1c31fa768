"""Every method as people write it by hand in plain PyTorch: to be read, right, and without tricks."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn

# IG and SmoothGrad by hand put this many steps into one batch.
BATCH = 10


def gradient(model: nn.Module, image: Tensor, target: int) -> Tensor:
    leaf = image.clone().requires_grad_()
    model(leaf)[:, target].sum().backward(inputs=[leaf])
    assert leaf.grad is not None
    return leaf.grad


def integrated_gradients(model: nn.Module, image: Tensor, target: int, steps: int, *, ends: bool = False) -> Tensor:
    """Gauss-Legendre from black; with `ends` the mean over equal steps that include both ends, as PAIR has it."""
    places, weights = np.polynomial.legendre.leggauss(steps)
    if ends:
        places, weights = np.linspace(-1, 1, steps), np.full(steps, 2 / steps)
    alphas = torch.from_numpy((places + 1) / 2).to(image)
    shares = torch.from_numpy(weights / 2).to(image)
    total = torch.zeros_like(image)
    for start in range(0, steps, BATCH):
        batch = alphas[start : start + BATCH].view(-1, 1, 1, 1) * image
        weighted = shares[start : start + BATCH].view(-1, 1, 1, 1) * gradient(model, batch, target)
        total += weighted.sum(0, keepdim=True)
    return total * image


def smooth_grad(model: nn.Module, image: Tensor, target: int, samples: int, noise: float) -> Tensor:
    sigma = noise * (image.max() - image.min())
    total = torch.zeros_like(image)
    for start in range(0, samples, BATCH):
        rows = min(BATCH, samples - start)
        noisy = image + sigma * torch.randn(rows, *image.shape[1:], dtype=image.dtype, device=image.device)
        total += gradient(model, noisy, target).sum(0, keepdim=True)
    return total / samples


def blur_integrated_gradients(model: nn.Module, image: Tensor, target: int, steps: int, max_sigma: float) -> Tensor:
    """Blurs by SciPy, one step at a time, as PAIR does."""

    def blurred(sigma: float) -> Tensor:
        return torch.from_numpy(gaussian_filter(image.cpu().numpy(), (0, 0, sigma, sigma), mode="constant")).to(image.device)

    width, step = max_sigma / steps, 0.01
    total = torch.zeros_like(image)
    for i in range(steps):
        here = blurred(i * width)
        slope = (blurred(i * width + step) - here) / step
        total -= width * slope * gradient(model, here, target)
    return total


def occlusion(model: nn.Module, image: Tensor, target: int, size: int) -> Tensor:
    """The drop of the score with each window black, at the window's pixels."""
    drops = torch.zeros_like(image[:, :1])
    with torch.no_grad():
        clean = model(image)[0, target]
        for top in range(0, image.shape[2], size):
            for left in range(0, image.shape[3], size):
                occluded = image.clone()
                occluded[:, :, top : top + size, left : left + size] = 0
                drops[:, :, top : top + size, left : left + size] = clean - model(occluded)[0, target]
    return drops


def ablation(model: nn.Module, image: Tensor, target: int, labels: Tensor) -> Tensor:
    """The drop of the score with each segment black; `labels` (H, W)."""
    drops = torch.zeros_like(image[:, :1])
    with torch.no_grad():
        clean = model(image)[0, target]
        for label in labels.unique():
            segment = labels == label
            drops[:, :, segment] = clean - model(image * ~segment)[0, target]
    return drops


@contextmanager
def guided(model: nn.Module) -> Iterator[None]:
    """Every ReLU lets only positive gradients pass."""

    def hook(_module: nn.Module, grad_input: tuple[Tensor, ...], _grad_output: object) -> tuple[Tensor, ...]:
        return (grad_input[0].clamp(min=0),)

    relus = [module for module in model.modules() if isinstance(module, (nn.ReLU, nn.ReLU6))]
    handles = [relu.register_full_backward_hook(hook) for relu in relus]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def guided_backprop(model: nn.Module, image: Tensor, target: int) -> Tensor:
    with guided(model):
        return gradient(model, image, target)


def grad_cam(model: nn.Module, image: Tensor, target: int, layer: nn.Module) -> Tensor:
    kept: list[Tensor] = []
    handle = layer.register_forward_hook(lambda _module, _args, output: kept.append(output))
    try:
        score = model(image)[:, target].sum()
    finally:
        handle.remove()
    (activation,) = kept
    (grad,) = torch.autograd.grad(score, activation)
    cam = (grad.mean((2, 3), keepdim=True) * activation).sum(1, keepdim=True).relu().detach()
    return F.interpolate(cam, image.shape[2:], mode="bilinear", align_corners=False)


def guided_grad_cam(model: nn.Module, image: Tensor, target: int, layer: nn.Module) -> Tensor:
    return guided_backprop(model, image, target) * grad_cam(model, image, target, layer)


def gradients_of_classes(model: nn.Module, image: Tensor, targets: Sequence[int]) -> Tensor:
    """(K, C, H, W), by one forward pass and one backward pass per class."""
    leaf = image.clone().requires_grad_()
    scores = model(leaf)[0]
    return torch.cat([torch.autograd.grad(scores[target], leaf, retain_graph=True)[0] for target in targets])
