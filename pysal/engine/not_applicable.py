"""The error that says a method cannot explain this model, not that the call was wrong."""

import contextlib
from collections.abc import Iterator


class NotApplicable(ValueError):
    """This method does not apply to this model: no ReLU for guided backprop, no spatial layer for Grad-CAM, no gradients.

    `explain(methods="all")` leaves such a method out and says why; everything else raises it.
    """


def not_differentiable(where: str) -> NotApplicable:
    """Return what to raise where a score has no gradient at the inputs; `where` is the public name of the method."""
    return NotApplicable(
        f"{where}: model must be differentiable, got a score that does not depend on the inputs through torch; "
        "leave_one_out explains such a model"
    )


def reentrant(where: str) -> NotApplicable:
    """Return what to raise where a part of the model has a gradient of its weights alone."""
    return NotApplicable(
        f"{where}: model must be differentiable, got torch.utils.checkpoint with use_reentrant=True, which has no gradient "
        "of an input: pass use_reentrant=False"
    )


@contextlib.contextmanager
def differentiating(where: str) -> Iterator[None]:
    """Say in one sentence what torch refuses on the way back; `where` is the public name of the method."""
    try:
        yield
    except RuntimeError as error:
        if "torch.utils.checkpoint is incompatible with .grad()" not in str(error):
            raise
        raise reentrant(where) from error
