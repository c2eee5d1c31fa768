"""captum's IntegratedGradients."""

from collections.abc import Callable
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pysal import ops
from pysal._checks import refuse, refuse_unknown
from pysal._library import widest
from pysal.captum._bases import Baselines, GradientAttribution, baselines_of, check_baselines, entry_of_parts, where
from pysal.captum._call import Call, Inputs, Target, floating, spread
from pysal.engine.paths.path import added
from pysal.engine.paths.quadrature import Quadrature, Rule, rule
from pysal.engine.request.plan import Plan

QUADRATURES: dict[str, Quadrature] = {
    "riemann_left": "left",
    "riemann_right": "right",
    "riemann_middle": "midpoint",
    "riemann_trapezoid": "trapezoid",
    "gausslegendre": "gauss_legendre",
}


class IntegratedGradients(GradientAttribution):
    """The mean gradient on the straight path from the baselines to the inputs, as `pysal.integrated_gradients`.

    Args:
        forward_func: the model, or any function of tensors.
        multiply_by_inputs: whether to multiply the mean gradient by input - baseline.
        exact_captum: use captum's own nodes and weights. They are rounded to float32 and, for "riemann_trapezoid", add up to
            1 - 1 / n_steps.

    Source:
        Sundararajan, Taly and Yan 2017, arXiv:1703.01365.
    """

    def __init__(
        self, forward_func: Callable[..., Any], multiply_by_inputs: bool = True, *, exact_captum: bool = False
    ) -> None:
        super().__init__(forward_func)
        self._multiply_by_inputs = multiply_by_inputs
        self._exact_captum = exact_captum

    def has_convergence_delta(self) -> bool:
        """True: the attributions of an example add up to the change of its score."""
        return True

    @entry_of_parts
    def attribute(
        self,
        inputs: Inputs,
        baselines: Baselines = None,
        target: Target = None,
        additional_forward_args: object = None,
        n_steps: int = 50,
        method: str = "gausslegendre",
        internal_batch_size: int | None = None,
        return_convergence_delta: bool = False,
        *,
        create_graph: bool = False,
    ) -> Any:
        """Return the integrated gradients and, if asked, how far their sum is from the change of the output.

        Args:
            inputs: see `Saliency`; integers are converted to floating point.
            baselines: a number or a tensor for each input, of its shape or with one row for all; None = 0.
            target: see `Saliency`.
            additional_forward_args: see `Saliency`.
            n_steps: gradients per example.
            method: "gausslegendre", "riemann_left", "riemann_right", "riemann_middle" or "riemann_trapezoid".
            internal_batch_size: most rows (example, step) of one pass. A pass holds whole batches, as in captum, or parts of
                one if this is smaller than a batch, a batch is larger than a photo of 3 x 224 x 224, and rows do not depend on
                each other. None = all rows in one pass, as in captum; if these are many and do not depend on each other, as
                many whole batches as are fast.
            return_convergence_delta: whether to return the delta as well.
            create_graph: see `Saliency`; the graph of every step stays in memory.

        Returns:
            A tensor of the inputs' shape, float32 or wider, a tuple of them for a tuple; with a delta, the pair of that and
            (B,) deltas.

        Raises:
            AssertionError: see `Saliency`; or the baselines do not fit, the method is unknown, or there are too few steps.
            RuntimeError: see `Saliency`.
            ValueError: see `Saliency`.
            TypeError: `n_steps` or `internal_batch_size` is not a whole number.
        """
        call = self._ask(inputs, target, additional_forward_args, whole_numbers="floating", keeps_graph=create_graph)
        call.copies = n_steps
        given = baselines_of(self, baselines, call.inputs)
        check_baselines(self, given, call.inputs)
        if method not in QUADRATURES:
            refuse_unknown(where(self), "method", f"be one of {', '.join(QUADRATURES)}", method, QUADRATURES, AssertionError)
        for name, value in (("n_steps", n_steps), ("internal_batch_size", internal_batch_size)):
            if value is not None and not isinstance(value, Integral):
                refuse(where(self), name, "be a whole number", repr(value), TypeError)
        least = 1 if method == "gausslegendre" else 2
        if n_steps < least:
            refuse(where(self), "n_steps", f"be at least {least} for {method}", n_steps, AssertionError)
        steps = (captum_rule if self._exact_captum else rule)(QUADRATURES[method], n_steps)
        starts = [floating(spread(one, start)) for one, start in zip(call.inputs, given, strict=True)]
        found = call.found(lambda: self._integrate(call, starts, steps, internal_batch_size))
        if not return_convergence_delta:
            return call.answer(found)
        delta = self.compute_convergence_delta(found, baselines, inputs, target, additional_forward_args)
        return call.answer(found), delta

    def _integrate(self, call: Call, starts: list[Tensor], steps: Rule, most: int | None) -> tuple[Tensor, ...]:
        packed_starts, number = call.pack(starts).contiguous(), len(steps.nodes)
        of_complex = any(one.is_complex() for one in starts)  # which are multiplied as numbers, not part by part

        def work(plan: Plan) -> Tensor:
            nodes, weights = (
                torch.from_numpy(one).to(plan.device, widest(plan.device)) for one in (steps.nodes, steps.weights)
            )
            total = plan.zeros()

            last = plan.channels_last

            def points(rows: Tensor, places: Tensor) -> Tensor:
                if plan.keeps_graph:
                    return ops.path_integral_points(plan.inputs, packed_starts, rows, nodes[places], channels_last=last)
                # the op as it is: all of this is made here, and its checks take as long as a layer
                found: Tensor = torch.ops.pysal.path_integral_points(
                    plan.inputs, packed_starts, rows.int(), nodes[places], plan.inputs.dtype, last
                )
                return found

            def body(start: int, stop: int) -> None:
                nonlocal total
                items = torch.arange(start, stop, device=plan.device)
                rows, places = items % plan.images, items // plan.images
                gradients = plan.gradients(points(rows, places), rows)
                if plan.keeps_graph:
                    total = added(plan, total, gradients, None, rows, weights[places])
                else:
                    torch.ops.pysal.path_integral_accumulate_(total, gradients, None, rows.int(), weights[places])

            prepared = call.prepared and not call.whole
            plan.run(plan.images * number, body, batch_size=most if prepared else call.rows(points, most))
            if self._multiply_by_inputs and not of_complex:
                return ops.path_integral_product(plan.inputs, packed_starts, total)
            return total

        found = call.unpack(call.run(work), least=torch.float32)
        if not (self._multiply_by_inputs and of_complex):
            return found
        return tuple((one - start) * mean for one, start, mean in zip(call.inputs, starts, found, strict=True))


def captum_rule(quadrature: Quadrature, steps: int) -> Rule:
    """Return captum's nodes and weights: float32 weights, float32 Riemann nodes, a trapezoid of n cells with n nodes."""
    if quadrature == "gauss_legendre":
        exact = rule(quadrature, steps)
        return Rule(exact.nodes, exact.weights.astype(np.float32).astype(np.float64))
    first = {"left": 0.0, "right": 1 / steps, "midpoint": 1 / (2 * steps), "trapezoid": 0.0}[quadrature]
    last = {"left": 1 - 1 / steps, "right": 1.0, "midpoint": 1 - 1 / (2 * steps), "trapezoid": 1.0}[quadrature]
    nodes = torch.linspace(first, last, steps, dtype=torch.float32, device="cpu").double().numpy()
    weights = np.full(steps, 1 / steps)
    if quadrature == "trapezoid":
        weights[[0, -1]] /= 2
    return Rule(nodes, weights.astype(np.float32).astype(np.float64))
