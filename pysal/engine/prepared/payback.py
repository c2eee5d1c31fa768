"""When preparing a model pays, for programs that are told what to explain and not how.

Preparing takes the time of some 30 gradients (`engine.prepared.gains`). Where it gains, it mostly takes half of each gradient
away or more: so what is asked for has to be twice as much, or a person waits longer than without it. One Grad-CAM of one photo
is one gradient; four path methods are hundreds.
"""

from collections.abc import Callable

from torch import nn

from pysal.engine.prepared.model import PreparedModel

# Gradients of the model that have to be asked for.
WORTH_PREPARING = 60


class OnceItPays:
    """A model that is prepared once as much is asked of it as makes up for that.

    Args:
        model: the model.
        prepare: prepares it.
    """

    def __init__(self, model: nn.Module, prepare: Callable[[], PreparedModel]) -> None:
        self._model, self._prepare = model, prepare
        self._prepared: PreparedModel | None = None
        self._asked = 0.0

    def for_work(self, gradients: float) -> nn.Module | PreparedModel:
        """Return what further work runs on.

        Args:
            gradients: the work, in gradients of the model; it is added to that of earlier calls.
        """
        self._asked += gradients
        if self._prepared is None and self._asked >= WORTH_PREPARING:
            self._prepared = self._prepare()
        return self._prepared or self._model
