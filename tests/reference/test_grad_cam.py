"""The oracle of grad_cam against the definition written as loops."""

import numpy as np
import pytest
import torch

from pysal.reference.grad_cam import grad_cam


def bilinear(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Sample at pixel centres: (i + 1/2) h / H - 1/2, clamped to the image (align_corners=False)."""
    h, w = image.shape
    y = np.clip((np.arange(height) + 0.5) * h / height - 0.5, 0, h - 1)
    x = np.clip((np.arange(width) + 0.5) * w / width - 0.5, 0, w - 1)
    out = np.empty((height, width))
    for i, j in np.ndindex(height, width):
        top, left = int(y[i]), int(x[j])
        bottom, right = min(top + 1, h - 1), min(left + 1, w - 1)
        dy, dx = y[i] - top, x[j] - left
        out[i, j] = (1 - dy) * ((1 - dx) * image[top, left] + dx * image[top, right]) + dy * (
            (1 - dx) * image[bottom, left] + dx * image[bottom, right]
        )
    return out


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("size", [(3, 4), (7, 9), (2, 3), (1, 1), (3, 8)], ids=str)
def test_is_the_weighted_sum_of_the_activations_resized(size: tuple[int, int], relu: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    activations, gradients = torch.randn(2, 2, 5, 3, 4, generator=generator, dtype=torch.float64)
    out = grad_cam(activations, gradients, *size, relu)

    assert out.shape == (2, 1, *size)
    for b in range(2):
        cam = np.zeros((3, 4))
        for k in range(5):
            cam += gradients[b, k].numpy().mean() * activations[b, k].numpy()
        if relu:
            cam = np.maximum(cam, 0)
        np.testing.assert_allclose(out[b, 0].numpy(), bilinear(cam, *size), rtol=1e-12, atol=1e-14)


def test_linear_head_after_global_pooling_gives_its_class_activation_map() -> None:
    # f = sum_k v_k mean(A_k): every gradient is v_k / (h w), so the map is CAM / (h w) (Selvaraju 2016, section 3)
    generator = torch.Generator().manual_seed(1)
    activations = torch.rand(1, 4, 3, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    head = torch.randn(4, generator=generator, dtype=torch.float64)
    (gradients,) = torch.autograd.grad((activations.mean((2, 3)) * head).sum(), activations)
    out = grad_cam(activations.detach(), gradients, 3, 3, False)
    expected = torch.einsum("k,bkhw->bhw", head, activations.detach())[:, None] / 9
    torch.testing.assert_close(out, expected, rtol=1e-13, atol=0)


def test_half_precision_is_computed_in_single() -> None:
    generator = torch.Generator().manual_seed(2)
    activations, gradients = torch.randn(2, 1, 64, 4, 4, generator=generator).half()
    out = grad_cam(activations, gradients, 8, 8, True)
    assert out.dtype == torch.float16
    assert torch.equal(out, grad_cam(activations.float(), gradients.float(), 8, 8, True).half())
