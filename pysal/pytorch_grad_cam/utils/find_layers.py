"""Looking for layers, and putting others in their place, as the peer's users do."""

from collections.abc import Callable, Sequence

from torch import nn


def find_layer_predicate_recursive(model: nn.Module, predicate: Callable[[nn.Module], bool]) -> list[nn.Module]:
    """Return the modules inside a model of which a predicate holds, each as often as it is there, in order."""
    found = []
    for module in model._modules.values():
        if module is not None:
            found += [module] if predicate(module) else []
            found += find_layer_predicate_recursive(module, predicate)
    return found


def find_layer_types_recursive(model: nn.Module, layer_types: Sequence[type[nn.Module]]) -> list[nn.Module]:
    """Return the modules inside a model that are of one of several types, not of types derived from them."""
    return find_layer_predicate_recursive(model, lambda module: type(module) in layer_types)


def replace_layer_recursive(model: nn.Module, old_layer: nn.Module, new_layer: nn.Module) -> bool:
    """Put a layer in another's place and say whether that was found."""
    for name, module in model._modules.items():
        if module is old_layer:
            model._modules[name] = new_layer
            return True
        if module is not None and replace_layer_recursive(module, old_layer, new_layer):
            return True
    return False


def replace_all_layer_type_recursive(model: nn.Module, old_layer_type: type[nn.Module], new_layer: nn.Module) -> None:
    """Put a layer in the place of all of a type."""
    for name, module in model._modules.items():
        if isinstance(module, old_layer_type):
            model._modules[name] = new_layer
        if module is not None:
            replace_all_layer_type_recursive(module, old_layer_type, new_layer)
