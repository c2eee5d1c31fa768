"""One call, translated: the peer's targets, the modes of the model, its outputs."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from pysal._checks import refuse
from pysal.engine.prepared.model import PreparedModel
from pysal.engine.request.row_score import class_scores
from pysal.engine.request.target import RowTarget, Target
from pysal.engine.running.states import restoring, undo_later
from pysal.pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

Targets: TypeAlias = Sequence[Callable[[Any], Any]] | None


def where(cam: object) -> str:
    """Return the public name of a class, for errors."""
    return f"pysal.pytorch_grad_cam.{type(cam).__name__}"


class PartOfHooks:
    """A name of the peer that means something only where its hooks are in the model: whoever asks for it is told so."""

    def __set_name__(self, owner: type, name: str) -> None:
        """Keep the name."""
        self.name = name

    def __get__(self, cam: object, owner: type) -> Any:
        """Raise.

        Raises:
            AttributeError: always, so that `hasattr` says no.
        """
        place = f"pysal.pytorch_grad_cam.{owner.__name__}.{self.name}"
        raise AttributeError(f"{place}: belongs to the peer's hooks, which are not here; call the object for its maps")


def evaluating(model: nn.Module | PreparedModel) -> None:
    """Have all of a model in eval mode until the state is put back, in a `restoring` function."""
    if isinstance(model, PreparedModel):
        return
    for module in model.modules():
        if module.training:
            undo_later(functools.partial(setattr, module, "training", True))
            module.training = False


@restoring
def outputs_of(model: Any, images: Tensor) -> Any:
    """Return what a model in eval mode answers to images, without gradients."""
    if isinstance(model, (nn.Module, PreparedModel)):
        evaluating(model)
    with torch.no_grad():
        return model(images)


def row_of(output: Any, row: int, rows: int) -> Any:
    """Return what an output says of one row: of a tensor or a list with an entry for each, that entry."""
    if not isinstance(output, (Tensor, list)) or len(output) != rows:
        output = class_scores(output)
    return output[row]


def scores_of(where: str, output: Any, targets: Sequence[Callable[[Any], Any]]) -> list[Tensor]:
    """Return what the target of each row says of it, as tensors of one number.

    Raises:
        TypeError: no tensor.
        ValueError: several numbers.
    """
    found = []
    for row, target in enumerate(targets):
        score = target(row_of(output, row, len(targets)))
        if not isinstance(score, Tensor):
            refuse(where, "targets", "return tensors", type(score).__name__, TypeError)
        if score.numel() != 1:
            refuse(where, "targets", "return one number for each image", f"shape {tuple(score.shape)}")
        found.append(score.reshape(()))
    return found


class _PerImage(RowTarget):
    """The peer's targets: what each says of its image's part of the output."""

    follows_rows = False  # each is given its own row alone

    def __init__(self, where: str, targets: Sequence[Callable[[Any], Any]]) -> None:
        self.where, self.targets = where, targets
        self.__name__ = ", ".join(dict.fromkeys(type(one).__name__ for one in targets))

    def __call__(self, output: Any, rows: Tensor) -> Tensor:
        """Return (N,) scores."""
        return torch.stack(scores_of(self.where, output, [self.targets[row] for row in rows.tolist()]))


def plan_targets(where: str, targets: Targets, input_tensor: Any) -> Target:
    """Return the peer's targets as a plan's: classes by index where that is all they are.

    Raises:
        TypeError: no list of callables.
        ValueError: not one for each image.
    """
    if targets is None:
        return None
    if not isinstance(targets, (list, tuple)) or not all(map(callable, targets)):
        refuse(where, "targets", "be None or a list of callables", type(targets).__name__, TypeError)
    number = len(input_tensor) if isinstance(input_tensor, Tensor) and input_tensor.ndim else 0
    if number and len(targets) != number:
        refuse(where, "targets", f"be one for each of {number} images", len(targets))
    classes = [one.category for one in targets if type(one) is ClassifierOutputTarget and type(one.category) is int]
    if len(classes) == len(targets) and all(one >= 0 for one in classes):
        return classes
    return _PerImage(where, targets)
