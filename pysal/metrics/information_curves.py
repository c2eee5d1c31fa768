"""Performance information curves: the prediction against how much of the image is shown, measured in compressed bytes."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.interpolate import griddata

Array: TypeAlias = NDArray[Any]


class NoInformation(ValueError):
    """An image on which there is no curve, because nothing of it is lost when it is blurred."""


@dataclass(frozen=True)
class InformationCurve:
    """The prediction on the way from a blurred image to the image.

    Attributes:
        information: (points,) from 0, what the blurred image holds, to 1.
        prediction: (points,) likewise, from 0 to 1.
        images: the blurred image, the versions in between, and the image.
        predictions: of these.
    """

    information: Array
    prediction: Array
    images: list[Array]
    predictions: list[float]

    @property
    def auc(self) -> float:
        """The area under the curve by the trapezoidal rule."""
        return area(self.information, self.prediction)


def area(information: Array, prediction: Array) -> float:
    """Return the area under a curve by the trapezoidal rule."""
    widths, heights = np.diff(information), (prediction[1:] + prediction[:-1]) / 2
    return float((widths * heights).sum())


def shown(image: Array, mask: Array, method: str = "linear") -> Array:
    """Return an image (H, W) or (H, W, C) of which only the pixels of a mask (H, W) and the corners are known.

    All others are interpolated between these. Where all are known it is the image itself.
    """
    known = np.array(mask, dtype=bool)
    known[[0, 0, -1, -1], [0, -1, 0, -1]] = True
    if known.all():
        return image
    planes = np.atleast_3d(image)
    filled = planes.astype(np.result_type(planes.dtype, np.float32))
    # all channels at once: the triangles between the known pixels are found once
    between = griddata(np.argwhere(known), planes[known], np.argwhere(~known), method=method)
    filled[~known] = np.where(np.isnan(between), planes.mean((0, 1)), between)
    if np.issubdtype(image.dtype, np.integer):
        filled = np.round(filled)
    result: Array = filled.astype(image.dtype).reshape(image.shape)
    return result


def compressed_bytes(image: Array) -> int:
    """Return the length of an image, uint8, as a lossless WebP file."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="webp", lossless=True, quality=100)
    return file.tell()


def random_mask(height: int, width: int, share: float) -> Array:
    """Return a mask (H, W) of randomly drawn pixels, by NumPy's global generator, as PAIR's programs seed it."""
    mask = np.zeros(height * width, dtype=bool)
    mask[np.random.choice(mask.size, replace=False, size=int(mask.size * share))] = True
    return mask.reshape(height, width)


def information_curve(
    image: Array,
    map: Array,
    seen: Array,
    predict: Callable[[Array], Sequence[float]],
    shares: Sequence[float],
    *,
    least: float,
    monotonous: bool,
    points: int,
) -> InformationCurve:
    """Return the curve of one image: predictions on its versions, of which the most important pixels are shown.

    Args:
        image: (H, W) or (H, W, C), uint8.
        map: (H, W), larger is more important.
        seen: (H, W) pixels that are always shown.
        predict: of a batch of one image.
        shares: of the most important pixels that are shown, ascending.
        least: prediction of the image below which there is no curve.
        monotonous: whether each point takes the best prediction so far.
        points: of the curve, beside the last one.

    Raises:
        NoInformation: the prediction on the image is too low, or blurring takes nothing from it.

    Source:
        Kapishnikov et al. 2019, arXiv:1906.02825, section 4.1.
    """

    def answer(one: Array) -> float:
        return float(predict(one[None])[0])

    whole, blurred = compressed_bytes(image), shown(image, seen)
    base = compressed_bytes(blurred)
    best = answer(image)
    if best < least:
        raise NoInformation(f"the prediction on the image must be at least min_pred_value, {least}, got {best}; skip the image")
    worst = answer(blurred)
    if base >= whole:
        raise NoInformation(f"the blurred image must take fewer bytes than the image, {whole}, got {base}; skip the image")
    if worst >= best:
        raise NoInformation(
            f"the prediction on the blurred image must be below that on the image, {best}, got {worst}; skip it"
        )
    between = versions(image, map, seen, shares)
    images, predictions = [blurred, *between, image], [worst, *(answer(version) for version in between), best]
    sizes = [compressed_bytes(version) for version in images]
    information, prediction = curve_of(sizes, predictions, monotonous=monotonous, points=points)
    return InformationCurve(information, prediction, images, predictions)


def versions(image: Array, map: Array, seen: Array, shares: Sequence[float]) -> list[Array]:
    """Return the image with a share of its most important pixels shown, for each share."""
    return [shown(image, (map >= np.quantile(map, 1 - share)) | seen) for share in shares]


def curve_of(sizes: Sequence[int], predictions: Sequence[float], *, monotonous: bool, points: int) -> tuple[Array, Array]:
    """Return information and prediction (points + 1,), both from 0 to 1, of the blurred image, its versions and the image.

    Args:
        sizes: compressed bytes of each; the first is below the last.
        predictions: of each; likewise.
        monotonous: whether each point takes the best prediction so far.
        points: of the curve, beside the last one.
    """
    found, highest = [], 0.0
    for size, one in zip(sizes[1:-1], predictions[1:-1], strict=True):
        information = np.clip((size - sizes[0]) / (sizes[-1] - sizes[0]), 0.0, 1.0)
        prediction = np.clip((one - predictions[0]) / (predictions[-1] - predictions[0]), 0.0, 1.0)
        highest = max(highest, prediction)
        found.append((information, highest if monotonous else prediction))
    measured, reached = np.array(sorted([*found, (0.0, 0.0), (1.0, 1.0)], key=lambda point: point[0])).T
    places = np.linspace(0.0, 1.0, points, endpoint=False)
    return np.append(places, 1.0), np.append(np.interp(places, measured, reached), 1.0)
