"""PAIR's performance information curves: softmax information curves (SIC) and accuracy information curves (AIC)."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from pysal._checks import check_choice, check_count, refuse
from pysal.metrics.information_curves import NoInformation, area, compressed_bytes, information_curve, random_mask, shown
from pysal.pair.base import Array

__all__ = [
    "AggregateMetricResult",
    "ComputePicMetricError",
    "PicMetricResult",
    "aggregate_individual_pic_results",
    "compute_pic_metric",
    "create_blurred_image",
    "estimate_image_entropy",
    "generate_random_mask",
]

ComputePicMetricError = NoInformation
WHERE = "pysal.pair.metrics.pic"


class PicMetricResult(NamedTuple):
    """What `compute_pic_metric` returns: the curve, the blurred images with their predictions and thresholds, and its area."""

    curve_x: Array | Sequence[float]
    curve_y: Array | Sequence[float]
    blurred_images: Sequence[Array]
    predictions: Sequence[float]
    thresholds: Sequence[float]
    auc: float


class AggregateMetricResult(NamedTuple):
    """What `aggregate_individual_pic_results` returns: the curve of many images, and its area."""

    curve_x: Array | Sequence[float]
    curve_y: Array | Sequence[float]
    auc: float


def create_blurred_image(full_img: Array, pixel_mask: Array, method: str = "linear") -> Array:
    """Return an image of which the pixels of a mask and the corners are kept, and all others interpolated between these.

    Args:
        full_img: (H, W, C) or (H, W).
        pixel_mask: (H, W).
        method: "linear" or "nearest".

    Raises:
        ValueError: the mask has another size.
    """
    if np.shape(pixel_mask) != np.shape(full_img)[:2]:
        refuse(WHERE, "pixel_mask", f"have the image's height and width, {np.shape(full_img)[:2]}", np.shape(pixel_mask))
    check_choice(WHERE, "method", method, ("linear", "nearest"))
    return shown(np.asarray(full_img), pixel_mask, method)


def generate_random_mask(image_height: int, image_width: int, fraction: float = 0.01) -> Array:
    """Return a mask (H, W), True at a random fraction of the pixels, by NumPy's global generator."""
    if not 0 <= fraction <= 1:
        refuse(WHERE, "fraction", "be a number from 0 to 1", fraction)
    return random_mask(image_height, image_width, fraction)


def estimate_image_entropy(image: Array) -> float:
    """Return the bytes of an image (H, W, C) or (H, W), uint8, as a lossless WebP file."""
    return compressed_bytes(image)


def compute_pic_metric(
    img: Array,
    saliency_map: Array,
    random_mask: Array,
    pred_func: Callable[[Array], Sequence[float]],
    saliency_thresholds: Sequence[float],
    min_pred_value: float = 0.8,
    keep_monotonous: bool = True,
    num_data_points: int = 1000,
) -> PicMetricResult:
    """Return the curve of one image: the prediction against the information of versions that show the most important pixels.

    Args:
        img: (H, W, C) or (H, W), uint8.
        saliency_map: (H, W), larger is more important.
        random_mask: (H, W), pixels that every version shows.
        pred_func: prediction of a batch (1, H, W, C) or (1, H, W), uint8: the softmax of the class for SIC, whether it is right
            (1.0 or 0.0) for AIC.
        saliency_thresholds: ascending shares of the pixels that are shown.
        min_pred_value: least prediction of the image.
        keep_monotonous: whether each point has the best prediction so far.
        num_data_points: points of the curve, beside (1, 1).

    Raises:
        ComputePicMetricError: there is no curve: its prediction is too low or no higher than that of the blurred image, or it
            takes no more bytes. Skip the image.
        ValueError: img is not uint8, or the map or the mask has another size.

    Source:
        Kapishnikov et al. 2019, arXiv:1906.02825, section 4.1.
    """
    if np.asarray(img).dtype != np.uint8:
        refuse(WHERE, "img", "be of type uint8", np.asarray(img).dtype)
    for name, array in (("saliency_map", saliency_map), ("random_mask", random_mask)):
        if np.shape(array) != np.shape(img)[:2]:
            refuse(WHERE, name, f"have the image's height and width, {np.shape(img)[:2]}", np.shape(array))
    check_count(WHERE, "num_data_points", num_data_points)
    curve = information_curve(
        np.asarray(img),
        np.asarray(saliency_map),
        np.asarray(random_mask, bool),
        pred_func,
        saliency_thresholds,
        least=min_pred_value,
        monotonous=keep_monotonous,
        points=num_data_points,
    )
    thresholds = [0.0, *saliency_thresholds, 1.0]
    return PicMetricResult(curve.information, curve.prediction, curve.images, curve.predictions, thresholds, curve.auc)


def aggregate_individual_pic_results(
    compute_pic_metrics_results: Sequence[PicMetricResult], method: str = "median"
) -> AggregateMetricResult:
    """Return the curve of one saliency method over many images.

    Args:
        compute_pic_metrics_results: of `compute_pic_metric`, with the same points.
        method: "mean" or "median".

    Raises:
        ValueError: no results, results of other points, or an unknown method.
    """
    if not compute_pic_metrics_results:
        refuse(WHERE, "compute_pic_metrics_results", "have at least one element", "none")
    check_choice(WHERE, "method", method, ("mean", "median"))
    first = np.asarray(compute_pic_metrics_results[0].curve_x)
    if not all(np.array_equal(first, one.curve_x) for one in compute_pic_metrics_results):
        refuse(WHERE, "compute_pic_metrics_results", "have the same curve_x", "other points")
    summary: Any = np.mean if method == "mean" else np.median
    curve = summary([one.curve_y for one in compute_pic_metrics_results], axis=0)
    return AggregateMetricResult(first, curve, area(first, curve))
