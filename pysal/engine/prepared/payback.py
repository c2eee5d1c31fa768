"""When preparing a model pays, for programs that are told what to explain and not how.

Preparing takes the time of some 30 gradients (`engine.prepared.gains`). Where it gains, it mostly takes half of each gradient
away or more: so what is asked for has to be twice as much, or a person waits longer than without it. One Grad-CAM of one photo
is one gradient; four path methods are hundreds.

Exporting a prepared model to ONNX Runtime is decided in the same way, of the forward passes that are asked for.
"""

from collections.abc import Callable
from typing import Generic, TypeVar

from torch import nn

Prepared = TypeVar("Prepared")

# Gradients of the model that have to be asked for.
WORTH_PREPARING = 60

# Exporting takes some tenths of a second whatever the model, and its comparison and measurement as long as so many images.
EXPORT_SECONDS, EXPORT_IMAGES = 0.6, 25
# A quarter of each forward pass is mostly what it takes away, so it pays back with four times its cost; twice that has to be
# asked for.
WORTH_EXPORTING = 8


def pays_exporting(images: int, seconds: float) -> bool:
    """Say whether exporting a model pays for so many images, of which each takes some seconds without gradients."""
    return images * seconds >= WORTH_EXPORTING * (EXPORT_SECONDS + EXPORT_IMAGES * seconds)


class OnceItPays(Generic[Prepared]):
    """A model that is prepared once as much is asked of it as makes up for that.

    Args:
        model: the model.
        prepare: prepares it.
    """

    def __init__(self, model: nn.Module, prepare: Callable[[], Prepared]) -> None:
        self._model, self._prepare = model, prepare
        self._prepared: Prepared | None = None
        self._asked = 0.0

    def for_work(self, gradients: float) -> nn.Module | Prepared:
        """Return what further work runs on.

        Args:
            gradients: the work, in gradients of the model; it is added to that of earlier calls.
        """
        self._asked += gradients
        if self._prepared is None and self._asked >= WORTH_PREPARING:
            self._prepared = self._prepare()
        return self._prepared or self._model
