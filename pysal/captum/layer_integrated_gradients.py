"""captum's LayerIntegratedGradients: integrated gradients of what follows a layer."""

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch

from pysal._checks import refuse
from pysal.captum._bases import (
    Baselines,
    GradientAttribution,
    LayerAttribution,
    baselines_of,
    check_baselines,
    entry,
    introduce,
    wants_graph,
    where,
)  # fmt: skip
from pysal.captum._call import Inputs, Target, arguments, as_tuple, check_rows, check_target, select, spread
from pysal.captum.integrated_gradients import IntegratedGradients
from pysal.captum.layer_activation import Layers, as_layers, cut_at
from pysal.engine.layers.cut import Values
from pysal.engine.running.states import recorded


class LayerIntegratedGradients(LayerAttribution, GradientAttribution):
    """`IntegratedGradients` with respect to a layer, on the straight path between what the baselines and the inputs make there.

    Args:
        forward_func: the model, or any function of it.
        layer: the layer, or a list of layers none of which follows from others.
        device_ids: accepted, as in captum, and ignored: the model runs on one device.
        multiply_by_inputs: whether to multiply the mean gradient by the change of the layer.
        exact_captum: see `IntegratedGradients`.

    Source:
        Sundararajan, Taly and Yan 2017, arXiv:1703.01365.
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        layer: Layers,
        device_ids: list[int] | None = None,
        multiply_by_inputs: bool = True,
        *,
        exact_captum: bool = False,
    ) -> None:
        LayerAttribution.__init__(self, forward_func, layer, device_ids)
        GradientAttribution.__init__(self, forward_func)
        self.ig = IntegratedGradients(forward_func, multiply_by_inputs, exact_captum=exact_captum)
        self._exact_captum = exact_captum

    @property
    def multiplies_by_inputs(self) -> bool:
        """Whether the attributions contain the change of the layer as a factor."""
        return self.ig.multiplies_by_inputs

    def has_convergence_delta(self) -> bool:
        """True: the attributions of an example add up to the change of its score."""
        return True

    @entry
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
        attribute_to_layer_input: bool = False,
        grad_kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Return the integrated gradients at the layer and, if asked, how far their sum is from the change of the output.

        Args:
            inputs: see `Saliency`; of any dtype, such as ids of tokens.
            baselines: see `IntegratedGradients`.
            target: see `Saliency`.
            additional_forward_args: see `Saliency`.
            n_steps: see `IntegratedGradients`.
            method: see `IntegratedGradients`.
            internal_batch_size: see `IntegratedGradients`.
            return_convergence_delta: see `IntegratedGradients`.
            attribute_to_layer_input: whether to take the layer's input instead of its output.
            grad_kwargs: see `LayerGradCam`.

        Returns:
            A tensor of the layer's shape, a tuple for a layer of several tensors; for a list of layers, a list of that. With a
            delta, the pair of that and (B,) deltas.

        Raises:
            AssertionError: see `IntegratedGradients`; or a layer does not run.
            NotImplementedError: see `LayerGradCam`.
        """
        graph = wants_graph(self, grad_kwargs)
        several = as_tuple(inputs)
        check_rows(where(self), several)
        check_target(where(self), target, len(several[0]))
        given = baselines_of(self, baselines, several)
        check_baselines(self, given, several)
        starts = tuple(spread(one, start) for one, start in zip(several, given, strict=True))
        further = arguments(additional_forward_args)
        cut = cut_at(self, attribute_to_layer_input)

        def reach() -> tuple[list[Values], list[Values]]:
            return cut.values(*several, *further), cut.values(*starts, *further)

        with torch.no_grad():  # which the recorded pass does not heed
            layers, bases = recorded(reach) if graph else reach()
        sizes = [len(one) for one in layers]
        values, base = (tuple(itertools.chain.from_iterable(one)) for one in (layers, bases))
        rows = len(several[0])

        def behind(*args: Any) -> Any:
            tensors = iter(args[: len(values)])
            return cut.behind([tuple(itertools.islice(tensors, size)) for size in sizes], *args[len(values) :])

        def of_one_batch(*args: Any) -> Any:  # for layers whose first dimension is not the batch's
            output = behind(*(one[0] for one in args[: len(values)]), *several, *further)
            return select(where(self), output, target, torch.arange(rows, device="cpu")).sum()[None]

        follows = all(len(one) == rows for one in values)
        if return_convergence_delta and not follows:
            requirement = f"have a row for each of {rows} examples where deltas are asked for"
            refuse(where(self), "layer", requirement, [tuple(one.shape) for one in values], AssertionError)
        behind.__wrapped__ = of_one_batch.__wrapped__ = self.forward_func  # type: ignore[attr-defined]
        of_one_batch.rows_per_pass = 1  # type: ignore[attr-defined]
        integrated = IntegratedGradients(
            behind if follows else of_one_batch, self.multiplies_by_inputs, exact_captum=self._exact_captum
        )
        found = integrated.attribute(
            values if follows else tuple(one[None] for one in values),
            base if follows else tuple(one[None] for one in base),
            target if follows else None,
            (*several, *further) if follows else None,
            n_steps,
            method,
            internal_batch_size,
            create_graph=graph,
        )
        found = found if follows else tuple(one[0] for one in found)
        parts = iter(found)
        answer = as_layers(self.layer, [tuple(itertools.islice(parts, size)) for size in sizes])
        if not return_convergence_delta:
            return answer
        return answer, self.compute_convergence_delta(found, starts, several, target, additional_forward_args)


introduce(LayerIntegratedGradients)
