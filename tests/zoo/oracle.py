"""What the maps are, by plain autograd and explicit masking: image by image, or of the batch where rows act on each other."""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pysal import ops
from pysal.metrics._maps import uniform
from tests.methods.guided_path import guided_path
from tests.methods.networks import images
from tests.zoo.networks import Network, plain

STEPS, SAMPLES, SIGMA, STEP, DEVIATION, RADIUS = 3, 2, 1.0, 0.01, 0.1, 0.02
FRACTION, DISTANCE = 0.25, 0.5  # of guided paths
RELUS = (F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_)


class Ruled(torch.autograd.Function):
    """A ReLU with the rule of guided backprop or of the deconvnet."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, guided: bool) -> Tensor:
        ctx.save_for_backward(values)
        ctx.guided = guided
        return values.clamp_min(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        (values,) = ctx.saved_tensors
        return grad * (grad > 0) * ((values > 0) if ctx.guided else 1), None


class Rule(TorchFunctionMode):
    """Puts the rule in the place of every ReLU that is called."""

    def __init__(self, guided: bool) -> None:
        super().__init__()
        self.guided, self.met = guided, 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in RELUS:
            self.met += 1
            return Ruled.apply(args[0], self.guided)
        return function(*args, **(kwargs or {}))


class Oracle:
    """The maps of one network. Every answer is (B, C, H, W) or (B, 1, H, W), in the dtype that was asked for."""

    def __init__(self, network: Network, dtype: torch.dtype = torch.float64, *, whole: bool = False) -> None:
        self.network, self.model, self.dtype = network, plain(network, dtype), dtype
        self.given = images(*network.shape).to(network.dtype)
        self.images = self.given.to(dtype)
        self.whole = whole  # whether the batch is one thing, as for rows that act on each other

    def groups(self, batch: Tensor) -> Iterator[Tensor]:
        return iter([batch] if self.whole else batch.split(1))

    def score(self, batch: Tensor) -> Tensor:
        """The explained number of each row (N,) of a pass."""
        output = self.model(batch)
        if self.network.pick is not None:
            return self.network.pick(output)
        found: Tensor = output[:, self.network.target]
        return found

    def scores(self, batch: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.cat([self.score(group.clone()) for group in self.groups(batch)])

    def gradient(self, batch: Tensor | None = None) -> Tensor:
        found = []
        for group in self.groups(self.images if batch is None else batch):
            leaf = group.clone().requires_grad_()
            found.append(torch.autograd.grad(self.score(leaf.clone()).sum(), leaf)[0])
        return torch.cat(found)

    def ruled(self, *, guided: bool) -> Tensor:
        with Rule(guided) as rule:
            found = self.gradient()
        assert rule.met, "no ReLU was met"
        return found

    def guided_backprop(self) -> Tensor:
        return self.ruled(guided=True)

    def deconvnet(self) -> Tensor:
        return self.ruled(guided=False)

    def layer(self) -> tuple[Tensor, Tensor]:
        """Activation and gradient (B, K, h, w) of the default layer."""
        name, _, run = self.network.layer.partition("@")
        module = self.model.get_submodule(name.removeprefix("module."))
        kept: list[Tensor] = []

        def keep(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
            kept.append(output.clone())  # what is changed in place later is not what was meant
            return kept[-1].clone()

        parts = []
        with contextlib.closing(_Handle(module.register_forward_hook(keep))):
            for group in self.groups(self.images):
                kept.clear()
                total = self.score(group.clone().requires_grad_().clone()).sum()
                activation = kept[int(run) if run else -1]
                parts.append((activation.detach(), torch.autograd.grad(total, activation)[0]))
        activations, gradients = (torch.cat(part) for part in zip(*parts, strict=True))
        if activations.ndim == 3:  # a class token, then the cells of a map
            side = self.images.shape[2] // 2
            activations, gradients = (one[:, 1:].transpose(1, 2).unflatten(2, (side, -1)) for one in (activations, gradients))
        return activations, gradients

    def cam(self) -> Tensor:
        """Grad-CAM without its ReLU, of the layer's size."""
        activation, gradient = self.layer()
        return (gradient.mean((2, 3), keepdim=True) * activation).sum(1, keepdim=True)

    def cam_relu(self) -> Tensor:
        return self.cam().relu()

    def grad_cam(self) -> Tensor:
        return F.interpolate(self.cam().relu(), self.images.shape[2:], mode="bilinear", align_corners=False)

    def guided_grad_cam(self) -> Tensor:
        return self.grad_cam() * self.guided_backprop()

    def smooth_grad(self) -> Tensor:
        flat = self.images.flatten(1).double()
        deviations = 0.15 * (flat.amax(1) - flat.amin(1))
        return torch.stack([self.gradient(self.noisy(deviations, k)) for k in range(SAMPLES)]).mean(0)

    def noisy(self, deviations: Tensor, sample: int) -> Tensor:
        """The images with a sample of the noise of seed 0, which is that of the images' own dtype."""
        rows = torch.arange(len(self.images))
        found = ops.gaussian_noise(self.given, deviations, 0, rows, rows, torch.full_like(rows, sample))
        return found.to(self.dtype)

    def tunnel(self) -> Tensor:
        """The mean gradient at noisy copies that are in one pass, image after image, as captum's."""
        deviations = torch.full((len(self.images),), DEVIATION, dtype=torch.float64)
        flat = self.given.flatten(1)[:, None, None]
        rows = torch.arange(len(self.images)).repeat_interleave(SAMPLES)
        draws = torch.arange(SAMPLES).repeat(len(self.images))
        points = ops.gaussian_noise(flat, deviations, 0, rows, rows, draws).view(-1, *self.images.shape[1:])
        return self.gradient(points.to(self.dtype)).unflatten(0, (-1, SAMPLES)).mean(1)

    def infidelity(self) -> Tensor:
        """(B,): the mean squared error of the images, taken for slopes, at telling what noise does."""
        flat = self.images.flatten(1).double()
        deviations = DEVIATION * (flat.amax(1) - flat.amin(1))
        clean, errors = self.scores(self.images), []
        for sample in range(SAMPLES):
            changed = self.noisy(deviations, sample)
            told = ((self.images - changed) * self.images).flatten(1).sum(1)
            errors.append(told - (clean - self.scores(changed)))
        return torch.stack(errors).square().mean(0)

    def max_sensitivity(self) -> Tensor:
        """(B,): by how much the gradient changes at worst around each image, in shares of its size."""
        rows, clean, changes = torch.arange(len(self.images)), self.gradient(), []
        for sample in range(SAMPLES):
            numbers = uniform(0, rows, torch.full_like(rows, sample), self.images[0].numel())
            shifts = (RADIUS * (2 * numbers - 1)).view_as(self.images)
            around = (self.given.double() + shifts).to(self.network.dtype).to(self.dtype)
            changes.append((self.gradient(around) - clean).flatten(1).norm(dim=1))
        return torch.stack(changes).amax(0) / clean.flatten(1).norm(dim=1)

    def integrated_gradients(self) -> Tensor:
        places = [(k + 0.5) / STEPS for k in range(STEPS)]
        return self.images * torch.stack([self.gradient(place * self.images) for place in places]).mean(0)

    def stacked(self) -> Tensor:
        """The same with all steps in one pass, as captum makes it."""
        steps = torch.cat([(k + 0.5) / STEPS * self.images for k in range(STEPS)])
        return self.images * self.gradient(steps).unflatten(0, (STEPS, -1)).mean(0)

    def repeated(self) -> Tensor:
        """The mean gradient at copies of the images that are in one pass."""
        return self.gradient(self.images.repeat_interleave(SAMPLES, 0)).unflatten(0, (-1, SAMPLES)).mean(1)

    def ends_and_middle(self) -> Tensor:
        """PAIR's rule: equal weights, both ends of the path among the steps."""
        places = [k / (STEPS - 1) for k in range(STEPS)]
        return self.images * torch.stack([self.gradient(place * self.images) for place in places]).mean(0)

    def blurred(self, sigma: float) -> Tensor:
        if not sigma:
            return self.images
        planes = [[gaussian_filter(plane.double().numpy(), sigma, mode="constant") for plane in one] for one in self.images]
        return torch.tensor(planes, dtype=torch.float64).to(self.dtype)

    def blur_integrated_gradients(self) -> Tensor:
        total, width = torch.zeros_like(self.images), SIGMA / STEPS
        for k in range(STEPS):
            level = self.blurred(k * width)
            total -= width * (self.blurred(k * width + STEP) - level) / STEP * self.gradient(level)
        return total

    def guided_integrated_gradients(self) -> Tensor:
        """The authors' algorithm in NumPy, a step of all images at a time."""
        given = {"steps": STEPS, "fraction": FRACTION, "max_distance": DISTANCE}
        paths = [guided_path(np.zeros(one.shape), one.double().numpy(), **given) for one in self.images]
        places = [next(path) for path in paths]
        for _ in range(STEPS):
            gradients = self.gradient(torch.from_numpy(np.stack(places)).to(self.dtype)).double().numpy()
            places = [path.send(one) for path, one in zip(paths, gradients, strict=True)]
        return torch.from_numpy(np.stack(places)).to(self.dtype)

    def xrai(self) -> Tensor:
        """Each half of the images with the mean of its pixels, whose largest channel of Integrated Gradients counts.

        They are the mean from two baselines, an image of the least and one of the largest value.
        """
        total = torch.zeros_like(self.images)
        for baseline in (self.images.amin((1, 2, 3), keepdim=True), self.images.amax((1, 2, 3), keepdim=True)):
            way = self.images - baseline
            for middle in [(k + 0.5) / STEPS for k in range(STEPS)]:  # at its square, where a step is 2 t / n long
                total += way * self.gradient(baseline + middle**2 * way) * 2 * middle / STEPS / 2
        found = torch.zeros_like(total[:, :1])
        for box in self.halves():
            found[(..., *box)] = total.amax(1, keepdim=True)[(..., *box)].mean((2, 3), keepdim=True)
        return found

    def without(self, box: tuple[slice, slice]) -> Tensor:
        """The images with a box of them black."""
        changed = self.images.clone()
        changed[(..., *box)] = 0
        return changed

    def drawn(self, canvas: Tensor, boxes: list[tuple[slice, slice]]) -> Tensor:
        """Each box with the drop of the scores without it."""
        clean = self.scores(self.images)
        canvas = canvas.to(torch.promote_types(canvas.dtype, clean.dtype))
        for box in boxes:
            canvas[(..., *box)] = (clean - self.scores(self.without(box)))[:, None, None, None]
        return canvas

    def halves(self) -> list[tuple[slice, slice]]:
        width = self.images.shape[3] // 2
        return [(slice(None), slice(0, width)), (slice(None), slice(width, None))]

    def leave_one_out(self) -> Tensor:
        return self.drawn(torch.zeros_like(self.images[:, :1]), self.halves())

    def summed_columns(self) -> Tensor:
        """PAIR's occlusion by windows of one pixel."""
        height, width = self.images.shape[2:]
        boxes = [(slice(i, i + 1), slice(j, j + 1)) for i in range(height) for j in range(width)]
        return self.drawn(torch.zeros_like(self.images), boxes)

    def deletion(self) -> Tensor:
        """The scores (B, 3) of the images, without the brighter half of their pixels, and black."""
        order = self.images.sum(1).flatten(1).argsort(dim=1, descending=True, stable=True)
        half = order[:, : order.shape[1] // 2]
        kept = torch.ones_like(order, dtype=self.dtype).scatter_(1, half, 0).view(len(order), 1, *self.images.shape[2:])
        return torch.stack([self.scores(one) for one in (self.images, self.images * kept, 0 * self.images)], 1)

    def insertion(self) -> Tensor:
        """The scores (B, 3) of black, of the brighter half of the pixels on black, and of the images."""
        order = self.images.sum(1).flatten(1).argsort(dim=1, descending=True, stable=True)
        half = order[:, : order.shape[1] // 2]
        kept = torch.zeros_like(order, dtype=self.dtype).scatter_(1, half, 1).view(len(order), 1, *self.images.shape[2:])
        return torch.stack([self.scores(one) for one in (0 * self.images, self.images * kept, self.images)], 1)


class _Handle:
    def __init__(self, handle: Any) -> None:
        self.close = handle.remove
