"""captum's classes over pysal: change the import, keep the program.

`from captum.attr import Saliency` becomes `from pysal.captum import Saliency`. Constructors, arguments, defaults, shapes,
dtypes and exceptions are those of captum 0.9.0. docs/migrating.md lists where the results differ and which are right.

captum need not be installed. If it is, these classes are also captum's (`isinstance`): its NoiseTunnel, metrics and
DataLoaderAttribution accept them, and `NoiseTunnel` of this module accepts captum's classes.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pysal.captum._bases import Attribution, GradientAttribution, LayerAttribution, PerturbationAttribution
    from pysal.captum.feature_ablation import FeatureAblation
    from pysal.captum.grad_cam import GuidedGradCam, LayerGradCam
    from pysal.captum.guided_backprop import Deconvolution, GuidedBackprop
    from pysal.captum.integrated_gradients import IntegratedGradients
    from pysal.captum.noise_tunnel import NoiseTunnel
    from pysal.captum.occlusion import Occlusion
    from pysal.captum.saliency import Saliency

_HOMES = {
    "Attribution": "_bases",
    "Deconvolution": "guided_backprop",
    "FeatureAblation": "feature_ablation",
    "GradientAttribution": "_bases",
    "GuidedBackprop": "guided_backprop",
    "GuidedGradCam": "grad_cam",
    "IntegratedGradients": "integrated_gradients",
    "LayerAttribution": "_bases",
    "LayerGradCam": "grad_cam",
    "NoiseTunnel": "noise_tunnel",
    "Occlusion": "occlusion",
    "PerturbationAttribution": "_bases",
    "Saliency": "saliency",
}

__all__ = [
    "Attribution",
    "Deconvolution",
    "FeatureAblation",
    "GradientAttribution",
    "GuidedBackprop",
    "GuidedGradCam",
    "IntegratedGradients",
    "LayerAttribution",
    "LayerGradCam",
    "NoiseTunnel",
    "Occlusion",
    "PerturbationAttribution",
    "Saliency",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pysal.captum' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
