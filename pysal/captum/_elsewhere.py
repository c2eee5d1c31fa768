"""What only captum has: it is captum's where that is installed, and says so in a sentence where it is not.

`pysal.captum.PATH` stands for `captum.PATH`, whatever path captum has: a finder makes a module of that name on demand. It holds
captum's own names, but for the classes that this package has, which take the place of captum's wherever those are named.
"""

import importlib
import importlib.util
import sys
from collections.abc import Iterable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from pysal._interrupts import import_whole
from pysal._spelling import close_to, did_you_mean

FACE = __name__.rpartition(".")[0]
PEER = "captum"
_INSTALL = f"pip install {PEER}==0.9.0"

# Our classes: the module that each is in, and captum's below `captum.attr`.
HOMES = {
    "Attribution": ("_bases", "_utils.attribution"),
    "Deconvolution": ("guided_backprop", "_core.guided_backprop_deconvnet"),
    "DeepLift": ("deep_lift", "_core.deep_lift"),
    "DeepLiftShap": ("deep_lift", "_core.deep_lift"),
    "FeatureAblation": ("feature_ablation", "_core.feature_ablation"),
    "FeaturePermutation": ("feature_permutation", "_core.feature_permutation"),
    "GradientAttribution": ("_bases", "_utils.attribution"),
    "GradientShap": ("gradient_shap", "_core.gradient_shap"),
    "GuidedBackprop": ("guided_backprop", "_core.guided_backprop_deconvnet"),
    "GuidedGradCam": ("grad_cam", "_core.guided_grad_cam"),
    "InputBaselineXGradient": ("gradient_shap", "_core.gradient_shap"),
    "InputXGradient": ("input_x_gradient", "_core.input_x_gradient"),
    "IntegratedGradients": ("integrated_gradients", "_core.integrated_gradients"),
    "KernelShap": ("lime", "_core.kernel_shap"),
    "LayerActivation": ("layer_activation", "_core.layer.layer_activation"),
    "LayerAttribution": ("_bases", "_utils.attribution"),
    "LayerGradCam": ("grad_cam", "_core.layer.grad_cam"),
    "LayerGradientXActivation": ("layer_gradient_x_activation", "_core.layer.layer_gradient_x_activation"),
    "LayerIntegratedGradients": ("layer_integrated_gradients", "_core.layer.layer_integrated_gradients"),
    "Lime": ("lime", "_core.lime"),
    "NoiseTunnel": ("noise_tunnel", "_core.noise_tunnel"),
    "Occlusion": ("occlusion", "_core.occlusion"),
    "PerturbationAttribution": ("_bases", "_utils.attribution"),
    "Saliency": ("saliency", "_core.saliency"),
    "ShapleyValueSampling": ("shapley_value", "_core.shapley_value"),
    "ShapleyValues": ("shapley_value", "_core.shapley_value"),
}


def is_installed() -> bool:
    """Whether captum can be imported."""
    return sys.modules.get(PEER) is not None or importlib.util.find_spec(PEER) is not None


def ours(name: str) -> Any:
    """Return a class of this package by its name."""
    return getattr(import_whole(f"{FACE}.{HOMES[name][0]}"), name)


def names() -> list[str]:
    """Return the public names of `captum.attr`, ours alone where it is not installed."""
    theirs = importlib.import_module(f"{PEER}.attr").__all__ if is_installed() else ()
    return sorted({*HOMES, *theirs})


def get(name: str, face: str, peers: Iterable[str]) -> Any:
    """Return a name of a module of this package: ours, or else that of the first of captum's modules which has it.

    Raises:
        AttributeError: there is none, or captum is not installed.
    """
    if name in HOMES:
        return ours(name)
    if name.startswith("__") and name != "__version__":
        raise AttributeError(f"module {face!r} has no attribute {name!r}")
    if not is_installed():
        raise AttributeError(_missing(f"{face}.{name}"))
    for peer in peers:
        module = importlib.import_module(peer)
        if hasattr(module, name):
            return _in_place_of(getattr(module, name))
    meant = did_you_mean([repr(one) for one in close_to(name, [*HOMES, *dir(importlib.import_module(f"{PEER}.attr"))])])
    raise AttributeError(f"module {face!r} has no attribute {name!r}, nor has {PEER}{meant}")


def _missing(asked: str) -> str:
    module, _, name = asked.rpartition(".")
    meant = did_you_mean([repr(one) for one in close_to(name, HOMES)])
    return f"{module} has no {name} of its own: {PEER}, whose names it hands on, must be installed ({_INSTALL}){meant}"


def _in_place_of(value: Any) -> Any:
    """Return what stands here for a value of captum's: our class for its class, a module of this package for its module."""
    if isinstance(value, ModuleType) and _is_peers(value.__name__):
        return importlib.import_module(FACE + value.__name__.removeprefix(PEER))
    if isinstance(value, type) and value.__name__ in HOMES and _is_peers(value.__module__):
        return ours(value.__name__)
    return value


def _is_peers(module: str) -> bool:
    return module == PEER or module.startswith(f"{PEER}.")


class _Mirror(ModuleType):
    """A module with the names of one of captum's."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # of this module alone: captum's __path__ would load its files a second time
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        if not is_installed():
            raise AttributeError(_missing(f"{self.__name__}.{name}"))
        return _in_place_of(getattr(sys.modules[PEER + self.__name__.removeprefix(FACE)], name))


class _Finder(MetaPathFinder, Loader):
    """Finds `pysal.captum.PATH` where captum has such a module, or has one of our classes there, and this package has none."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if not name.startswith(f"{FACE}.") or name.rpartition(".")[2].startswith("__"):
            return None
        if not is_installed():
            below = [home for _, home in HOMES.values() if f"{FACE}.attr.{home}.".startswith(f"{name}.")]
            if not below:
                raise ImportError(_missing(name), name=name)
            return ModuleSpec(name, self, is_package=True)
        try:
            found = importlib.util.find_spec(PEER + name.removeprefix(FACE))
        except ModuleNotFoundError:  # what is above it is no package
            return None
        return None if found is None else ModuleSpec(name, self, is_package=found.submodule_search_locations is not None)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Mirror(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        if not is_installed():
            for name, (_, home) in HOMES.items():
                if module.__name__ == f"{FACE}.attr.{home}":
                    setattr(module, name, ours(name))
            return
        peer = importlib.import_module(PEER + module.__name__.removeprefix(FACE))
        for name, value in vars(peer).items():
            if not isinstance(value, ModuleType) and (not name.startswith("__") or name in ("__all__", "__doc__")):
                setattr(module, name, _in_place_of(value))


def install() -> None:
    """Let captum's paths be imported below this package; what is here is found before it."""
    if not any(isinstance(one, _Finder) for one in sys.meta_path):
        sys.meta_path.append(_Finder())
