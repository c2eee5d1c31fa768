"""captum's FeaturePermutation."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pysal._checks import warn
from pysal.captum._bases import Baselines, entry, where
from pysal.captum._call import Inputs, Target, as_tuple
from pysal.captum.feature_ablation import FeatureAblation, warn_of_options
from pysal.engine.ablation.ablation import Ablation, Permuted
from pysal.engine.ablation.features import Features, Masks


def _permute_feature(x: Tensor, feature_mask: Tensor) -> Tensor:
    """Return rows with a feature exchanged between them at random, never as it was; captum's default, with its draws."""
    if len(x) < 2:
        return x
    as_it_was = torch.arange(len(x), device="cpu")
    order = torch.randperm(len(x), device="cpu")
    while torch.equal(order, as_it_was):
        order = torch.randperm(len(x), device="cpu")
    return torch.where(feature_mask, x[order.to(x.device)], x)


class FeaturePermutation(FeatureAblation):
    """How much the output of a batch changes when a feature is exchanged between its examples.

    Args:
        forward_func: see `FeatureAblation`.
        perm_func: (rows of an input, mask of a feature, true where it is) -> those rows with the feature exchanged; captum's
            default exchanges rows at random, from torch's generator.

    Source:
        Breiman 2001, Random forests, section 10; Fisher, Rudin and Dominici 2018, arXiv:1801.01489.
    """

    def __init__(
        self, forward_func: Callable[..., Any], perm_func: Callable[[Tensor, Tensor], Tensor] = _permute_feature
    ) -> None:
        super().__init__(forward_func)
        self.perm_func = perm_func

    @entry
    def attribute(  # type: ignore[override]  # captum's: without baselines
        self,
        inputs: Inputs,
        target: Target = None,
        additional_forward_args: object = None,
        feature_mask: Tensor | tuple[Tensor, ...] | None = None,
        perturbations_per_eval: int = 1,
        show_progress: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Return, at each element, the drop of the output with its feature exchanged.

        Args:
            inputs: (B, ...), or a tuple of such tensors; of one example alone the drops are zero, with a warning.
            target: see `FeatureAblation`.
            additional_forward_args: see `Saliency`.
            feature_mask: see `FeatureAblation`.
            perturbations_per_eval: see `FeatureAblation`.
            show_progress: show a tqdm bar.
            **kwargs: change nothing, as in captum: "baselines" without a word, others with a warning.

        Returns:
            See `FeatureAblation`.

        Raises:
            AssertionError: see `FeatureAblation`.
        """
        kwargs.pop("baselines", None)
        warn_of_options(self, kwargs)
        several = as_tuple(inputs)
        if any(len(one) == 1 for one in several):
            warn(f"{where(self)}: one example has no other to exchange features with: its features change nothing")
        features = Masks(self._masks(feature_mask, several), several)
        found = self._leave_out(
            several, None, target, additional_forward_args, features, None, perturbations_per_eval, show_progress
        )
        return found if isinstance(inputs, tuple) else found[0]

    def attribute_future(self, *args: Any, **kwargs: Any) -> Any:
        """Not implemented, as in captum.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(f"{where(self)}: attribute_future exists for FeatureAblation only")

    def _ablation(self, inputs: tuple[Tensor, ...], baselines: Baselines, features: Features) -> Ablation:
        assert isinstance(features, Masks)
        return Permuted(inputs, tuple(torch.zeros_like(one[:1]) for one in inputs), features, self.perm_func)
