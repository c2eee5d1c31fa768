"""FullGrad: the gradient of the image times the image, and the gradients of all biases times these."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pysal._checks import refuse
from pysal._library import without_autocast
from pysal.engine.layers.features import Layer, find_layer
from pysal.engine.model.not_applicable import NotApplicable
from pysal.engine.request.attribution import Attribution
from pysal.engine.request.plan import Plan
from pysal.engine.request.sweeps import Sweep
from pysal.engine.request.work import Work
from pysal.methods.cam_kinds import projection, unit
from pysal.methods.grad_cam import Augment, augmented, copies_of, resized

# Where Srinivas and Fleuret's maps are smoothed: an eighth of the image's size, or the projection would be of too many cells.
SMOOTHED_AT = 8


def layers_with_bias(model: nn.Module) -> list[str]:
    """Return the names of the layers of maps that have a bias, in the model's order."""
    kinds = (nn.Conv2d, nn.BatchNorm2d)
    return [name for name, module in model.named_modules() if type(module) in kinds and module.bias is not None]


def bias_of(module: nn.Module) -> Tensor:
    """Return the number (K,) that a layer adds to each channel; of a batch norm, with its running mean taken away."""
    bias = module.bias
    assert isinstance(bias, Tensor)
    if not isinstance(module, nn.BatchNorm2d) or module.running_mean is None or module.running_var is None:
        return bias.detach()
    factor = 1 / (module.running_var + module.eps).sqrt()
    return (bias - module.running_mean * factor * module.weight).detach()


@dataclass(frozen=True)
class _BiasTerm:
    """Makes the map of a layer's biases: every channel |bias G|, scaled to [0, 1]; the channels added up and enlarged."""

    height: int
    width: int
    bias: Tensor = field(compare=False)

    def __call__(self, _activation: Tensor, gradient: Tensor) -> tuple[Tensor]:
        with without_autocast(gradient.device.type):
            wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
            found = scaled(wide * self.bias.to(wide)[:, None, None]).sum(1, keepdim=True)
            # the sum of enlarged maps is the sum enlarged, which takes a channel's time
            return (resized(found, (self.height, self.width)),)


def scaled(terms: Tensor) -> Tensor:
    """Return the absolute values of terms (N, K, h, w), each channel scaled to [0, 1]."""
    return unit(terms.abs().flatten(0, 1)[:, None]).reshape(terms.shape)


def prepare(plan: Plan, *, eigen_smooth: bool, augment: Augment) -> Work:
    """Return the work that finds FullGrad of every image of a plan, (B, 1, H, W), in [0, 1].

    Args:
        plan: of the images.
        eigen_smooth: whether the maps of the image's channels and of the layers become their first principal component, at an
            eighth of the size, instead of their sum.
        augment: see `pysal.grad_cam`.

    Raises:
        NotApplicable: no layer has a bias.

    Source:
        Srinivas and Fleuret 2019, arXiv:1905.00780, equation 9. Each channel is scaled and enlarged by itself, as in
        pytorch-grad-cam: of a bias it matters only whether it is 0. The authors' own code scales a layer's channels together.
    """
    copies = copies_of(plan.where, augment)
    if copies:

        def again(copied: Plan) -> Attribution:
            return prepare(copied, eigen_smooth=eigen_smooth, augment=False).run(report=False)

        return Work(plan, lambda _report: augmented(plan, copies, again, scored=True))
    model = plan.layered_model
    if not isinstance(model, nn.Module):
        refuse(plan.where, "model", "be an nn.Module, whose layers can be captured", type(model).__name__, TypeError)
    names = layers_with_bias(model)
    if not names:
        raise NotApplicable(f"{plan.where}: model must have convolutions or batch norms with a bias, got none")
    height, width = plan.inputs.shape[2:]
    layers = [find_layer(plan.where, model, name) for name in names]
    sweeps = [_sweep(plan.where, layer, _BiasTerm(height, width, bias_of(layer.module))) for layer in layers]

    def make(_report: bool) -> Attribution:
        (gradient,), *terms = plan.sweeps(Sweep(), *sweeps)
        with without_autocast(plan.device.type):
            wide = gradient.to(plan.accumulator_dtype)
            maps = [scaled(wide * plan.inputs.to(wide)), *(one.to(wide) for (one,) in terms)]
            whole = torch.cat(maps, 1)
            if not eigen_smooth:
                found = whole.sum(1, keepdim=True)
            else:
                small = resized(scaled(whole), (max(1, height // SMOOTHED_AT), max(1, width // SMOOTHED_AT)))
                found = resized(unit(projection(small)), (height, width))
        return Attribution(unit(found).to(plan.dtype), passes=1, details={"layer": ", ".join(names)})

    return Work(plan, make, lambda: [Sweep(), *sweeps])


def _sweep(where: str, layer: Layer, reduce: Callable[[Tensor, Tensor], tuple[Tensor]]) -> Sweep:
    return Sweep(layer=layer, reduce=reduce, where=where)
