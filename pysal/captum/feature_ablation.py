"""captum's FeatureAblation."""

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.futures import Future, collect_all

from pysal._checks import FLOATING, warn
from pysal._library import widest
from pysal.captum._ablating import Ablating
from pysal.captum._bases import Baselines, entry, introduce, where
from pysal.captum._call import Call, Inputs, PerBatch, Target, as_tuple, check_target
from pysal.engine.ablation.ablation import Ablation
from pysal.engine.ablation.features import Features, Masks
from pysal.engine.prepared.model import PreparedModel
from pysal.engine.running.chunks import progress, run_chunks, to_device
from pysal.methods import leave_one_out
from pysal.segments import Segments


class FeatureAblation(Ablating):
    """How much the output drops when a feature is replaced by its baseline, as `pysal.leave_one_out`.

    The forward function may return a number for each row, several, or one answer for the whole batch; its inputs may be of any
    rank and dtype.

    Args:
        forward_func: the model, or any function of tensors; it may return a tensor, an int or a float, and for
            `attribute_future` a `torch.futures.Future` of a tensor.

    Source:
        Zeiler and Fergus 2013, arXiv:1311.2901, section 4.2.

    Example:
        >>> FeatureAblation(lambda x: 2 * x.sum(1)).attribute(torch.tensor([[1.0, 3.0]]))
        tensor([[2., 6.]])
    """

    @entry
    def attribute(
        self,
        inputs: Inputs,
        baselines: Baselines = None,
        target: Target = None,
        additional_forward_args: object = None,
        feature_mask: Tensor | tuple[Tensor, ...] | None = None,
        perturbations_per_eval: int = 1,
        show_progress: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Return, at each element, the drop of the output without its feature.

        Args:
            inputs: (B, ...), or a tuple of such tensors.
            baselines: a number or a tensor for each input, broadcast to it; None = 0.
            target: see `Saliency`; None = explain each number of the output, one after the other.
            additional_forward_args: see `Saliency`.
            feature_mask: for each input the number of the feature that each element belongs to, with one row for all examples
                or one row for each. The same number in several inputs is the same feature. None = each element is a feature.
            perturbations_per_eval: most features in one pass, each with all examples. With captum's default, 1, a prepared
                model chooses the fastest number, because its rows do not depend on each other.
            show_progress: show a tqdm bar.
            **kwargs: change nothing, as in captum, which a warning says.

        Returns:
            (n, ...) for n numbers in the output of all examples, in the output's dtype; a tuple of them for a tuple of inputs.

        Raises:
            AssertionError: the target or the baselines do not fit; or `perturbations_per_eval` is above 1 and the output does
                not grow with the batch.
        """
        warn_of_options(self, kwargs)
        several = as_tuple(inputs)
        masks = self._masks(feature_mask, several)
        found = self._leave_out(
            several, baselines, target, additional_forward_args, Masks(masks, several), _segments(masks, several),
            perturbations_per_eval, show_progress,
        )  # fmt: skip
        return found if isinstance(inputs, tuple) else found[0]

    @entry
    def attribute_future(
        self,
        inputs: Inputs,
        baselines: Baselines = None,
        target: Target = None,
        additional_forward_args: object = None,
        feature_mask: Tensor | tuple[Tensor, ...] | None = None,
        perturbations_per_eval: int = 1,
        show_progress: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Return a `Future` of what `attribute` returns, for a forward function that returns futures.

        All passes start before the first is waited for. Arguments and exceptions are those of `attribute`. An exception of a
        future is raised by the result's `wait`.
        """
        warn_of_options(self, kwargs)
        several = as_tuple(inputs)
        ablation = self._ablation(several, baselines, Masks(self._masks(feature_mask, several), several))
        evaluate = functools.partial(self._evaluate, several, target, additional_forward_args, future=True)
        features = _queue(ablation)
        chunk = self._checked(perturbations_per_eval)
        check_target(where(self), target, len(several[0]))
        passes = [evaluate(tuple(one.clone() for one in several), 1)]
        with torch.no_grad(), self._bar(show_progress, len(features), chunk) as done:
            done(0)
            for start in range(0, len(features), chunk):
                part = features[start : start + chunk]
                passes.append(evaluate(ablation.without(part), len(part)))
                done(start + len(part))

        def finish(collected: Future[list[Future[Tensor]]]) -> Any:
            initial, *rest = (one.value() for one in collected.value())
            drops = _no_drops(ablation, initial)
            for number, output in enumerate(rest):
                part = features[number * chunk : (number + 1) * chunk]
                drops[part] = self._drop(initial, output, len(part), several)
            found = self._maps(ablation, drops)
            return found if isinstance(inputs, tuple) else found[0]

        return collect_all(passes).then(finish)

    def _leave_out(
        self,
        inputs: tuple[Tensor, ...],
        baselines: Baselines,
        target: Target,
        additional_forward_args: object,
        features: Features,
        segments: Segments | None,
        perturbations_per_eval: int,
        show_progress: bool,
    ) -> tuple[Tensor, ...]:
        ablation = self._ablation(inputs, baselines, features)
        chunk = self._checked(perturbations_per_eval)
        check_target(where(self), target, len(inputs[0]))
        queue = _queue(ablation)
        with torch.no_grad(), self._bar(show_progress, len(queue), chunk) as done:
            prepared = isinstance(self.forward_func, PreparedModel) and self.forward_func.fused
            if segments is not None and prepared and ablation.fills[0].isfinite().all():
                rows = None if chunk == 1 else chunk * len(inputs[0])
                call = Call(where(self), self.forward_func, inputs[0], target, additional_forward_args)
                try:
                    return (self._of_images(call, rows, segments, ablation.fills[0], len(queue), done, show_progress),)
                except (PerBatch, AssertionError):  # the output is not one number for each row
                    done(None)
            evaluate = functools.partial(self._evaluate, inputs, target, additional_forward_args)
            initial = evaluate(tuple(one.clone() for one in inputs), 1).clone()  # the function may answer into one buffer
            done(0)
            chunk = self._together(chunk, ablation, queue, additional_forward_args)
            drops = _no_drops(ablation, initial)
            places = to_device(np.array(queue, np.int64), drops.device)

            def body(start: int, stop: int) -> None:
                part = queue[start:stop]
                output = evaluate(ablation.without(part), len(part))
                drops[places[start:stop]] = self._drop(initial, output, len(part), inputs)
                done(stop)

            row_bytes = sum(one.numel() * one.element_size() for one in inputs)
            run_chunks(len(queue), body, label=self.get_name(), batch_size=chunk, device=inputs[0].device, row_bytes=row_bytes)
            return self._maps(ablation, drops)

    def _of_images(
        self,
        call: Call,
        rows: int | None,
        segments: Segments,
        fill: Tensor,
        features: int,
        done: Callable[[int | None], None],
        show: bool,
    ) -> Tensor:
        """Return the map of a prepared model, whose rows are independent: features that change nothing are skipped."""
        clean = True

        def report(_label: str, rows: int, total: int) -> None:  # of the clean pass first, then of the features
            nonlocal clean
            done(0 if clean else round(features * rows / total))
            clean = clean and rows < total

        plan = call.plan()
        plan = plan.derive(plan.inputs, plan.origin, batch_size=rows)
        plan.dtype = plan.accumulator_dtype = widest(plan.device)  # until it is known what the function returns
        with progress(report) if show else nullcontext():
            found = leave_one_out.prepare(plan, segments=segments, fill=fill, mode="out", approximate=None).run(report=False)
        return self._rounded(found.map.expand_as(call.inputs[0]).contiguous(), found.details["drops"][0].dtype)

    def _rounded(self, found: Tensor, dtype: torch.dtype) -> Tensor:
        return found.to(dtype)

    def _maps(self, ablation: Ablation, drops: Tensor) -> tuple[Tensor, ...]:
        return tuple(self._rounded(one, drops.dtype) for one in ablation.maps(drops))


def warn_of_options(attribution: FeatureAblation, options: dict[str, Any]) -> None:
    """Say what captum's signature takes and nobody looks at."""
    if options:
        warn(f"{where(attribution)}: attribute has no arguments {', '.join(options)}: they change nothing, as in captum")


def _segments(masks: tuple[Tensor, ...], inputs: tuple[Tensor, ...]) -> Tensor | None:
    """Return the masks as the label maps of images, where they are some: the same in all channels."""
    if len(inputs) != 1 or inputs[0].ndim != 4 or inputs[0].dtype not in FLOATING or 0 in inputs[0].shape:
        return None
    image, mask = inputs[0], masks[0]
    if mask.ndim == 4 and mask.shape[1] > 1:
        if not torch.equal(mask, mask[:, :1].expand_as(mask)):
            return None
        mask = mask[:, :1]
    if mask.ndim == 3 and mask.shape[0] > 1:
        return None
    if mask.ndim > 4 or image.shape[2] * image.shape[3] < 2:
        return None
    numbered = torch.unique(mask, return_inverse=True)[1]
    rows = numbered.reshape((1,) * (4 - numbered.ndim) + tuple(numbered.shape))[:, 0]
    labels: Tensor = rows.expand(-1, *image.shape[2:])
    return labels


def _queue(ablation: Ablation) -> list[int]:
    return [feature for feature, reachable in enumerate(ablation.reachable) if reachable]


def _no_drops(ablation: Ablation, initial: Tensor) -> Tensor:
    return torch.zeros(len(ablation.features), initial.numel(), dtype=initial.dtype, device=initial.device)


introduce(FeatureAblation)
