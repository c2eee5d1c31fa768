"""PAIR's XRAI."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from pysal._checks import check_choice, refuse
from pysal.methods.xrai import ALGORITHMS, Algorithm, ranked, regions
from pysal.pair.base import INPUT_OUTPUT_GRADIENTS, Array, CallModel, CoreSaliency
from pysal.pair.integrated_gradients import IntegratedGradients

__all__ = ["XRAI", "XRAIOutput", "XRAIParameters"]


class XRAIParameters:
    """How XRAI runs, and what it returns beside its map.

    Args:
        steps: number of gradients for each baseline.
        area_threshold: the full algorithm takes no more regions once they cover this share of the image.
        return_baseline_predictions: PAIR accepts it and does nothing with it.
        return_ig_attributions: whether to return the integrated gradients of each baseline.
        return_xrai_segments: whether to return what each region added.
        flatten_xrai_segments: whether that is one array of ranks, 1 = the densest, or a list of masks.
        algorithm: "full", or "fast", which ranks the regions once.

    Attributes:
        experimental_params: "min_pixel_diff", 50: pixels that a region must add.
    """

    def __init__(
        self,
        steps: int = 100,
        area_threshold: float = 1.0,
        return_baseline_predictions: bool = False,
        return_ig_attributions: bool = False,
        return_xrai_segments: bool = False,
        flatten_xrai_segments: bool = True,
        algorithm: Algorithm = "full",
    ) -> None:
        self.steps = steps
        self.area_threshold = area_threshold
        self.return_baseline_predictions = return_baseline_predictions
        self.return_ig_attributions = return_ig_attributions
        self.return_xrai_segments = return_xrai_segments
        self.flatten_xrai_segments = flatten_xrai_segments
        self.algorithm = algorithm
        self.experimental_params = {"min_pixel_diff": 50}


class XRAIOutput:
    """What `XRAI.GetMaskWithDetails` returns.

    Attributes:
        attribution_mask: the map, (H, W).
        baselines: the baselines; None where the attribution was given.
        ig_attribution: the integrated gradients of each baseline, where they were asked for.
        segments: ranks (H, W) or a list of masks (H, W), where they were asked for.
    """

    def __init__(self, attribution_mask: Array) -> None:
        self.attribution_mask = attribution_mask
        self.baselines: Sequence[Array] | None = None
        self.ig_attribution: Any = None
        self.segments: Any = None


class XRAI(CoreSaliency):
    """The mean integrated gradients of regions, as `pysal.xrai`.

    Source:
        Kapishnikov et al. 2019, arXiv:1906.02825.

    Deviations:
        An image of one value has one region. PAIR divides zero by zero.
    """

    expected_keys = (INPUT_OUTPUT_GRADIENTS,)

    def __init__(self) -> None:
        self._integrated_gradients = IntegratedGradients()

    def GetMask(
        self,
        x_value: ArrayLike,
        call_model_function: CallModel,
        call_model_args: Any = None,
        baselines: Sequence[ArrayLike] | None = None,
        segments: Sequence[ArrayLike] | None = None,
        base_attribution: ArrayLike | None = None,
        batch_size: int = 1,
        extra_parameters: XRAIParameters | None = None,
    ) -> Array:
        """Return the map, (H, W): the mean attribution of the region that each pixel belongs to.

        Args:
            x_value: an image (H, W, C).
            call_model_function: see `CoreSaliency.GetMask`.
            call_model_args: see `CoreSaliency.GetMask`.
            baselines: baselines of x_value's shape; None = two: its lowest value everywhere, and its highest.
            segments: masks (H, W) of the regions, bool; None = Felzenszwalb's at six scales.
            base_attribution: an attribution of x_value's shape in place of integrated gradients.
            batch_size: most steps in one call of the model; it does not change the result.
            extra_parameters: see `XRAIParameters`; None = its defaults.

        Raises:
            ValueError: an unknown algorithm, or a baseline, an attribution or a mask of another shape.
        """
        found = self.GetMaskWithDetails(
            x_value,
            call_model_function,
            call_model_args=call_model_args,
            baselines=baselines,
            segments=segments,
            base_attribution=base_attribution,
            batch_size=batch_size,
            extra_parameters=extra_parameters,
        )
        return found.attribution_mask

    def GetMaskWithDetails(
        self,
        x_value: ArrayLike,
        call_model_function: CallModel,
        call_model_args: Any = None,
        baselines: Sequence[ArrayLike] | None = None,
        segments: Sequence[ArrayLike] | None = None,
        base_attribution: ArrayLike | None = None,
        batch_size: int = 1,
        extra_parameters: XRAIParameters | None = None,
    ) -> XRAIOutput:
        """Return the map and what `extra_parameters` asks for; the arguments are those of `GetMask`."""
        asked = extra_parameters or XRAIParameters()
        check_choice("pysal.pair", "algorithm", asked.algorithm, ALGORITHMS)
        value = np.asarray(x_value)
        if segments is None and value.ndim != 3:
            refuse("pysal.pair", "x_value", "be an image (H, W, C), or be given with its segments", f"shape {value.shape}")
        masks = None if segments is None else _masks(segments, value.shape[:2])
        starts: list[Array] | None = None
        if base_attribution is None:
            starts = _baselines(value, baselines)
            found: Any = [
                self._integrated_gradients.GetMask(
                    value,
                    call_model_function,
                    call_model_args=call_model_args,
                    x_baseline=start,
                    x_steps=asked.steps,
                    batch_size=batch_size,
                )
                for start in starts
            ]
            attribution = np.mean(found, axis=0)
        else:
            found = attribution = np.asarray(base_attribution)
            if attribution.shape != value.shape:
                found_shape = attribution.shape  # said in PAIR's words, which its tests look for
                raise ValueError(
                    f"pysal.pair: The base attribution shape should be that of x_value, {value.shape}, got {found_shape}"
                )
        map, added = ranked(
            attribution.max(axis=-1) if attribution.ndim > 2 else attribution,
            regions(value) if masks is None else masks,
            algorithm=asked.algorithm,
            area=asked.area_threshold,
            least=asked.experimental_params["min_pixel_diff"],
        )
        output = XRAIOutput(map)
        output.baselines = starts
        if asked.return_xrai_segments:
            output.segments = _ranks(added, map.shape) if asked.flatten_xrai_segments else added
        if asked.return_ig_attributions:
            output.ig_attribution = found
        return output


def _baselines(value: Array, baselines: Sequence[ArrayLike] | None) -> list[Array]:
    if baselines is None:
        return [np.full_like(value, end) for end in (value.min(), value.max())]
    given = [np.asarray(one) for one in baselines]
    for one in given:
        if one.shape != value.shape:
            refuse("pysal.pair", "baselines", f"have the shape of x_value, {value.shape}", one.shape)
    return given


def _masks(segments: Sequence[ArrayLike], shape: tuple[int, ...]) -> Array:
    masks = [np.asarray(mask, bool) for mask in segments]
    if not masks:
        refuse("pysal.pair", "segments", "hold at least one mask", "none")
    for mask in masks:
        if mask.shape != shape:
            refuse("pysal.pair", "segments", f"be masks of shape {shape}", mask.shape)
    return np.stack(masks)


def _ranks(added: Sequence[Array], shape: tuple[int, ...]) -> Array:
    ranks = np.zeros(shape, int)
    for rank, mask in enumerate(added, 1):
        ranks[mask] = rank
    return ranks
