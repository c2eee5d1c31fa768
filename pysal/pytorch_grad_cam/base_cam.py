"""What all classes have: the model, its layers, and the call that returns NumPy maps."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pysal._checks import refuse
from pysal.engine.prepared.model import PreparedModel
from pysal.engine.request.attribution import Attribution
from pysal.engine.request.plan import Plan
from pysal.engine.request.running import Running
from pysal.engine.running.states import restoring
from pysal.methods import grad_cam
from pysal.methods.cam_kinds import KINDS, Kind, kind_of, made, total, unit
from pysal.pytorch_grad_cam._request import PartOfHooks, Targets, evaluating, outputs_of, plan_targets, where
from pysal.pytorch_grad_cam.utils.image import scale_cam_image

Maps = NDArray[np.float32]


class ActivationsAndGradients:
    """Stands where the peer keeps its hooks: there are none outside of a call."""

    activations = PartOfHooks()
    gradients = PartOfHooks()
    handles = PartOfHooks()
    save_activation = PartOfHooks()
    save_gradient = PartOfHooks()

    def clear(self) -> None:
        """Do nothing."""

    def release(self) -> None:
        """Do nothing."""


class BaseCAM:
    """A class activation map as the peer has it: called with images and targets, it returns NumPy maps.

    A subclass says what is drawn by `get_cam_weights` or by `get_cam_image`, as in the peer.

    Args:
        model: the model, or what `pysal.prepare` made of it. It runs in eval mode and is given back in its own.
        target_layers: modules of the model; the maps of several are averaged.
        reshape_transform: what turns a layer's output into (N, K, h, w); None = it is that, or tokens that can be read.
        compute_input_gradient: accepted for the peer's sake.
        uses_gradients: whether the map needs the layer's gradient.
        tta_transforms: a `ttach.Compose`, or anything that iterates over transforms with `augment_image` and
            `deaugment_mask`; None = flips times 0.9, 1 and 1.1.
        detach: accepted for the peer's sake.
    """

    kind: ClassVar[str | Kind | None] = None
    smooth: ClassVar[bool | None] = None  # whether the first principal component is drawn; None = as the call says

    def __init__(
        self,
        model: nn.Module | PreparedModel,
        target_layers: Sequence[nn.Module],
        reshape_transform: Callable[[Any], Tensor] | None = None,
        compute_input_gradient: bool = False,
        uses_gradients: bool = True,
        tta_transforms: Any = None,
        detach: bool = True,
    ) -> None:
        if not isinstance(model, (nn.Module, PreparedModel)):
            refuse(where(self), "model", "be an nn.Module", type(model).__name__, TypeError)
        if not isinstance(target_layers, (list, tuple)) or not all(isinstance(one, nn.Module) for one in target_layers):
            refuse(where(self), "target_layers", "be a list of modules", type(target_layers).__name__, TypeError)
        self.model, self.target_layers, self.reshape_transform = model, target_layers, reshape_transform
        self.compute_input_gradient, self.uses_gradients = compute_input_gradient, uses_gradients
        self.tta_transforms, self.detach = tta_transforms, detach
        self.batch_size: int | None = None
        self.activations_and_grads = ActivationsAndGradients()
        self._asked: Tensor | None = None
        self._outputs: Any = None

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        model = self.model.original if isinstance(self.model, PreparedModel) else self.model
        return next((one.device for one in model.parameters()), torch.device("cpu"))

    @property
    def outputs(self) -> Any:
        """What the model said of the images of the last call: of classes from its own pass, else from a pass made now."""
        if self._outputs is None and self._asked is not None:
            self._outputs = outputs_of(self.model, self._asked)
        return self._outputs

    def __call__(
        self, input_tensor: Tensor, targets: Targets = None, aug_smooth: bool = False, eigen_smooth: bool = False
    ) -> Maps:
        """Return the maps (B, H, W), float32, each scaled to [0, 1].

        Args:
            input_tensor: (B, C, H, W).
            targets: a callable for each image, its output -> a number; None = each image's highest class.
            aug_smooth: whether the maps of flipped and scaled copies are averaged.
            eigen_smooth: whether the first principal component of the weighted activations is drawn.

        Raises:
            TypeError: an argument of the wrong type or dtype.
            ValueError: a wrong shape, not one target for each image, a target that is no number, no such layer.
        """
        call = self.forward_augmentation_smoothing if aug_smooth else self.forward
        return call(input_tensor, targets, eigen_smooth)

    def forward(self, input_tensor: Tensor, targets: Targets = None, eigen_smooth: bool = False) -> Maps:
        """Return what a call without `aug_smooth` does."""
        return self._maps(input_tensor, targets, aug_smooth=False, eigen_smooth=bool(eigen_smooth))

    def forward_augmentation_smoothing(self, input_tensor: Tensor, targets: Targets = None, eigen_smooth: bool = False) -> Maps:
        """Return what a call with `aug_smooth` does.

        Raises:
            NotImplementedError: a subclass has a `forward` of its own, which the copies would not see.
        """
        if type(self).forward is not BaseCAM.forward:
            refuse(where(self), "aug_smooth", "be False for a class with its own forward", True, NotImplementedError)
        return self._maps(input_tensor, targets, aug_smooth=True, eigen_smooth=bool(eigen_smooth))

    def get_target_width_height(self, input_tensor: Tensor) -> tuple[int, int]:
        """Return the width and the height of images (B, C, H, W).

        Raises:
            ValueError: another shape; volumes, too.
        """
        if input_tensor.ndim != 4:
            refuse(where(self), "inputs", "be a batch of images (B, C, H, W)", f"shape {tuple(input_tensor.shape)}")
        return input_tensor.shape[3], input_tensor.shape[2]

    def aggregate_multi_layers(self, cam_per_target_layer: Sequence[NDArray[Any]]) -> Maps:
        """Return the maps (B, H, W) of the maps (B, 1, H, W) of each layer: their mean."""
        return scale_cam_image(np.maximum(np.concatenate(list(cam_per_target_layer), axis=1), 0).mean(axis=1))

    compute_cam_per_layer = PartOfHooks()

    def get_cam_weights(
        self, input_tensor: Tensor, target_layer: Any, targets: Targets, activations: Any, grads: Any
    ) -> NDArray[Any]:
        """Return the weight (N, K) of each channel; for subclasses, which may say otherwise.

        Raises:
            NotImplementedError: the class has no weights of channels by activations and gradients alone.
        """
        kind = self._way()
        if kind is not None and kind.passes == "none" and not kind.curvature:
            found = kind.terms(*(torch.as_tensor(one, device="cpu") for one in (activations, grads)))
            if found.ndim == 2:
                return found.numpy()
        if self.kind is None:
            raise NotImplementedError("get_cam_weights must be implemented by subclass")
        raise NotImplementedError(f"{where(self)}.get_cam_weights: channels have no weights without the model; call the object")

    def get_cam_image(
        self,
        input_tensor: Tensor,
        target_layer: Any,
        targets: Targets,
        activations: Any,
        grads: Any,
        eigen_smooth: bool = False,
    ) -> NDArray[Any]:
        """Return the map (N, h, w) of the class, or that of a subclass's `get_cam_weights`; subclasses may do otherwise."""
        kind = self._way() if type(self).get_cam_weights is BaseCAM.get_cam_weights else None
        if kind is not None and kind.passes == "none" and not kind.curvature:
            a, g = (torch.as_tensor(one, device="cpu") for one in (activations, activations if grads is None else grads))
            smooth = eigen_smooth if self.smooth is None else self.smooth
            return made(kind, where(self), a, g, smooth=smooth, weights=None)[:, 0].numpy()
        weights = self.get_cam_weights(input_tensor, target_layer, targets, activations, grads)
        values = torch.as_tensor(activations, device="cpu")
        kind = Kind("own", where(self), lambda a, _g: torch.as_tensor(weights, device="cpu").to(a), total)
        return made(kind, where(self), values, values, smooth=eigen_smooth, weights=None)[:, 0].numpy()

    def __enter__(self) -> Self:
        """Return the object: there is nothing to open."""
        return self

    def __exit__(self, *error: object) -> None:
        """Do nothing: there is nothing to close, and errors are not the object's to hide."""

    @restoring
    def _maps(self, input_tensor: Tensor, targets: Targets, *, aug_smooth: bool, eigen_smooth: bool) -> Maps:
        for name in ("compute_cam_per_layer", "aggregate_multi_layers"):
            if inspect.getattr_static(type(self), name) is not vars(BaseCAM)[name]:
                refuse(where(self), "cam", f"be of a class without its own {name}", type(self).__name__, NotImplementedError)
        evaluating(self.model)
        plan = self._plan(input_tensor, targets)
        self._asked, self._outputs = plan.inputs, None
        if aug_smooth:
            transforms = self.tta_transforms
            pairs: Any = True if transforms is None else [(one.augment_image, one.deaugment_mask) for one in transforms]
        found = self._attribution(plan, targets, augment=pairs if aug_smooth else False, eigen_smooth=eigen_smooth)
        self._outputs = None if plan.known is None else plan.known.table
        maps = found.map if aug_smooth else unit(found.map.to(torch.promote_types(found.map.dtype, torch.float32)))
        answer: Maps = maps[:, 0].float().cpu().numpy()
        return answer

    def _plan(self, input_tensor: Tensor, targets: Targets) -> Plan:
        if isinstance(input_tensor, Tensor):
            input_tensor = input_tensor.detach().to(self.device)
        number = len(input_tensor) if isinstance(input_tensor, Tensor) and input_tensor.ndim else None
        rows = self.batch_size or (number or None if self._own else None)  # of a class of one's own: the batch, as there
        running = Running("logit", (), rows, "as set", None)
        return Plan(where(self), self.model, input_tensor, plan_targets(where(self), targets, input_tensor), running)

    @property
    def _own(self) -> bool:
        """Whether a subclass says what is drawn."""
        mine = type(self)
        return mine.get_cam_image is not BaseCAM.get_cam_image or mine.get_cam_weights is not BaseCAM.get_cam_weights

    def _way(self) -> Kind | None:
        """Return how the class draws, None where its subclass must say so."""
        return None if self.kind is None else kind_of(where(self), self.kind)

    def _kind(self, plan: Plan, targets: Targets, eigen_smooth: bool) -> Kind:
        if not self._own:
            kind = self._way()
            if kind is None:
                raise NotImplementedError("get_cam_weights must be implemented by subclass")
            return kind
        layer = self.target_layers[0] if len(self.target_layers) == 1 else None

        def terms(activations: Tensor, gradients: Tensor) -> Tensor:
            arrays = [one.cpu().numpy() for one in (activations, gradients)]
            image = self.get_cam_image(plan.inputs, layer, targets, arrays[0], arrays[1], eigen_smooth)
            return torch.as_tensor(image, device="cpu").to(activations)[:, None]

        return Kind("own", type(self).__name__, terms, total, gradient=self.uses_gradients)

    def _attribution(self, plan: Plan, targets: Targets, *, augment: Any, eigen_smooth: bool) -> Attribution:
        """Return the map; of a module that runs several times, of its last run."""
        kind = self._kind(plan, targets, eigen_smooth)
        smooth = False if self._own else eigen_smooth if self.smooth is None else self.smooth

        def attribute(layers: list[Any]) -> Attribution:
            work = grad_cam.prepare(
                plan,
                layer=layers,
                tokens=self.reshape_transform,
                kind=kind,
                eigen_smooth=smooth,
                fuse="mean",
                augment=augment,
            )
            return work.run(report=False)

        try:
            return attribute(list(self.target_layers))
        except ValueError as error:
            if "must run once in a pass" not in str(error):
                raise
            model = plan.layered_model
            names = {module: name for name, module in model.named_modules()} if isinstance(model, nn.Module) else {}
            return attribute([f"{names[one]}@-1" for one in self.target_layers])


def kind_with(name: str, **changes: Any) -> Kind:
    """Return one of the kinds with some of its attributes changed."""
    return Kind(**{**vars(KINDS[name]), **changes})
