"""captum's NoiseTunnel: SmoothGrad and its relatives around any attribution."""

import math
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from pysal._checks import refuse, refuse_unknown
from pysal._library import widest
from pysal.captum._bases import (
    CREATE_GRAPH,
    Attribution,
    _GradientAttribution,
    baselines_of,
    check_baselines,
    entry,
    where,
)
from pysal.captum._batches import copies_per_pass, goes_along, of_rows
from pysal.captum._call import Inputs, arguments, as_tuple, check_rows, check_target, floating, target_of
from pysal.engine.running.chunks import run_chunks

NT_TYPES = ("smoothgrad", "smoothgrad_sq", "vargrad")
# Inputs of one example draw from streams of their own: image ids this far apart.
STREAM = 2**40
# takes noisy inputs, the example of each of their rows, baselines, the number of the group, and the number of each copy among
# all where that decides what is drawn
Take: TypeAlias = Callable[[tuple[Tensor, ...], Tensor, Any, int, Tensor | None], None]


class NoiseTunnel(Attribution):
    """The mean of an attribution over noisy copies of the inputs, as `pysal.smooth_grad`.

    Args:
        attribution_method: any attribution of this module or of captum.
        rng: where the noise comes from. "philox": it depends only on the seed, the example and the sample, so no batch size
            changes the result. "captum": captum's noise, bit for bit, from torch's generator (and NumPy's for drawn baselines);
            it depends on `nt_samples_batch_size`.
        seed: seed of the "philox" noise; None = each call draws one from torch's generator, so `torch.manual_seed` decides.

    Source:
        Smilkov et al. 2017, arXiv:1706.03825; "smoothgrad_sq": Hooker et al. 2018, arXiv:1806.10758; "vargrad": Adebayo et al.
        2018, arXiv:1810.03307.
    """

    def __init__(
        self,
        attribution_method: Any,
        *,
        rng: Literal["philox", "captum"] = "philox",
        seed: int | None = None,
    ) -> None:
        super().__init__(attribution_method.forward_func)
        if rng not in ("philox", "captum"):
            refuse(where(self), "rng", "be 'philox' or 'captum'", repr(rng))
        self.attribution_method = attribution_method
        self.is_delta_supported = bool(attribution_method.has_convergence_delta())
        self.is_gradient_method = isinstance(attribution_method, _GradientAttribution)
        self.rng, self.seed = rng, seed

    @property
    def multiplies_by_inputs(self) -> bool:
        """Whether the attribution's maps contain the factor input - baseline."""
        return bool(self.attribution_method.multiplies_by_inputs)

    def has_convergence_delta(self) -> bool:
        """Whether the attribution has a convergence delta."""
        return self.is_delta_supported

    @entry
    def attribute(
        self,
        inputs: Inputs,
        nt_type: str = "smoothgrad",
        nt_samples: int = 5,
        nt_samples_batch_size: int | None = None,
        stdevs: float | tuple[float, ...] = 1.0,
        draw_baseline_from_distrib: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Return the mean, the mean square or the variance of the attributions of noisy inputs.

        Args:
            inputs: (B, ...), or a tuple of such tensors.
            nt_type: "smoothgrad", "smoothgrad_sq" or "vargrad" (never negative).
            nt_samples: noisy copies per example.
            nt_samples_batch_size: most copies of all examples in one pass. None = all of them, as in captum; if these are many
                rows and do not depend on each other, as many as are fast.
            stdevs: standard deviation of the noise, in the inputs' units; one float, or one for each input.
            draw_baseline_from_distrib: draw each copy's baseline from the rows of `baselines`.
            **kwargs: arguments of the attribution. `target`, `additional_forward_args`, `baselines` and `feature_mask` are
                repeated with their example.

        Returns:
            What the attribution returns for `inputs`; with `return_convergence_delta`, the pair of that and (B * nt_samples,)
            deltas, those of an example side by side.

        Raises:
            AssertionError: `nt_type` is unknown, `stdevs` are not floats or do not fit, the attribution does not return one
                map for each example, or the target does not fit.
            IndexError: the inputs have no rows.
            NotImplementedError: `create_graph` is asked for.
            RuntimeError: a standard deviation below 0.
            TypeError: `nt_samples_batch_size` is not a whole number.
        """
        several = as_tuple(inputs)
        examples = len(several[0])
        if nt_type not in NT_TYPES:
            refuse_unknown(where(self), "nt_type", f"be one of {', '.join(NT_TYPES)}", nt_type, NT_TYPES, AssertionError)
        if not isinstance(nt_samples, int) or nt_samples < 1:
            refuse(where(self), "nt_samples", "be a whole number of at least 1", repr(nt_samples), AssertionError)
        if nt_samples_batch_size is not None and not isinstance(nt_samples_batch_size, int):
            refuse(where(self), "nt_samples_batch_size", "be None or a whole number", repr(nt_samples_batch_size), TypeError)
        if not examples:
            refuse(where(self), "inputs", "hold at least one example", f"shape {tuple(several[0].shape)}", IndexError)
        check_rows(where(self), several)
        if kwargs.get(CREATE_GRAPH) or (kwargs.get("grad_kwargs") or {}).get(CREATE_GRAPH):
            refuse(
                where(self), CREATE_GRAPH, "be False: moments of noisy attributions carry no graph", "True", NotImplementedError
            )
        check_target(where(self), kwargs.get("target"), examples)
        deviations = stdevs if isinstance(stdevs, tuple) else (stdevs,) * len(several)
        if len(deviations) != len(several) or not (isinstance(stdevs, tuple) or isinstance(stdevs, float)):
            refuse(where(self), "stdevs", f"be a float or {len(several)} of them", repr(stdevs), AssertionError)
        if not all(one >= 0 for one in deviations):
            refuse(where(self), "stdevs", "be at least 0", repr(stdevs), RuntimeError)
        moments = _Moments(where(self), examples, squared=nt_type == "smoothgrad_sq", variance=nt_type == "vargrad")
        deltas: list[Tensor] = []
        owners: list[Tensor] = []  # the example of each delta, in groups that stay together
        wants_delta = self.is_delta_supported and bool(kwargs.get("return_convergence_delta"))

        def take(noisy: tuple[Tensor, ...], rows: Tensor, baselines: Any, group: int, copies: Tensor | None) -> None:
            options = _of_rows(kwargs, rows, examples)
            if baselines is not None:
                options["baselines"] = baselines
            if copies is not None and getattr(self.attribution_method, "numbers_its_copies", False):
                options["copies"] = copies
            if self.is_gradient_method:
                noisy = tuple(one.requires_grad_() for one in noisy)
            method = self.attribution_method
            attribute = getattr(method.attribute, "__wrapped__", type(method).attribute)
            found = attribute(method, noisy if isinstance(inputs, tuple) else noisy[0], **options)
            if wants_delta:
                found, delta = found
                deltas.append(delta)
                owners.append(rows + group * examples)
            moments.take(found, rows)

        with torch.no_grad():
            run = self._philox if self.rng == "philox" else self._captum
            run(
                several,
                deviations,
                nt_samples,
                nt_samples_batch_size,
                self._draws(several, draw_baseline_from_distrib, kwargs),
                arguments(kwargs.get("additional_forward_args")),
                take,
            )
        found = moments.result()
        if not wants_delta:
            return found
        return found, torch.cat(deltas)[torch.cat(owners).argsort(stable=True).to(deltas[0].device)]

    def _draws(self, inputs: tuple[Tensor, ...], draw: bool, kwargs: dict[str, Any]) -> tuple[Tensor | float, ...] | None:
        """Return the baselines to draw from, None where there are none."""
        if "baselines" not in kwargs:
            return None
        given = baselines_of(self, kwargs["baselines"], inputs)
        check_baselines(self, given, inputs, drawn=draw)
        return given if draw else None

    def _philox(
        self,
        inputs: tuple[Tensor, ...],
        deviations: tuple[float, ...],
        samples: int,
        cap: int | None,
        distribution: tuple[Tensor | float, ...] | None,
        further: tuple[Any, ...],
        take: Take,
    ) -> None:
        examples, device = inputs[0].shape[0], inputs[0].device
        seed = int(torch.randint(-(2**63), 2**63 - 1, (), device="cpu")) if self.seed is None else self.seed
        reals = [floating(torch.real(one.detach())) for one in inputs]  # real noise, as captum's
        images = [one.reshape(len(one), 1, 1, math.prod(one.shape[1:])) for one in reals]
        scales = [
            torch.full((examples,), one, dtype=widest(image.device), device=image.device)
            for one, image in zip(deviations, images, strict=True)
        ]
        drawn = [
            one[
                torch.randint(
                    len(one),
                    (examples * samples,),
                    generator=torch.Generator(device="cpu").manual_seed(seed + number),
                    device="cpu",
                ).to(one.device)
            ]
            if isinstance(one, Tensor)
            else one
            for number, one in enumerate(distribution or ())
        ]

        def noisy(rows: Tensor, draws: Tensor) -> tuple[Tensor, ...]:
            found = []
            for number, (image, scale, input) in enumerate(zip(images, scales, inputs, strict=True)):
                own, draw = rows.to(image.device), draws.to(image.device)
                # the op as it is: all of this is made here, and its checks take as long as a layer
                one = torch.ops.pysal.gaussian_noise(
                    image, scale, seed, own.int(), own + number * STREAM if number else own, draw, image.dtype, False
                ).reshape(own.shape[0], *input.shape[1:])
                found.append(torch.complex(one, input.detach().imag[own]) if input.is_complex() else one)
            return tuple(found)

        def body(start: int, stop: int) -> None:  # an example's copies side by side, as captum has them
            draws = torch.arange(start, stop, device=device)
            rows = torch.zeros_like(draws)
            if examples > 1:
                rows = torch.arange(examples, device=device).repeat_interleave(stop - start)
                draws = draws.repeat(examples)
            items = draws if examples == 1 else rows * samples + draws
            baselines = tuple(_rows_of(one, items) for one in drawn)
            take(noisy(rows, draws), rows, baselines if distribution else None, 0, items)

        run_chunks(
            samples,
            body,
            label=self.get_name(),
            batch_size=self._copies(noisy, samples, inputs, further, cap),
            device=device,
            row_bytes=sum(one.numel() * one.element_size() for one in images),
        )

    def _captum(
        self,
        inputs: tuple[Tensor, ...],
        deviations: tuple[float, ...],
        samples: int,
        cap: int | None,
        distribution: tuple[Tensor | float, ...] | None,
        further: tuple[Any, ...],
        take: Take,
    ) -> None:
        examples = len(inputs[0])
        size = samples if cap is None else min(samples, cap)
        parts = [size] * (samples // size) + [samples % size] * (samples % size > 0)
        baselines: dict[int, Any] = {}
        for number, part in enumerate(parts):
            if part not in baselines:  # captum draws once for all full parts
                baselines[part] = tuple(
                    one[np.random.choice(len(one), part * examples).tolist()] if isinstance(one, Tensor) else one
                    for one in distribution or ()
                )
            noisy = []
            for one, deviation in zip(inputs, deviations, strict=True):
                shape = (examples * part, *one.shape[1:])
                noise = torch.normal(0, torch.tensor(deviation, device=one.device).repeat(shape))
                noisy.append(one.detach().repeat_interleave(part, dim=0) + noise)
            self._hand_over(tuple(noisy), examples, part, baselines[part] if distribution else None, further, take, number)

    def _hand_over(
        self,
        noisy: tuple[Tensor, ...],
        examples: int,
        part: int,
        baselines: tuple[Tensor | float, ...] | None,
        further: tuple[Any, ...],
        take: Take,
        group: int,
    ) -> None:
        """Give noisy copies (B * part, ...), an example's side by side, to the attribution: all, or as many as is right."""
        rows = torch.arange(examples, device=noisy[0].device).repeat_interleave(part)

        def points(own: Tensor, copies: Tensor) -> tuple[Tensor, ...]:
            return tuple(one[(own * part + copies).to(one.device)] for one in noisy)

        size = self._copies(points, part, tuple(one[:examples] for one in noisy), further, None)
        if size == part:
            take(noisy, rows, baselines, group, None)
            return
        draws = torch.arange(part, device=noisy[0].device).repeat(examples)
        for start in range(0, part, size):
            chosen = ((draws >= start) & (draws < start + size)).nonzero()[:, 0]
            own = None if baselines is None else tuple(_rows_of(one, chosen) for one in baselines)
            take(tuple(_rows_of(one, chosen) for one in noisy), rows[chosen], own, group, None)

    def _copies(
        self,
        points: Callable[[Tensor, Tensor], tuple[Tensor, ...]],
        samples: int,
        inputs: tuple[Tensor, ...],
        further: tuple[Any, ...],
        cap: int | None,
    ) -> int:
        """Return how many noisy copies of the batch `inputs` go to the attribution at once."""
        if further and any(isinstance(one, Tensor) and one.ndim and len(one) > len(inputs[0]) for one in further):
            return 1  # among more rows such a tensor could pass for one that has a row for each
        forward = self.attribution_method.forward_func
        return copies_per_pass(forward, points, samples, inputs, further, None if cap is None else max(1, cap))


class _Moments:
    """Running moments of an attribution's tensors, one row for each example.

    Complex numbers are two real ones each. What is called the variance of theirs is captum's: mean square less squared mean.
    """

    def __init__(self, where: str, examples: int, *, squared: bool, variance: bool) -> None:
        self.where, self.examples, self.squared, self.variance = where, examples, squared, variance
        self.is_tuple = False
        self.dtypes: list[torch.dtype] = []
        self.state: list[tuple[Tensor, Tensor, Tensor]] = []
        self.squares: _Moments | None = None  # of complex maps

    def take(self, found: Any, rows: Tensor) -> None:
        self.is_tuple = isinstance(found, tuple)
        maps = [floating(one.detach()) for one in as_tuple(found)]
        for one in maps:
            if len(one) != rows.shape[0]:
                requirement = f"return one map for each of {rows.shape[0]} examples"
                refuse(self.where, "attribution_method", requirement, len(one), AssertionError)
        if self.squared:
            maps = [one.square() if one.is_complex() else one for one in maps]
        self._add(maps, rows)
        if self.variance and any(one.is_complex() for one in maps):
            if self.squares is None:
                self.squares = _Moments(self.where, self.examples, squared=False, variance=False)
            self.squares._add([one.square() for one in maps], rows)

    def _add(self, maps: list[Tensor], rows: Tensor) -> None:
        if not self.state:
            self.dtypes = [one.dtype for one in maps]
        maps = [torch.view_as_real(one) if one.is_complex() else one for one in maps]
        if not self.state:
            for one in maps:
                wide = torch.float64 if one.dtype == torch.float64 else torch.float32
                mean = torch.zeros((self.examples, *one.shape[1:]), dtype=wide, device=one.device)
                counts = torch.zeros(self.examples, dtype=torch.int64, device=one.device)
                self.state.append((mean, torch.zeros_like(mean), counts))
        for one, dtype, (mean, squares, counts) in zip(maps, self.dtypes, self.state, strict=True):
            samples = one.to(mean.dtype)
            samples = samples.square() if self.squared and not dtype.is_complex else samples
            torch.ops.pysal.path_integral_moments_(mean, squares, counts, samples, rows.to(one.device).int())

    def _means(self) -> list[Tensor]:
        return [
            torch.view_as_complex(mean).to(dtype) if dtype.is_complex else mean.to(dtype)
            for (mean, _, _), dtype in zip(self.state, self.dtypes, strict=True)
        ]

    def result(self) -> Any:
        found = self._means()
        if self.variance:
            squares = None if self.squares is None else self.squares._means()
            for number, (dtype, (mean, deviations, counts)) in enumerate(zip(self.dtypes, self.state, strict=True)):
                if dtype.is_complex and squares is not None:
                    found[number] = squares[number] - found[number].square()
                else:
                    found[number] = (deviations / counts.reshape(-1, *(1,) * (mean.ndim - 1))).to(dtype)
        return tuple(found) if self.is_tuple else found[0]


def _rows_of(one: Any, rows: Tensor) -> Any:
    return one[rows.to(one.device)] if isinstance(one, Tensor) else one


def _of_rows(kwargs: dict[str, Any], rows: Tensor, examples: int) -> dict[str, Any]:
    """Return an attribution's arguments for copies of the examples `rows` (N,)."""

    def pick(one: Any) -> Any:
        return one[rows.to(one.device)] if goes_along(one, examples) else one

    options = dict(kwargs)
    if "target" in options:
        options["target"] = target_of(options["target"], rows)
    if options.get("additional_forward_args") is not None:
        options["additional_forward_args"] = of_rows(arguments(options["additional_forward_args"]), rows, examples)
    for name in ("baselines", "feature_mask"):
        given = options.get(name)
        if given is not None:  # one row stands for all examples
            several = tuple(
                one if isinstance(one, Tensor) and len(one) == 1 else pick(one)
                for one in (given if isinstance(given, tuple) else (given,))
            )
            options[name] = several if isinstance(given, tuple) else several[0]
    return options
