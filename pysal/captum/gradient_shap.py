"""captum's GradientShap."""

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from pysal._checks import refuse
from pysal.captum._bases import Baselines, GradientAttribution, baselines_of, check_baselines, entry, entry_of_parts, where
from pysal.captum._call import Call, Inputs, Target, as_tuple, floating, spread
from pysal.captum.deep_lift import Distribution, distribution
from pysal.captum.noise_tunnel import NoiseTunnel


class GradientShap(GradientAttribution):
    """The mean of gradient times (input - baseline) at random places between noisy inputs and random baselines.

    Args:
        forward_func: the model, or any function of tensors.
        multiply_by_inputs: whether to multiply the gradients by input - baseline.
        rng: where noise, baselines and places come from, see `NoiseTunnel`. "captum": captum's numbers, bit for bit, from the
            generators of torch and NumPy.
        seed: see `NoiseTunnel`.

    Source:
        Lundberg and Lee 2017, arXiv:1705.07874; the estimator: Erion et al. 2019, arXiv:1906.10670, section 3.
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        multiply_by_inputs: bool = True,
        *,
        rng: Literal["philox", "captum"] = "philox",
        seed: int | None = None,
    ) -> None:
        super().__init__(forward_func)
        self._multiply_by_inputs, self.rng, self.seed = multiply_by_inputs, rng, seed

    def has_convergence_delta(self) -> bool:
        """True: the attributions of an example add up to the change of its score, in the mean over many draws."""
        return True

    @entry_of_parts
    def attribute(
        self,
        inputs: Inputs,
        baselines: Distribution,
        n_samples: int = 5,
        stdevs: float | tuple[float, ...] = 0.0,
        target: Target = None,
        additional_forward_args: object = None,
        return_convergence_delta: bool = False,
    ) -> Any:
        """Return the mean and, if asked, how far each draw's sum is from the change of the output.

        Args:
            inputs: see `Saliency`.
            baselines: (M, ...) for each input, of which each draw takes a row, or a function that returns them, of the inputs
                or of nothing.
            n_samples: draws per example.
            stdevs: standard deviation of the noise on the inputs, one float or one for each input.
            target: see `Saliency`.
            additional_forward_args: see `Saliency`.
            return_convergence_delta: whether to return the deltas as well.

        Returns:
            A tensor of the inputs' shape, a tuple of them for a tuple; with deltas, the pair of that and (B * n_samples,)
            deltas, those of an example side by side.

        Raises:
            AssertionError: see `NoiseTunnel`; or the baselines do not fit.
            ValueError: there are no baselines.
        """
        if not isinstance(n_samples, int) or n_samples < 1:
            refuse(where(self), "n_samples", "be a whole number of at least 1", repr(n_samples), AssertionError)
        drawn = distribution(self, baselines, inputs)
        for one in drawn:
            if not len(one):
                refuse(where(self), "baselines", "have at least one row", f"shape {tuple(one.shape)}")
        single, seed = InputBaselineXGradient(self.forward_func, self.multiplies_by_inputs), None
        if self.rng == "philox":
            seed = int(torch.randint(-(2**63), 2**63 - 1, (), device="cpu")) if self.seed is None else self.seed
            places = torch.Generator(device="cpu").manual_seed(seed)
            number = len(as_tuple(inputs)[0]) * n_samples
            single.places = torch.rand(number, generator=places, dtype=torch.float64, device="cpu")
        tunnel = NoiseTunnel(single, rng=self.rng, seed=seed)
        return tunnel.attribute(
            inputs,
            nt_samples=n_samples,
            stdevs=stdevs,
            draw_baseline_from_distrib=True,
            baselines=drawn if isinstance(inputs, tuple) else drawn[0],
            target=target,
            additional_forward_args=additional_forward_args,
            return_convergence_delta=return_convergence_delta,
        )


class InputBaselineXGradient(GradientAttribution):
    """The gradient at a random place between baseline and input, times input - baseline: one draw of `GradientShap`.

    Args:
        forward_func: the model, or any function of tensors.
        multiply_by_inputs: whether to multiply the gradient by input - baseline.
    """

    numbers_its_copies = True  # its places are those of copies of the inputs, whatever runs together
    places: Tensor | None = None

    def __init__(self, forward_func: Callable[..., Any], multiply_by_inputs: bool = True) -> None:
        super().__init__(forward_func)
        self._multiply_by_inputs = multiply_by_inputs

    def has_convergence_delta(self) -> bool:
        """True, see `GradientShap`."""
        return True

    @entry
    def attribute(
        self,
        inputs: Inputs,
        baselines: Baselines = None,
        target: Target = None,
        additional_forward_args: object = None,
        return_convergence_delta: bool = False,
        *,
        copies: Tensor | None = None,
    ) -> Any:
        """Return the product.

        Args:
            inputs: see `Saliency`.
            baselines: see `IntegratedGradients`.
            target: see `Saliency`.
            additional_forward_args: see `Saliency`.
            return_convergence_delta: whether to return the deltas as well.
            copies: (B,) which of `places` each row has; None = new ones from NumPy's generator, as in captum.

        Returns:
            See `IntegratedGradients`.

        Raises:
            AssertionError: see `IntegratedGradients`.
        """
        several = tuple(floating(one.detach()) for one in as_tuple(inputs))
        given = baselines_of(self, baselines, several)
        check_baselines(self, given, several)
        starts = [spread(one, start) for one, start in zip(several, given, strict=True)]
        if copies is None or self.places is None:
            at = torch.from_numpy(np.random.uniform(0.0, 1.0, len(several[0])))
        else:
            at = self.places[copies.to("cpu")]
        points = []
        for one, start in zip(several, starts, strict=True):
            share = at.to(one).reshape(-1, *(1,) * (one.ndim - 1))
            points.append(share * one + (1 - share) * start)
        call: Call = self._ask(tuple(points), target, additional_forward_args)
        found = self._gradients(call)
        if self.multiplies_by_inputs:
            found = tuple((one - start) * part for one, start, part in zip(several, starts, found, strict=True))
        answer = found if isinstance(inputs, tuple) else found[0]
        if not return_convergence_delta:
            return answer
        return answer, self.compute_convergence_delta(found, baselines, inputs, target, additional_forward_args)
