"""A function cut at layers: what runs through them, and what the function makes of other values there."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from pysal._checks import refuse
from pysal.engine.running.states import Hooks, restoring

Values = tuple[Tensor, ...]


class Cut:
    """A function of tensors and some of the layers it runs.

    Args:
        where: the public name, for errors.
        function: the function.
        layers: modules that it runs. Of one that runs several times in a pass, the last run is read and every run replaced.
        at_input: what goes into the layers is meant, not what comes out.
    """

    def __init__(self, where: str, function: Callable[..., Any], layers: Sequence[nn.Module], *, at_input: bool) -> None:
        self.where, self.function, self.layers, self.at_input = where, function, layers, at_input

    @restoring
    def values(self, *args: Any) -> list[Values]:
        """Return copies of the tensors at each layer in `function(*args)`.

        Raises:
            AssertionError: a layer does not run, or not with tensors.
            IndexError: a layer gets nothing by position.
        """
        found: dict[int, Values] = {}
        hooks = Hooks()
        for number, layer in enumerate(self.layers):

            def read(_module: nn.Module, inputs: Any, output: Any = None, number: int = number) -> None:
                value = inputs if self.at_input else output
                several = value if isinstance(value, (tuple, list)) else (value,)
                for one in several:
                    if not isinstance(one, Tensor):
                        refuse(self.where, "layer", "be of tensors", type(one).__name__, AssertionError)
                if not several:
                    refuse(
                        self.where, "layer", "be given tensors by position", f"none for {type(_module).__name__}", IndexError
                    )
                found[number] = tuple(one.clone() for one in several)

            hooks.add(layer, read, before=self.at_input)
        self.function(*args)
        for number, layer in enumerate(self.layers):
            if number not in found:
                refuse(self.where, "layer", "run in the forward function", f"no run of {type(layer).__name__}", AssertionError)
        return [found[number] for number in range(len(self.layers))]

    @restoring
    def behind(self, values: Sequence[Values], *args: Any) -> Any:
        """Return `function(*args)` with other tensors at the layers."""
        hooks = Hooks()
        for given, layer in zip(values, self.layers, strict=True):

            def put(_module: nn.Module, inputs: Any, output: Any = None, given: Values = given) -> Any:
                value = inputs if self.at_input else output
                if not isinstance(value, (tuple, list)):
                    return given[0]
                return type(value)(*given) if hasattr(value, "_fields") else type(value)(given)

            hooks.add(layer, put, before=self.at_input)
        return self.function(*args)
