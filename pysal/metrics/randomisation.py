"""The sanity check by parameter randomisation: whether a method's map depends on what the model has learned."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from skimage.metrics import structural_similarity
from torch import Tensor, nn

from pysal._checks import check_seed, refuse, refuse_unknown
from pysal._library import widened
from pysal.engine.prepared.model import PreparedModel
from pysal.engine.request.attribution import checked_options
from pysal.engine.request.extra_inputs import ExtraInputs
from pysal.engine.request.plan import Plan
from pysal.engine.request.running import Running
from pysal.engine.request.score import Output, ScoreKind
from pysal.engine.request.target import Target
from pysal.engine.request.work import Work
from pysal.engine.running.precision import Precision
from pysal.engine.running.states import keep_random_numbers, leave_inference_mode, restoring
from pysal.methods.registry import EVERY, check_method
from pysal.metrics._maps import per_pixel
from pysal.metrics.agreement import correlation, ranks_of, reduction_of

Order: TypeAlias = Literal["cascading", "independent", "at_once"]

WINDOW = 7  # pixels of SSIM's window, scikit-image's usual one; less where the image is smaller


@dataclass(frozen=True)
class Randomisation:
    """How alike the maps of a model and of the same model with random layers are.

    Attributes:
        layers: (L,) names, from the output to the input: in step l, layer l is random, and in a cascade those before it too.
            Of layers that become random at once, the last one's name stands for them all.
        correlation: (L, B) float64, Spearman's rank correlation of the two maps' pixels; NaN where a map is constant.
        correlation_of_sizes: (L, B) float64, that of |map|.
        similarity: (L, B) float64, SSIM of the two maps, each divided by its largest |value|; NaN where a map is zero.
    """

    layers: tuple[str, ...]
    correlation: Tensor
    correlation_of_sizes: Tensor
    similarity: Tensor


def parameter_randomisation(
    model: nn.Module,
    inputs: Tensor,
    target: Target = None,
    *,
    method: str = "gradient",
    method_options: Mapping[str, Any] | None = None,
    order: Order = "cascading",
    layers: Sequence[str] | None = None,
    seed: int = 0,
    score: ScoreKind | None = None,
    extra_inputs: ExtraInputs = (),
    batch_size: int | None = None,
    precision: Precision = "float32",
) -> Randomisation:
    """Return how alike a method's maps stay while the model's layers are made random, one after the other.

    A map that stays alike does not depend on what was learned. Layers are the modules that own parameters, from the last that
    was registered to the first. A layer that has `reset_parameters`, as all of torch's have, is initialised by that; another
    one's parameters are shuffled. The target, where it is None, is that of the trained model.

    Args:
        model: an nn.Module in eval mode, or a prepared model, of which the original is taken; it is copied, not changed.
        inputs: (B, C, H, W), floating point.
        target: a class by index, or by name if the model carries names; a `pysal.Margin`; one of `pysal.targets`; a callable
            `output -> (N,)` that scores each row by that row alone; a list with one of these per image; a `pysal.RowTarget`,
            which is told the image of each row; or None for each image's highest class.
        method: a name as `pysal.explain` takes it.
        method_options: that method's own options.
        order: "cascading" makes ever more layers random, "independent" one at a time, "at_once" all of them, the last step of
            the cascade alone.
        layers: names as `model.named_modules()` has them, in the order to take; None = all, from the output to the input.
        seed: of the random parameters; torch's own generator is left as it is.
        score: which number of the target's column is explained. "logit" or "raw": the output as it is. "auto": the target's
            probability if the output tells one, else the output as it is. "probability" and "log_probability": the same, but
            one number per image outside [0, 1] is refused. "softmax", "log_softmax" (classes exclude each other), "sigmoid",
            "log_sigmoid" (independent labels, or a binary logit): that function, whatever the output is. What the output is
            (numbers, probabilities, logits) is found out from all images of the call together.
            None = the method's usual one: "auto" for leave-one-out, else "logit".
        extra_inputs: further arguments of the model, by position (a sequence) or by name (a mapping). Mark one that is as long
            as there are images: `pysal.PerImage(x)` has a row for each image, `pysal.Shared(x)` is the same for all.
        batch_size: most rows per model pass; None = chosen by speed and memory. Changes the result by rounding only. The model
            must answer for each row as if it were alone, which is checked by passes of two rows and of one. With `batch_size=B`
            it need not: every pass then holds the whole batch in its order.
        precision: "float32", "tf32", "mixed" (float32 forward, bf16 backward) or "bf16" (rounding switches some ReLUs).

    Returns:
        The three likenesses for each layer and image, on the CPU.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, value, target, method, option or layer, or a model without parameters.
        NotApplicable: the method cannot explain this model.

    Source:
        Adebayo, Gilmer, Muelly, Goodfellow, Hardt and Kim 2018, arXiv:1810.03292 (both orders, rank correlation
        with and without absolute values, SSIM).

    Deviations:
        SSIM has scikit-image's window of 7 x 7 equal weights; maps are divided by their largest |value|.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.Flatten(), torch.nn.Linear(72, 2)).eval()
        >>> found = parameter_randomisation(model, torch.rand(1, 1, 8, 8), target=0)
        >>> found.layers, found.correlation.shape
        (('2', '0'), torch.Size([2, 1]))
    """
    where = "pysal.metrics.parameter_randomisation"
    original = model.original if isinstance(model, PreparedModel) else model
    if not isinstance(original, nn.Module):
        refuse(where, "model", "be an nn.Module", type(model).__name__, TypeError)
    name = check_method(where, method)
    if order not in get_args(Order):
        refuse_unknown(where, "order", f"be {' or '.join(map(repr, get_args(Order)))}", order, get_args(Order))
    check_seed(where, seed)
    options = checked_options(where, "method_options", EVERY[name].prepare, method_options)
    names = _layers(where, original, layers)

    running = Running(EVERY[name].score if score is None else score, extra_inputs, batch_size, precision, None)

    def plan_of(module: nn.Module, explained: Target, output: Output | None = None) -> Plan:
        return Plan(where, module, inputs, explained, running, output=output)

    trained = plan_of(original, target)
    work = EVERY[name].prepare(trained, **options)
    trained.fix_target()
    explained = trained.score.fixed
    reduction = reduction_of(name)

    def pixels(work: Work) -> Tensor:
        return per_pixel(where, widened(work.run(report=True).map), reduction).cpu()

    before = pixels(work)
    found: list[list[NDArray[Any]]] = [[], [], []]
    for module in _randomised(original, names, order, seed):
        plan = plan_of(module, explained, trained.score.look.output)
        after = pixels(EVERY[name].prepare(plan, **options))
        found[0].append(correlation(ranks_of(before), ranks_of(after)))
        found[1].append(correlation(ranks_of(before.abs()), ranks_of(after.abs())))
        found[2].append(_similarity(before, after, EVERY[name].signed))
    steps = names[-1:] if order == "at_once" else names
    return Randomisation(tuple(steps), *(torch.from_numpy(np.stack(rows)) for rows in found))


def randomised(model: nn.Module, seed: int) -> nn.Module:
    """Return a copy of a model all of whose layers are random, as order="at_once" has them."""
    original = model.original if isinstance(model, PreparedModel) else model
    (found,) = _randomised(original, _layers("pysal.metrics.parameter_randomisation", original, None), "at_once", seed)
    return found


def likeness(method: str, before: Tensor, after: Tensor) -> NDArray[Any]:
    """Return Spearman's rank correlation (B,) of the magnitudes of a method's maps of two models."""
    reduction = reduction_of(method)
    pixels = [per_pixel("pysal.metrics.parameter_randomisation", widened(map), reduction).abs() for map in (before, after)]
    return correlation(ranks_of(pixels[0]), ranks_of(pixels[1]))


def _layers(where: str, model: nn.Module, layers: Sequence[str] | None) -> list[str]:
    """Return the names of the layers to take, in order."""
    own = [name for name, module in model.named_modules() if next(module.parameters(recurse=False), None) is not None]
    if not own:
        refuse(where, "model", "have parameters", type(model).__name__)
    if layers is None:
        return own[::-1]
    if isinstance(layers, str) or not isinstance(layers, Sequence) or not layers:
        refuse(where, "layers", "be a sequence of names, or None", repr(layers), TypeError)
    for name in layers:
        if name not in own:
            refuse_unknown(where, "layers", "name modules that own parameters", name, own)
    return list(layers)


def _randomised(model: nn.Module, names: Sequence[str], order: str, seed: int) -> Iterator[nn.Module]:
    """Yield copies of a model, layer after layer random; that of a cascade is the same one, changed further."""
    cascade = _copied(model)
    for name in names:
        module = _copied(model) if order == "independent" else cascade
        devices = [parameter.device for parameter in module.parameters() if parameter.device.type == "cuda"]
        # a layer gets the same numbers in either order, and whatever other layers are chosen beside it
        _make_random(module.get_submodule(name), _layer_seed(seed, name), list(dict.fromkeys(devices)))
        if order != "at_once" or name == names[-1]:
            yield module.eval()


def _copied(model: nn.Module) -> nn.Module:
    with torch.inference_mode(False):  # whose tensors autograd does not keep
        return copy.deepcopy(model)


def _layer_seed(seed: int, name: str) -> int:
    """Return a seed of 32 bits for a layer."""
    return int(np.random.SeedSequence([seed % 2**64, *name.encode()]).generate_state(1)[0])


@restoring
def _make_random(layer: nn.Module, seed: int, devices: Sequence[torch.device]) -> None:
    """Give a layer's own parameters, and what it counts beside them, the values of an untrained layer."""
    keep_random_numbers(*devices)
    torch.manual_seed(seed)
    leave_inference_mode()
    torch._C._set_grad_enabled(False)
    reset = getattr(layer, "reset_parameters", None)
    if callable(reset):
        reset()
        return
    for parameter in layer.parameters(recurse=False):
        order = torch.randperm(parameter.numel(), device="cpu").to(parameter.device)
        parameter.copy_(parameter.flatten()[order].view_as(parameter))


def _similarity(before: Tensor, after: Tensor, signed: bool) -> NDArray[Any]:
    """Return SSIM of maps (B, H, W), each divided by its largest |value|."""
    side = min(*before.shape[1:], WINDOW)
    window = side if side % 2 else side - 1
    result = np.full(len(before), np.nan)
    for image, (one, other) in enumerate(zip(before.numpy(), after.numpy(), strict=True)):
        sizes = np.abs(one).max(), np.abs(other).max()
        if window >= 3 and min(sizes) > 0 and np.isfinite(sizes).all():
            result[image] = structural_similarity(  # type: ignore[no-untyped-call]
                one / sizes[0], other / sizes[1], win_size=window, data_range=2.0 if signed else 1.0
            )
    return result
