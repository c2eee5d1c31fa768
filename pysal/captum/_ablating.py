"""What the methods share that leave features out: passes over copies of the batch, and how they are counted."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.futures import Future

from pysal._checks import refuse
from pysal.captum._bases import Baselines, PerturbationAttribution, baselines_of, where
from pysal.captum._batches import call, independent, of_its_own
from pysal.captum._call import Target, arguments, select, spread
from pysal.engine.ablation.ablation import Ablation
from pysal.engine.ablation.features import Features, Masks
from pysal.engine.prepared.model import PreparedModel
from pysal.engine.running.chunks import run_chunks


class Ablating(PerturbationAttribution):
    """Base of the methods that leave features out.

    Args:
        forward_func: the model, or any function of tensors.
    """

    misfit: type[Exception] = RuntimeError  # what captum raises at a mask that does not fit

    def _masks(
        self, feature_mask: Tensor | tuple[Tensor, ...] | None, inputs: tuple[Tensor, ...], *, whole: bool = False
    ) -> tuple[Tensor, ...]:
        """Return a mask for each input, that of single elements where none is given; `whole`: of whole numbers.

        Raises:
            AssertionError: no tensors, or not one for each input.
            IndexError: fractions, where whole numbers are needed.
            RuntimeError: a mask that does not fit its input; AssertionError in `ShapleyValueSampling` and `ShapleyValues`.
        """
        if feature_mask is None:
            return _single_elements(inputs)
        masks = feature_mask if isinstance(feature_mask, tuple) else (feature_mask,)
        for one in masks:
            if not isinstance(one, Tensor):
                requirement = "be a tensor or a tuple of tensors"
                refuse(where(self), "feature_mask", requirement, type(one).__name__, AssertionError)
        if len(masks) != len(inputs):
            refuse(where(self), "feature_mask", f"be {len(inputs)}, one for each input", len(masks), AssertionError)
        found = []
        for mask, one in zip(masks, inputs, strict=True):
            sizes = zip(reversed(mask.shape), reversed(one.shape), strict=False)
            if mask.ndim > one.ndim or any(size not in (1, whole_size) for size, whole_size in sizes):
                requirement = f"fit an input of shape {tuple(one.shape)}"
                refuse(where(self), "feature_mask", requirement, f"shape {tuple(mask.shape)}", self.misfit)
            # as indices, truth values and bytes would choose where they are true
            numbers = mask.long() if whole or mask.dtype == torch.bool else mask
            if whole and mask.is_floating_point() and not torch.equal(numbers.to(mask), mask):
                refuse(where(self), "feature_mask", "be whole numbers", "fractions among them", IndexError)
            found.append(numbers)
        return tuple(found)

    def _together(self, chunk: int, ablation: Ablation, queue: list[int], additional_forward_args: object) -> int:
        """Return how many features run in one pass: as many as asked, but one where a further argument forbids it."""
        inputs, further = ablation.inputs, arguments(additional_forward_args)
        chunk = min(chunk, max(1, len(queue)))
        if chunk == 1 or not of_its_own(further, len(inputs[0])):
            return chunk

        def points(rows: Tensor, _copies: Tensor) -> tuple[Tensor, ...]:
            return tuple(one[rows.to(one.device)] for one in inputs)

        apart = independent(self.forward_func, points, 2, len(inputs[0]), further, inputs[0].device)
        return chunk if apart else 1

    def _worth(
        self,
        ablation: Ablation,
        sets: NDArray[np.bool_],
        target: Target,
        additional_forward_args: object,
        chunk: int,
        show_progress: bool,
    ) -> tuple[Tensor, tuple[int, ...]]:
        """Return the outputs (n, numbers) for sets of features that are present (n, F), and the shape of one output."""
        present, masks, outputs = torch.from_numpy(sets), ablation.features, list[Tensor]()
        assert isinstance(masks, Masks)
        shapes: list[tuple[int, ...]] = []
        chunk = self._together(chunk, ablation, list(range(len(sets))), additional_forward_args)

        def body(start: int, stop: int) -> None:
            batch = tuple(
                masks.only(number, one, fill, present[start:stop])
                for number, (one, fill) in enumerate(zip(ablation.inputs, ablation.fills, strict=True))
            )
            output = self._evaluate(ablation.inputs, target, additional_forward_args, batch, stop - start)
            copies = stop - start
            rows = output.shape[:1] if output.ndim else (1,)
            if copies > 1 and (rows[0] % copies or rows[0] // copies != len(ablation.inputs[0])):
                requirement = f"grow with the batch for perturbations_per_eval > 1, to {copies} times {len(ablation.inputs[0])}"
                refuse(where(self), "the output", requirement, f"shape {tuple(output.shape)}", AssertionError)
            shapes.append((rows[0] // copies, *output.shape[1:]))
            outputs.append(output.reshape(copies, -1).clone())  # the function may answer into one buffer
            done(stop)

        device = ablation.inputs[0].device
        row_bytes = sum(one.numel() * one.element_size() for one in ablation.inputs)
        with self._bar(show_progress, len(sets), chunk) as done:
            prepared = chunk == 1 and isinstance(self.forward_func, PreparedModel)  # whose rows are independent
            size = None if prepared else chunk
            run_chunks(len(sets), body, label=self.get_name(), batch_size=size, device=device, row_bytes=row_bytes)
        return torch.cat(outputs), shapes[0]

    def _checked(self, perturbations_per_eval: object) -> int:
        if not isinstance(perturbations_per_eval, int) or perturbations_per_eval < 1:
            requirement = "be a whole number of at least 1"
            refuse(where(self), "perturbations_per_eval", requirement, repr(perturbations_per_eval), AssertionError)
        return perturbations_per_eval

    def _ablation(self, inputs: tuple[Tensor, ...], baselines: Baselines, features: Features) -> Ablation:
        given = baselines_of(self, baselines, inputs)
        if len(given) != len(inputs):
            refuse(where(self), "baselines", f"be {len(inputs)}, one for each input", len(given), AssertionError)
        fills = []
        for one, fill in zip(inputs, given, strict=True):
            dtype = torch.result_type(one, fill)
            fills.append(spread(one.to(dtype), fill))
        return Ablation(inputs, tuple(fills), features)

    def _evaluate(
        self,
        inputs: tuple[Tensor, ...],
        target: Target,
        additional_forward_args: object,
        batch: tuple[Tensor, ...],
        copies: int,
        *,
        future: bool = False,
    ) -> Any:
        """Return the selected output for `copies` of the batch, a tensor or a future of one."""
        further = arguments(additional_forward_args)
        rows = torch.arange(inputs[0].shape[0], device="cpu")
        if copies > 1:
            lengths = {len(one) for one in inputs}
            further = tuple(
                one.repeat(copies, *(1,) * (one.ndim - 1))
                if isinstance(one, Tensor) and one.ndim and len(one) in lengths
                else one
                for one in further
            )
            rows = rows.repeat(copies)
        output = call(self.forward_func, batch, further)
        if isinstance(output, Future) != future:
            wanted = "return a Future for attribute_future" if future else "not return a Future: that is for attribute_future"
            refuse(where(self), "forward_func", wanted, type(output).__name__, AssertionError)
        if isinstance(output, Future):
            return output.then(lambda found: self._number(select(where(self), found.value(), target, rows)))
        return self._number(output if target is None else select(where(self), output, target, rows))

    def _number(self, output: object) -> Tensor:
        if isinstance(output, Tensor):
            if output.dtype == torch.bool:
                refuse(where(self), "the output", "be numbers, which have differences", "truth values", RuntimeError)
            return output
        if not isinstance(output, (int, float)):
            refuse(where(self), "forward_func", "return a tensor, an int or a float", type(output).__name__, AssertionError)
        return torch.tensor(output, dtype=torch.int64 if isinstance(output, int) else torch.float64, device="cpu")

    def _drop(self, initial: Tensor, output: Tensor, copies: int, inputs: tuple[Tensor, ...]) -> Tensor:
        if copies > 1 and (not initial.ndim or output.shape != (copies * len(initial), *initial.shape[1:])):
            requirement = f"grow with the batch for perturbations_per_eval > 1, from shape {tuple(initial.shape)}"
            got = f"shape {tuple(output.shape)} for {copies} times {len(inputs[0])} rows"
            refuse(where(self), "the output", requirement, got, AssertionError)
        return initial.reshape(1, -1) - output.reshape(copies, -1)

    @contextmanager
    def _bar(self, show: bool, features: int, chunk: int) -> Iterator[Callable[[int | None], None]]:
        """Give a function that says how many features are done, the clean pass before them; None = none, not even that."""
        if not show:
            yield lambda _done: None
            return
        from tqdm.auto import tqdm

        total = math.ceil(features / chunk) + 1
        with tqdm(desc=f"{self.get_name()} attribution", total=total, mininterval=0.5) as bar:
            yield lambda done: bar.update((0 if done is None else 1 + math.ceil(done / chunk)) - bar.n)


def _single_elements(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return masks of which each element is a feature."""
    masks, first = list[Tensor](), 0
    for one in inputs:
        count = math.prod(one.shape[1:]) if len(one) else 0
        masks.append(first + torch.arange(count, device=one.device).reshape(min(len(one), 1), *one.shape[1:]))
        first += count
    return tuple(masks)
