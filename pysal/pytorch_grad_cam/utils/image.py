"""Images in and out, as the peer has them, without OpenCV."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pysal._checks import check_tensor, refuse
from pysal.methods.cam_kinds import unit
from pysal.methods.grad_cam import resized
from pysal.viz.heat import around_grey, blended, factors, jet

COLORMAP_JET = 2
HERE = "pysal.pytorch_grad_cam.utils.image"


def preprocess_image(
    img: NDArray[Any], mean: Sequence[float] = (0.5, 0.5, 0.5), std: Sequence[float] = (0.5, 0.5, 0.5)
) -> Tensor:
    """Return an image (H, W, C) as a model's input (1, C, H, W): whole numbers of a byte over 255, less mean, over std."""
    pixels = torch.from_numpy(np.array(img))
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    channels = pixels.permute(2, 0, 1)
    if channels.dtype == torch.uint8:
        channels = channels.to(torch.get_default_dtype()) / 255
    levels = [torch.as_tensor(one, dtype=channels.dtype, device="cpu")[:, None, None] for one in (mean, std)]
    return ((channels - levels[0]) / levels[1])[None].contiguous()


def deprocess_image(img: NDArray[Any]) -> NDArray[np.uint8]:
    """Return any numbers as a picture of their shape: their mean is grey."""
    return around_grey(np.asarray(img))


def show_cam_on_image(
    img: NDArray[Any],
    mask: NDArray[Any],
    use_rgb: bool = False,
    colormap: int = COLORMAP_JET,
    image_weight: float = 0.5,
) -> NDArray[np.uint8]:
    """Return a map as colours over an image, (H, W, 3).

    Args:
        img: (H, W, 3), in [0, 1].
        mask: (H, W), in [0, 1].
        use_rgb: whether red comes first, in the image and in the colours; else blue.
        colormap: OpenCV's number; those other than JET need cv2.
        image_weight: of the image, in [0, 1].

    Raises:
        ValueError: an image or a weight outside [0, 1].
    """
    if np.max(img) > 1:
        refuse(f"{HERE}.show_cam_on_image", "img", "be in [0, 1]", f"a largest value of {float(np.max(img)):.4g}")
    if not 0 <= image_weight <= 1:
        refuse(f"{HERE}.show_cam_on_image", "image_weight", "be in [0, 1]", image_weight)
    levels = (255 * np.asarray(mask)).astype(np.uint8)
    colours = jet(levels) if colormap == COLORMAP_JET else _with_opencv(levels, colormap)
    return blended(np.asarray(img), colours if use_rgb else colours[..., ::-1], image_weight)


def _with_opencv(levels: NDArray[np.uint8], colormap: int) -> NDArray[np.uint8]:
    try:
        import cv2
    except ImportError as error:
        refuse(f"{HERE}.show_cam_on_image", "colormap", "be JET (2) where cv2 is not installed", colormap, ImportError)
        raise error
    return np.asarray(cv2.applyColorMap(levels, colormap)[..., ::-1], dtype=np.uint8)


def scale_cam_image(cam: Any, target_size: tuple[int, int] | None = None) -> NDArray[np.float32]:
    """Return maps (N, h, w) each scaled to [0, 1] and, with a size (width, height), resized bilinearly."""
    maps = unit(torch.from_numpy(np.stack([np.asarray(one, dtype=np.float32) for one in cam]))[:, None])
    if target_size is not None:
        check_tensor(f"{HERE}.scale_cam_image", "cam", maps, ndim=4)
        maps = resized(maps, (target_size[1], target_size[0]))
    answer: NDArray[np.float32] = maps[:, 0].numpy()
    return answer


def scale_accross_batch_and_channels(tensor: NDArray[Any], target_size: tuple[int, int]) -> NDArray[np.float32]:
    """Return maps (B, K, h, w) each scaled to [0, 1] and resized to (width, height)."""
    scaled = scale_cam_image(tensor.reshape(-1, *tensor.shape[2:]), target_size)
    return scaled.reshape(*tensor.shape[:2], target_size[1], target_size[0])


def create_labels_legend(concept_scores: NDArray[Any], labels: Any, top_k: int = 2) -> list[str]:
    """Return for each concept, (N, K) scores, its highest classes and their scores, a line each."""
    order = np.argsort(concept_scores, axis=1)[:, ::-1][:, :top_k]
    return [
        "\n".join(f"{','.join(labels[one].split(',')[:3])}:{scores[one]:.2f}" for one in best)
        for scores, best in zip(concept_scores, order, strict=True)
    ]


def show_factorization_on_image(
    img: NDArray[Any],
    explanations: NDArray[Any],
    colors: Sequence[NDArray[Any]] | None = None,
    image_weight: float = 0.5,
    concept_labels: Sequence[str] | None = None,
) -> NDArray[np.uint8]:
    """Return several maps over an image, every pixel in the colour of the one that is largest there.

    Args:
        img: (H, W, 3), in [0, 1].
        explanations: (N, H, W), in [0, 1].
        colors: N of them; None = a rainbow.
        image_weight: of the image, in [0, 1].
        concept_labels: what to call each; the peer's own draws the legend.
    """
    if concept_labels is not None:
        from pysal.pytorch_grad_cam._elsewhere import GRAD_CAM

        theirs: Callable[..., NDArray[np.uint8]] = GRAD_CAM.falling_through(__name__)("show_factorization_on_image")
        return theirs(img, explanations, colors, image_weight, concept_labels)
    return factors(np.asarray(img), np.asarray(explanations), colors, image_weight)
