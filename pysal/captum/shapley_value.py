"""captum's ShapleyValueSampling and ShapleyValues."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pysal._checks import refuse, warn
from pysal.captum._ablating import Ablating
from pysal.captum._bases import Baselines, entry, introduce, where
from pysal.captum._call import Inputs, Target, as_tuple, check_rows, check_target
from pysal.engine.ablation.coalitions import exact_values, sampled_values
from pysal.engine.ablation.features import Masks

# Sets of so many features take long: twice as many for each more.
MANY = 16


class ShapleyValueSampling(Ablating):
    """What a feature adds to those before it, in the mean over random orders: an estimate of Shapley values.

    A set of features that comes up in several orders runs once.

    Args:
        forward_func: see `FeatureAblation`.

    Source:
        Castro, Gomez and Tejada 2009; Strumbelj and Kononenko 2010.

    Example:
        >>> ShapleyValueSampling(lambda x: x.prod(1)).attribute(torch.tensor([[2.0, 3.0]]), n_samples=100).sum()
        tensor(6.)
    """

    misfit = AssertionError

    @entry
    def attribute(
        self,
        inputs: Inputs,
        baselines: Baselines = None,
        target: Target = None,
        additional_forward_args: object = None,
        feature_mask: Tensor | tuple[Tensor, ...] | None = None,
        n_samples: int = 25,
        perturbations_per_eval: int = 1,
        show_progress: bool = False,
    ) -> Any:
        """Return, at each element, the value of its feature.

        Args:
            inputs: (B, ...), or a tuple of such tensors.
            baselines: see `FeatureAblation`.
            target: see `FeatureAblation`.
            additional_forward_args: see `Saliency`.
            feature_mask: see `FeatureAblation`.
            n_samples: orders, drawn from torch's generator as captum draws them.
            perturbations_per_eval: most sets of features in one pass, each with all examples.
            show_progress: show a tqdm bar.

        Returns:
            (..., ...), the shape of the output and behind it that of an example, float32; a tuple of them for a tuple.

        Raises:
            AssertionError: see `FeatureAblation`.
        """
        several = as_tuple(inputs)
        if not isinstance(n_samples, int) or n_samples < 1:
            refuse(where(self), "n_samples", "be a whole number of at least 1", repr(n_samples), AssertionError)
        masks = self._masks(feature_mask, several, whole=True)
        total = 1 + max((int(one.max()) for one in masks if one.numel()), default=-1)
        orders = [torch.randperm(total, device="cpu").tolist() for _ in range(n_samples)]
        return self._values(
            inputs, baselines, target, additional_forward_args, masks, perturbations_per_eval, show_progress, orders
        )

    def _values(
        self,
        inputs: Inputs,
        baselines: Baselines,
        target: Target,
        additional_forward_args: object,
        masks: tuple[Tensor, ...],
        perturbations_per_eval: int,
        show_progress: bool,
        orders: list[list[int]] | None,
    ) -> Any:
        several = as_tuple(inputs)
        check_rows(where(self), several)
        if not len(several[0]):
            refuse(where(self), "inputs", "hold at least one example", f"shape {tuple(several[0].shape)}", ValueError)
        features = Masks(masks, several)
        ablation = self._ablation(several, baselines, features)
        chunk = self._checked(perturbations_per_eval)
        check_target(where(self), target, len(several[0]))
        shape: list[int] = []

        def worth(sets: NDArray[np.bool_]) -> Tensor:
            found, one = self._worth(ablation, sets, target, additional_forward_args, chunk, show_progress)
            shape.extend(one)
            return found

        # numbers that no element has are skipped; elements of numbers below 0 are never there, as in captum
        places = {label: feature for feature, label in enumerate(features.labels) if label >= 0}

        def worth_of_places(sets: NDArray[np.bool_]) -> Tensor:
            whole = np.zeros((len(sets), len(features)), dtype=bool)
            whole[:, list(places.values())] = sets
            return worth(whole)

        with torch.no_grad():
            if orders is None:
                found = exact_values(len(places), worth_of_places)
                values = found.new_zeros((len(features), *found.shape[1:]))
                values[list(places.values())] = found
            else:
                own = [[places[label] for label in order if label in places] for order in orders]
                values = sampled_values(own, len(features), worth)
            maps = []
            for number, one in enumerate(several):
                spread = features.spread(number, one, values.flatten(1).float().to(one.device))
                maps.append(spread.reshape(*shape, *one.shape[1:]))
        return tuple(maps) if isinstance(inputs, tuple) else maps[0]


class ShapleyValues(ShapleyValueSampling):
    """The Shapley values themselves, from all sets of features: 2^F of them, not the orders, of which there are F!.

    Args:
        forward_func: see `FeatureAblation`.

    Source:
        Shapley 1953, A value for n-person games.

    Example:
        >>> ShapleyValues(lambda x: x.prod(1)).attribute(torch.tensor([[2.0, 3.0]]))
        tensor([[3., 3.]])
    """

    @entry
    def attribute(  # type: ignore[override]  # captum's: nothing is sampled
        self,
        inputs: Inputs,
        baselines: Baselines = None,
        target: Target = None,
        additional_forward_args: object = None,
        feature_mask: Tensor | tuple[Tensor, ...] | None = None,
        perturbations_per_eval: int = 1,
        show_progress: bool = False,
    ) -> Any:
        """Return, at each element, the Shapley value of its feature.

        Args:
            inputs: see `ShapleyValueSampling`.
            baselines: see `FeatureAblation`.
            target: see `FeatureAblation`.
            additional_forward_args: see `Saliency`.
            feature_mask: see `FeatureAblation`.
            perturbations_per_eval: see `ShapleyValueSampling`.
            show_progress: show a tqdm bar.

        Returns:
            See `ShapleyValueSampling`.

        Raises:
            AssertionError: see `FeatureAblation`.
        """
        masks = self._masks(feature_mask, as_tuple(inputs), whole=True)
        count = len({label for one in masks for label in torch.unique(one).tolist()})
        if count >= MANY:
            warn(f"{where(self)}: {count} features have {2**count} sets, each a row of a pass: ShapleyValueSampling draws some")
        return self._values(
            inputs, baselines, target, additional_forward_args, masks, perturbations_per_eval, show_progress, None
        )


introduce(ShapleyValueSampling)
introduce(ShapleyValues)
