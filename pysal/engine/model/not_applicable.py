"""The error that says a method cannot explain this model, not that the call was wrong."""

import contextlib
from collections.abc import Iterator


class NotApplicable(ValueError):
    """This method does not apply to this model: no ReLU for guided backprop, no spatial layer for Grad-CAM, no gradients.

    `explain(methods="all")` leaves such a method out and says why; everything else raises it.
    """


class NotDifferentiable(NotApplicable):
    """The score has no gradient where one is needed."""


def not_differentiable(where: str) -> NotDifferentiable:
    """Return what to raise where a score has no gradient at the inputs; `where` is the public name of the method."""
    return NotDifferentiable(
        f"{where}: model must be differentiable, got a score that does not depend on the inputs through torch; "
        "leave_one_out explains such a model"
    )


REENTRANT = "torch.utils.checkpoint with use_reentrant=True, which has no gradient of an input: pass use_reentrant=False"
# What torch says where autograd cannot follow a model, and what that is.
_REFUSALS = {
    "torch.utils.checkpoint is incompatible with .grad()": REENTRANT,
    "Inference tensors cannot be saved for backward": (
        "tensors made in torch.inference_mode, which have no gradients: torch.no_grad makes others; "
        "leave_one_out explains such a model"
    ),
}


def reentrant(where: str) -> NotDifferentiable:
    """Return what to raise where a part of the model has a gradient of its weights alone."""
    return NotDifferentiable(f"{where}: model must be differentiable, got {REENTRANT}")


@contextlib.contextmanager
def differentiating(where: str) -> Iterator[None]:
    """Say in one sentence what torch refuses on the way there and back; `where` is the public name of the method."""
    try:
        yield
    except RuntimeError as error:
        refuse_derivative(where, error)
        raise


def refuse_derivative(where: str, error: RuntimeError) -> None:
    """Say in one sentence what torch refused on the way there or back; return if it is something else."""
    for words, reason in _REFUSALS.items():
        if words in str(error):
            raise NotDifferentiable(f"{where}: model must be differentiable, got {reason}") from error
