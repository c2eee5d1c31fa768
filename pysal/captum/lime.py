"""captum's Lime and KernelShap: a linear model fitted to what the forward function makes of some of the features."""

import inspect
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from pysal._checks import refuse, warn
from pysal.captum._ablating import Ablating
from pysal.captum._bases import Baselines, entry, introduce, where
from pysal.captum._batches import of_rows
from pysal.captum._call import Inputs, Target, arguments, as_tuple, check_rows, check_target, target_of
from pysal.engine.ablation.ablation import Ablation
from pysal.engine.ablation.coalitions import lasso, least_squares
from pysal.engine.ablation.features import Masks

# Of captum's default model, SkLearnLasso(alpha=0.01).
PENALTY = 0.01
# The weight of the sets of none and of all features in KernelShap, which in the paper is infinite.
CERTAIN = 1_000_000.0


class Lime(Ablating):
    """The coefficients of a linear model of the output around the inputs, in terms of which features are present.

    Args:
        forward_func: see `FeatureAblation`; with one number for each example, or one for all.
        interpretable_model: what is fitted: an object with `fit(loader)` of batches (sets, outputs, weights) and
            `representation()`, as captum's `SkLearnLasso`; None = a lasso with penalty 0.01, captum's default, which needs no
            scikit-learn here.
        similarity_func: the weight of a sample, of (inputs, changed inputs, set) and further keywords; None = exp(-d^2 / 2), d
            being 1 less the cosine of the angle between the two.
        perturb_func: a set of features (1, F) of ones and zeros, or a generator of them, of the inputs and further keywords;
            None = each feature with probability 1/2, drawn as captum draws it.

    Source:
        Ribeiro, Singh and Guestrin 2016, arXiv:1602.04938.
    """

    looks_at_changes = True  # the weight of a sample depends on the changed inputs

    _multiply_by_inputs = False  # as captum has it

    def __init__(
        self,
        forward_func: Callable[..., Any],
        interpretable_model: Any = None,
        similarity_func: Callable[..., Any] | None = None,
        perturb_func: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__(forward_func)
        self.interpretable_model = interpretable_model
        self.similarity_func = similarity_func or _closeness
        self.perturb_func = perturb_func or _half_of_them

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
        return_input_shape: bool = True,
        show_progress: bool = False,
    ) -> Any:
        """Return, at each element, the coefficient of its feature.

        Args:
            inputs: (B, ...), or a tuple of such tensors; each example gets a model of its own.
            baselines: see `FeatureAblation`.
            target: see `FeatureAblation`.
            additional_forward_args: see `Saliency`.
            feature_mask: see `FeatureAblation`.
            n_samples: sets of features for each example.
            perturbations_per_eval: most sets in one pass.
            return_input_shape: whether to return maps, or else the coefficients.
            show_progress: show a tqdm bar.

        Returns:
            A tensor of the inputs' shape, float32, a tuple of them for a tuple; (B, F) coefficients without
            `return_input_shape`. If the function answers for all examples together, one map or (1, F).

        Raises:
            AssertionError: see `FeatureAblation`; or the function returns several numbers for an example.
        """
        several, mask = as_tuple(inputs), self._masks(feature_mask, as_tuple(inputs), whole=True)
        least = min((int(one.min()) for one in mask if one.numel()), default=0)
        count = 1 + max((int(one.max()) for one in mask if one.numel()), default=-1) - least
        mask = tuple(one - least for one in mask)
        check_rows(where(self), several)
        check_target(where(self), target, len(several[0]))
        chunk = self._checked(perturbations_per_eval)
        if not isinstance(n_samples, int) or n_samples < 1:
            refuse(where(self), "n_samples", "be a whole number of at least 1", repr(n_samples), AssertionError)
        with torch.no_grad():
            ablation = self._ablation(several, baselines, Masks(mask, several))
            if len(several[0]) > 1 and self._answers_for_each(ablation, target, additional_forward_args):
                parts = [
                    self._fitted(*one, mask, count, n_samples, chunk, isinstance(inputs, tuple), show_progress)
                    for one in self._examples(ablation, mask, target, additional_forward_args)
                ]
            else:
                whole = ablation, target, additional_forward_args, mask
                parts = [self._fitted(*whole[:3], mask, count, n_samples, chunk, isinstance(inputs, tuple), show_progress)]
        if not return_input_shape:
            return torch.cat(parts)
        maps = []
        for one, numbers in zip(several, mask, strict=True):
            numbers = numbers.reshape((1,) * (one.ndim - numbers.ndim) + tuple(numbers.shape))
            rows = [
                part.to(one.device).float()[0][numbers[i if len(numbers) > 1 else 0]].expand(one.shape[1:])
                for i, part in enumerate(parts)
            ]
            maps.append(torch.stack(rows))
        return tuple(maps) if isinstance(inputs, tuple) else maps[0]

    def _answers_for_each(self, ablation: Ablation, target: Target, additional_forward_args: object) -> bool:
        """Say whether the function returns a number for each example, not one for all."""
        output = self._evaluate(ablation.inputs, target, additional_forward_args, ablation.inputs, 1)
        if output.numel() not in (1, len(ablation.inputs[0])):
            requirement = "be one number for each example, or one for all"
            refuse(where(self), "the output", requirement, f"shape {tuple(output.shape)}", AssertionError)
        return bool(output.numel() > 1)

    def _examples(
        self, ablation: Ablation, masks: tuple[Tensor, ...], target: Target, additional_forward_args: object
    ) -> Iterator[tuple[Ablation, Target, object]]:
        """Return what is asked about each example alone."""
        examples = len(ablation.inputs[0])
        for row in range(examples):
            one = slice(row, row + 1)
            inputs, fills = (tuple(each[one] for each in kind) for kind in (ablation.inputs, ablation.fills))
            own = tuple(each[one] if each.ndim == whole.ndim and len(each) == examples else each
                        for each, whole in zip(masks, ablation.inputs, strict=True))  # fmt: skip
            alone = torch.tensor([row], device="cpu")
            further = of_rows(arguments(additional_forward_args), alone, examples)
            yield Ablation(inputs, fills, Masks(own, inputs)), target_of(target, alone), further

    def _fitted(
        self,
        ablation: Ablation,
        target: Target,
        additional_forward_args: object,
        masks: tuple[Tensor, ...],
        count: int,
        samples: int,
        chunk: int,
        is_tuple: bool,
        show_progress: bool,
    ) -> Tensor:
        """Return the coefficients (1, F) of the model of one example, or of a batch that gets one answer."""
        features = ablation.features
        assert isinstance(features, Masks)
        given: Any = ablation.inputs if is_tuple else ablation.inputs[0]
        options: dict[str, Any] = {
            "baselines": ablation.fills if is_tuple else ablation.fills[0],
            "feature_mask": masks if is_tuple else masks[0],
            "num_interp_features": count,
            **self._options(count),
        }
        drawn = self._drawn(given, samples, options)
        sets = torch.cat([one.reshape(1, -1) for one in drawn])
        present = sets.cpu().bool()[:, features.labels].numpy()
        weights = []
        for one, here in zip(drawn, torch.from_numpy(present), strict=True):
            changed = ablation.inputs
            if self.looks_at_changes:
                changed = tuple(
                    features.only(number, each, fill, here[None])
                    for number, (each, fill) in enumerate(zip(ablation.inputs, ablation.fills, strict=True))
                )
            weight = self.similarity_func(given, changed if is_tuple else changed[0], one, **options)
            weight = weight if isinstance(weight, Tensor) else torch.tensor(float(weight), device="cpu", dtype=torch.float32)
            weights.append(weight.reshape(1).cpu())
        outputs, shape = self._worth(ablation, present, target, additional_forward_args, chunk, show_progress)
        if math.prod(shape) != 1:
            requirement = "be one number for each example, or one for all"
            refuse(where(self), "the output", requirement, f"{math.prod(shape)} of them", AssertionError)
        weight = torch.cat(weights)
        if self.interpretable_model is not None:
            table = TensorDataset(sets.float(), outputs.flatten().float(), weight.to(sets.device).float())
            self.interpretable_model.fit(DataLoader(table, batch_size=len(sets)))
            found: Tensor = self.interpretable_model.representation()
            return found.reshape(1, -1)
        _draw_as_a_fit(count)
        arrays = (one.detach().cpu().double().numpy() for one in (sets, outputs.flatten(), weight))
        return torch.from_numpy(self._fit(*arrays)).float().to(ablation.inputs[0].device)[None]

    def _fit(self, sets: Any, outputs: Any, weights: Any) -> Any:
        return lasso(sets, outputs, weights, PENALTY)

    def _options(self, count: int) -> dict[str, Any]:
        return {}

    def _drawn(self, given: Any, samples: int, options: dict[str, Any]) -> list[Tensor]:
        """Return the sets of features, (1, F) each."""
        if not inspect.isgeneratorfunction(self.perturb_func):
            return [self.perturb_func(given, **options) for _ in range(samples)]
        found = list(itertools.islice(self.perturb_func(given, **options), samples))
        if len(found) < samples:
            warn(f"{where(self)}: perturb_func gave {len(found)} sets of {samples}")
        return found


class KernelShap(Lime):
    """Shapley values as the coefficients of a linear model of which features are present, weighted by the Shapley kernel.

    Args:
        forward_func: see `Lime`.

    Source:
        Lundberg and Lee 2017, arXiv:1705.07874, section 4.1.
    """

    looks_at_changes = False

    def __init__(self, forward_func: Callable[..., Any]) -> None:
        Ablating.__init__(self, forward_func)
        self.interpretable_model, self.inf_weight = None, CERTAIN

    @property
    def similarity_func(self) -> Callable[..., Any]:  # type: ignore[override]  # not held, which would be a circle
        """`kernel_shap_similarity_kernel`."""
        return self.kernel_shap_similarity_kernel

    @property
    def perturb_func(self) -> Callable[..., Any]:  # type: ignore[override]
        """`kernel_shap_perturb_generator`."""
        return self.kernel_shap_perturb_generator

    def kernel_shap_similarity_kernel(self, _: Any, __: Any, interpretable_sample: Tensor, **kwargs: Any) -> Tensor:
        """Return the weight of a set, (1,): 1, for sets are drawn by the kernel; that of none or all is a million."""
        number = int(interpretable_sample.sum())
        return torch.tensor([self.inf_weight if number in (0, kwargs["num_interp_features"]) else 1.0], device="cpu")

    def kernel_shap_perturb_generator(self, original_inp: Inputs, **kwargs: Any) -> Iterator[Tensor]:
        """Yield sets of features (1, F): all, none, then some drawn by the Shapley kernel, as captum draws them."""
        count, device = kwargs["num_interp_features"], as_tuple(original_inp)[0].device
        yield torch.ones(1, count, device=device, dtype=torch.long)
        yield torch.zeros(1, count, device=device, dtype=torch.long)
        while count > 1:
            number = int(torch.multinomial(kwargs["num_select_distribution"], 1))
            drawn = torch.randn(1, count, device="cpu", dtype=torch.float32)
            yield (drawn > torch.kthvalue(drawn, count - number).values).to(device=device).long()

    def _drawn(self, given: Any, samples: int, options: dict[str, Any]) -> list[Tensor]:
        least = min(samples, 2) if options["num_interp_features"] < 2 else samples  # one feature has two sets alone
        return super()._drawn(given, least, options)

    def _fit(self, sets: Any, outputs: Any, weights: Any) -> Any:
        return least_squares(sets, outputs, weights)

    def _options(self, count: int) -> dict[str, Any]:
        numbers = torch.arange(count, dtype=torch.float32, device="cpu")
        kernel = torch.tensor(count - 1, device="cpu") / (numbers * (count - numbers))
        kernel[:1] = 0.0
        return {"num_select_distribution": kernel / kernel.sum() if count > 1 else None}


def _closeness(given: Inputs, changed: Inputs, _: Tensor, **__: Any) -> float:
    """Return exp(-d^2 / 2), d being 1 less the cosine of the angle between inputs and changed inputs, captum's default."""
    one, other = (torch.cat([each.flatten().to("cpu").float() for each in as_tuple(several)]) for several in (given, changed))
    return math.exp(-(float(1 - torch.cosine_similarity(one, other, dim=0)) ** 2) / 2)


def _draw_as_a_fit(count: int) -> None:
    """Draw what captum's loader and linear model draw and do not use, so that the next example's sets are captum's."""
    torch.empty((), dtype=torch.int64, device="cpu").random_()
    torch.nn.Linear(count, 1, device="cpu", dtype=torch.float32)


def _half_of_them(given: Inputs, **kwargs: Any) -> Tensor:
    """Return a set of features (1, F), each present with probability 1/2, captum's default."""
    drawn = torch.bernoulli(torch.full((1, kwargs["num_interp_features"]), 0.5, device="cpu", dtype=torch.float32))
    return drawn.to(as_tuple(given)[0].device).long()


introduce(Lime)
introduce(KernelShap)
