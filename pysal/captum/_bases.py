"""The base classes that captum's own wrappers test for; captum's own if captum is installed."""

import functools
import importlib
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ParamSpec, TypeAlias, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pysal._checks import check_choice, refuse
from pysal.captum import _call
from pysal.captum._call import Inputs, Target
from pysal.engine.running.states import restoring

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")
Baselines: TypeAlias = "Tensor | float | tuple[Tensor | float, ...] | None"

if TYPE_CHECKING:  # what the two branches below have in common

    class _Attribution: ...

    class _GradientAttribution(_Attribution): ...

    class _PerturbationAttribution(_Attribution): ...

    class _LayerAttribution(_Attribution): ...

elif find_spec("captum") is not None:
    from captum.attr._utils.attribution import Attribution as _Attribution
    from captum.attr._utils.attribution import GradientAttribution as _GradientAttribution
    from captum.attr._utils.attribution import LayerAttribution as _LayerAttribution
    from captum.attr._utils.attribution import PerturbationAttribution as _PerturbationAttribution
else:

    class _Attribution: ...

    class _GradientAttribution(_Attribution): ...

    class _PerturbationAttribution(_Attribution): ...

    class _LayerAttribution(_Attribution): ...


def entry(method: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Give a method the `__wrapped__` that captum's NoiseTunnel and other wrappers call, and the state back afterwards."""
    return restoring(method)


def introduce(ours: type) -> None:
    """Have captum's wrappers that go by lists of classes accept one of ours wherever they accept its namesake."""
    if find_spec("captum") is None:
        return
    loaders = importlib.import_module("captum.attr._core.dataloader_attr")
    if any(one.__name__ == ours.__name__ for one in loaders.SUPPORTED_METHODS):
        loaders.SUPPORTED_METHODS.add(ours)
    language = importlib.import_module("captum.attr._core.llm_attr")
    for wrapper in (language.LLMAttribution, language.LLMGradientAttribution):
        for name in ("SUPPORTED_METHODS", "SUPPORTED_PER_TOKEN_ATTR_METHODS"):
            listed = getattr(wrapper, name, ())
            if ours not in listed and any(one.__name__ == ours.__name__ for one in listed):
                setattr(wrapper, name, (*listed, ours))


def entry_of_parts(method: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Give a method that `__wrapped__`, whose parts put back by themselves what they change of the state."""

    @functools.wraps(method)
    def run(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        return method(*args, **kwargs)

    return run


class Attribution(_Attribution):
    """Base of all methods: holds the forward function and has the properties that captum's wrappers read.

    Args:
        forward_func: the model, or any function of it; each call of `attribute` reads it again.
    """

    attribute: Callable[..., Any]
    _multiply_by_inputs = False

    def __init__(self, forward_func: Callable[..., Any]) -> None:
        self.forward_func = forward_func

    @property
    def multiplies_by_inputs(self) -> bool:
        """Whether the attributions contain the inputs as a factor: input - baseline, or the activation of a layer."""
        return self._multiply_by_inputs

    def has_convergence_delta(self) -> bool:
        """Whether `compute_convergence_delta` means anything for this method."""
        return False

    @classmethod
    def get_name(cls) -> str:
        """Return the name of the class as words: "Feature Ablation"."""
        return _in_words(cls.__name__)

    def attribute_future(self, *args: Any, **kwargs: Any) -> Any:
        """Not implemented, as in captum, except in `FeatureAblation`.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(f"{where(self)}: attribute_future exists for FeatureAblation only")


@functools.cache
def _in_words(name: str) -> str:
    return "".join(" " + letter if letter.isupper() and i else letter for i, letter in enumerate(name))


class GradientAttribution(Attribution, _GradientAttribution):
    """Base of the methods that differentiate the forward function.

    Args:
        forward_func: the model, or any function of it.
    """

    @property
    def gradient_func(self) -> Callable[..., tuple[Tensor, ...]]:
        """Read-only: (forward_fn, inputs, target_ind, additional_forward_args) -> the gradient of each input."""
        return _call.compute_gradients

    def _ask(self, inputs: Inputs, target: Target, additional_forward_args: object, **options: Any) -> _call.Call:
        return _call.Call(where(self), self.forward_func, inputs, target, additional_forward_args, **options)

    def _gradients(self, call: _call.Call) -> tuple[Tensor, ...]:
        return call.gradients()

    @entry
    def compute_convergence_delta(
        self,
        attributions: Inputs,
        start_point: Baselines,
        end_point: Inputs,
        target: Target = None,
        additional_forward_args: object = None,
    ) -> Tensor:
        """Return the sum of each example's attributions minus the change of the output.

        Args:
            attributions: (B, ...) each.
            start_point: baselines of the examples.
            end_point: the examples.
            target: see `Saliency`.
            additional_forward_args: see `Saliency`.

        Returns:
            (B,) sum of the attributions - (f(end_point) - f(start_point)).

        Raises:
            AssertionError: the numbers of examples do not match.
        """
        ends = _call.as_tuple(end_point)
        given = baselines_of(self, start_point, ends)
        check_baselines(self, given, ends)
        starts = tuple(_call.spread(end, start) for end, start in zip(ends, given, strict=True))
        found = _call.as_tuple(attributions)
        for one, end in zip(found, ends, strict=False):
            if len(one) != len(end):
                refuse(where(self), "attributions", f"have {len(end)} rows, as end_point", len(one), AssertionError)
        _call.check_target(where(self), target, len(ends[0]))
        with torch.no_grad():
            change = [
                _row_sums(_call.evaluate(self.forward_func, points, target, additional_forward_args))
                for points in (starts, ends)
            ]
            return torch.stack([_row_sums(one) for one in found]).sum(0) - (change[1] - change[0])


def _row_sums(values: Tensor) -> Tensor:
    return values.reshape(len(values) if values.ndim else 1, -1).sum(1)


class PerturbationAttribution(Attribution, _PerturbationAttribution):
    """Base of the methods that change the inputs and compare the outputs.

    Args:
        forward_func: the model, or any function of it.
    """

    _multiply_by_inputs = True  # the output changes as a feature goes from input to baseline


class LayerAttribution(Attribution, _LayerAttribution):
    """Base of the methods that explain a layer.

    Args:
        forward_func: the model, or any function of it.
        layer: the layer, a module the forward function runs; some methods take a list of layers.
        device_ids: accepted, as in captum, and ignored: the model runs on one device.
    """

    def __init__(
        self, forward_func: Callable[..., Any], layer: nn.Module | list[nn.Module], device_ids: list[int] | None = None
    ) -> None:
        Attribution.__init__(self, forward_func)
        self.layer: Any = layer
        self.device_ids = device_ids

    @staticmethod
    def interpolate(
        layer_attribution: Tensor, interpolate_dims: int | tuple[int, ...], interpolate_mode: str = "nearest"
    ) -> Tensor:
        """Return a layer's attribution resized to the size of an input.

        Args:
            layer_attribution: (B, C, ...), one to three dimensions of space.
            interpolate_dims: the size of the result, one number per dimension of space.
            interpolate_mode: as `mode` of `torch.nn.functional.interpolate`.

        Raises:
            ValueError: the mode does not exist, or not for this number of dimensions.
        """
        check_interpolation("pysal.captum.LayerAttribution.interpolate", interpolate_mode, layer_attribution.ndim)
        return F.interpolate(layer_attribution, interpolate_dims, mode=interpolate_mode)


# Dimensions of the tensors that a mode of torch.nn.functional.interpolate is for.
MODES = {
    "nearest": (3, 4, 5),
    "nearest-exact": (3, 4, 5),
    "area": (3, 4, 5),
    "linear": (3,),
    "bilinear": (4,),
    "bicubic": (4,),
    "trilinear": (5,),
}


def check_interpolation(where: str, mode: object, dimensions: int | None = None) -> None:
    """Refuse a mode of interpolation that does not exist, or that is not for tensors of so many dimensions.

    Raises:
        ValueError: as said.
    """
    check_choice(where, "interpolate_mode", mode, tuple(MODES))
    if dimensions is not None and dimensions not in MODES[str(mode)]:
        wanted = " or ".join(str(one - 2) for one in MODES[str(mode)])
        refuse(where, "interpolate_mode", f"fit {dimensions - 2} dimensions of space", f"{mode!r}, which is for {wanted}")


# What torch.autograd.grad may be told that changes nothing here: gradients of what does not matter are zeros in any case.
HARMLESS_GRAD_KWARGS = ("allow_unused", "materialize_grads", "retain_graph")
CREATE_GRAPH = "create_graph"


def wants_graph(attribution: "Attribution", grad_kwargs: Mapping[str, Any] | None) -> bool:
    """Return whether `grad_kwargs` ask for autograd's graph; refuse what else torch.autograd.grad would be told.

    Raises:
        NotImplementedError: as said.
    """
    for name in grad_kwargs or ():
        if name not in (*HARMLESS_GRAD_KWARGS, CREATE_GRAPH):
            wanted = f"hold {', '.join((*HARMLESS_GRAD_KWARGS, CREATE_GRAPH))} alone"
            refuse(where(attribution), "grad_kwargs", wanted, repr(name), NotImplementedError)
    return bool((grad_kwargs or {}).get(CREATE_GRAPH, False))


def where(attribution: Attribution) -> str:
    """Return the public name of a class, for errors."""
    return f"pysal.captum.{type(attribution).__name__}"


def baselines_of(attribution: Attribution, baselines: Baselines, inputs: tuple[Tensor, ...]) -> tuple[Tensor | float, ...]:
    """Return the baselines as a tuple: what stands for absence in each input, 0 (False) where none are given.

    Raises:
        AssertionError: a baseline that is neither number nor tensor.
    """
    if baselines is None:
        return tuple(False if one.dtype == torch.bool else 0 for one in inputs)
    given = baselines if isinstance(baselines, tuple) else (baselines,)
    for one in given:
        if not isinstance(one, (Tensor, int, float)):
            refuse(where(attribution), "baselines", "be numbers or tensors", type(one).__name__, AssertionError)
    return given


def check_baselines(
    attribution: Attribution, baselines: tuple[Tensor | float, ...], inputs: tuple[Tensor, ...], *, drawn: bool = False
) -> None:
    """Refuse baselines that fit the inputs neither row by row nor as one row for all; `drawn`: any number of rows will do.

    Raises:
        AssertionError: as said.
    """
    if len(baselines) != len(inputs):
        refuse(where(attribution), "baselines", f"be {len(inputs)}, one for each input", len(baselines), AssertionError)
    for one, input in zip(baselines, inputs, strict=True):
        if isinstance(one, Tensor):
            fits = one.shape[1:] == input.shape[1:] if drawn else one.shape == input.shape or one.shape[:1] == (1,)
            if not fits:
                wanted = f"fit an input of shape {tuple(input.shape)}"
                refuse(where(attribution), "baselines", wanted, f"shape {tuple(one.shape)}", AssertionError)
