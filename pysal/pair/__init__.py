"""PAIR saliency's classes over pysal: NumPy in, NumPy out, images (H, W, C), around a `call_model_function`.

`import saliency.core as saliency` becomes `import pysal.pair as saliency`. Signatures and defaults are those of PAIR 0.2.1;
docs/migrating.md lists where the results differ and which are right. A call_model_function of NumPy arrays works as in PAIR.
`torch_model(model)` in its place keeps the whole computation on the model's device.
"""

import importlib
from typing import TYPE_CHECKING, Any

from pysal._spelling import close_to, did_you_mean

if TYPE_CHECKING:
    from pysal.pair.base import (
        CONVOLUTION_LAYER_VALUES,
        CONVOLUTION_OUTPUT_GRADIENTS,
        INPUT_OUTPUT_GRADIENTS,
        OUTPUT_LAYER_VALUES,
        SHAPE_ERROR_MESSAGE,
        CoreSaliency,
    )
    from pysal.pair.blur_ig import BlurIG, gaussian_blur
    from pysal.pair.grad_cam import GradCam
    from pysal.pair.gradients import GradientSaliency
    from pysal.pair.guided_ig import GuidedIG, guided_ig_impl
    from pysal.pair.integrated_gradients import IntegratedGradients
    from pysal.pair.occlusion import Occlusion
    from pysal.pair.source import TorchModel, torch_model
    from pysal.pair.visualization import VisualizeImageDiverging, VisualizeImageGrayscale
    from pysal.pair.xrai import XRAI, XRAIOutput, XRAIParameters

_HOMES = {
    "BlurIG": "blur_ig",
    "CONVOLUTION_LAYER_VALUES": "base",
    "CONVOLUTION_OUTPUT_GRADIENTS": "base",
    "CoreSaliency": "base",
    "GradCam": "grad_cam",
    "GradientSaliency": "gradients",
    "GuidedIG": "guided_ig",
    "INPUT_OUTPUT_GRADIENTS": "base",
    "IntegratedGradients": "integrated_gradients",
    "OUTPUT_LAYER_VALUES": "base",
    "Occlusion": "occlusion",
    "SHAPE_ERROR_MESSAGE": "base",
    "TorchModel": "source",
    "VisualizeImageDiverging": "visualization",
    "VisualizeImageGrayscale": "visualization",
    "XRAI": "xrai",
    "XRAIOutput": "xrai",
    "XRAIParameters": "xrai",
    "gaussian_blur": "blur_ig",
    "guided_ig_impl": "guided_ig",
    "torch_model": "source",
}
# PAIR's modules, which its programs reach by name without having imported them: `saliency.base.INPUT_OUTPUT_GRADIENTS`.
_MODULES = (
    "base",
    "blur_ig",
    "grad_cam",
    "gradients",
    "guided_ig",
    "integrated_gradients",
    "metrics",
    "occlusion",
    "visualization",
    "xrai",
)

__all__ = [
    "CONVOLUTION_LAYER_VALUES",
    "CONVOLUTION_OUTPUT_GRADIENTS",
    "INPUT_OUTPUT_GRADIENTS",
    "OUTPUT_LAYER_VALUES",
    "SHAPE_ERROR_MESSAGE",
    "XRAI",
    "BlurIG",
    "CoreSaliency",
    "GradCam",
    "GradientSaliency",
    "GuidedIG",
    "IntegratedGradients",
    "Occlusion",
    "TorchModel",
    "VisualizeImageDiverging",
    "VisualizeImageGrayscale",
    "XRAIOutput",
    "XRAIParameters",
    "gaussian_blur",
    "guided_ig_impl",
    "torch_model",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _HOMES:
        value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
    if name == "tf1":
        raise AttributeError("pysal.pair has no tf1: it explains torch models and call_model_functions, not TensorFlow graphs")
    meant = did_you_mean([repr(one) for one in close_to(name, [*__all__, *_MODULES])])
    raise AttributeError(f"module 'pysal.pair' has no attribute {name!r}{meant}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
