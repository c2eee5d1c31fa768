"""captum's classes over pysal: change the import, keep the program.

`from captum.attr import Saliency` becomes `from pysal.captum import Saliency`. Constructors, arguments, defaults, shapes,
dtypes and exceptions are those of captum 0.9.0. docs/migrating.md lists where the results differ and which are right.

Every path and name of captum's has its place here: `captum.attr._core.deep_lift` is `pysal.captum.attr._core.deep_lift`. What
this package has no class for is captum's own.

captum need not be installed; what is captum's own says so where it is not. If it is, these classes are also captum's
(`isinstance`): its NoiseTunnel, metrics and DataLoaderAttribution accept them, and `NoiseTunnel` of this module accepts
captum's classes.
"""

from typing import TYPE_CHECKING, Any

from pysal.captum._elsewhere import CAPTUM

if TYPE_CHECKING:
    from pysal.captum._bases import Attribution, GradientAttribution, LayerAttribution, PerturbationAttribution
    from pysal.captum.deep_lift import DeepLift, DeepLiftShap
    from pysal.captum.feature_ablation import FeatureAblation
    from pysal.captum.feature_permutation import FeaturePermutation
    from pysal.captum.grad_cam import GuidedGradCam, LayerGradCam
    from pysal.captum.gradient_shap import GradientShap, InputBaselineXGradient
    from pysal.captum.guided_backprop import Deconvolution, GuidedBackprop
    from pysal.captum.input_x_gradient import InputXGradient
    from pysal.captum.integrated_gradients import IntegratedGradients
    from pysal.captum.layer_activation import LayerActivation
    from pysal.captum.layer_gradient_x_activation import LayerGradientXActivation
    from pysal.captum.layer_integrated_gradients import LayerIntegratedGradients
    from pysal.captum.lime import KernelShap, Lime
    from pysal.captum.noise_tunnel import NoiseTunnel
    from pysal.captum.occlusion import Occlusion
    from pysal.captum.saliency import Saliency
    from pysal.captum.shapley_value import ShapleyValues, ShapleyValueSampling

__all__ = [
    "Attribution",
    "Deconvolution",
    "DeepLift",
    "DeepLiftShap",
    "FeatureAblation",
    "FeaturePermutation",
    "GradientAttribution",
    "GradientShap",
    "GuidedBackprop",
    "GuidedGradCam",
    "InputBaselineXGradient",
    "InputXGradient",
    "IntegratedGradients",
    "KernelShap",
    "LayerActivation",
    "LayerAttribution",
    "LayerGradCam",
    "LayerGradientXActivation",
    "LayerIntegratedGradients",
    "Lime",
    "NoiseTunnel",
    "Occlusion",
    "PerturbationAttribution",
    "Saliency",
    "ShapleyValueSampling",
    "ShapleyValues",
]


CAPTUM.install()


def __getattr__(name: str) -> Any:
    value = CAPTUM.get(name, __name__, ("captum.attr", "captum"))
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
