"""PAIR saliency's classes over pysal: NumPy in, NumPy out, images (H, W, C), around a `call_model_function`.

`import saliency.core as saliency` becomes `import pysal.pair as saliency`. Signatures and defaults are those of PAIR 0.2.1;
docs/migrating.md lists where the results differ and which are right. A call_model_function of NumPy arrays works as in PAIR.
`torch_model(model)` in its place keeps the whole computation on the model's device.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pysal.pair.base import (
        CONVOLUTION_LAYER_VALUES,
        CONVOLUTION_OUTPUT_GRADIENTS,
        INPUT_OUTPUT_GRADIENTS,
        OUTPUT_LAYER_VALUES,
        CoreSaliency,
    )
    from pysal.pair.blur_ig import BlurIG
    from pysal.pair.grad_cam import GradCam
    from pysal.pair.gradients import GradientSaliency
    from pysal.pair.integrated_gradients import IntegratedGradients
    from pysal.pair.occlusion import Occlusion
    from pysal.pair.source import TorchModel, torch_model

_HOMES = {
    "BlurIG": "blur_ig",
    "CONVOLUTION_LAYER_VALUES": "base",
    "CONVOLUTION_OUTPUT_GRADIENTS": "base",
    "CoreSaliency": "base",
    "GradCam": "grad_cam",
    "GradientSaliency": "gradients",
    "INPUT_OUTPUT_GRADIENTS": "base",
    "IntegratedGradients": "integrated_gradients",
    "OUTPUT_LAYER_VALUES": "base",
    "Occlusion": "occlusion",
    "TorchModel": "source",
    "torch_model": "source",
}

__all__ = [
    "CONVOLUTION_LAYER_VALUES",
    "CONVOLUTION_OUTPUT_GRADIENTS",
    "INPUT_OUTPUT_GRADIENTS",
    "OUTPUT_LAYER_VALUES",
    "BlurIG",
    "CoreSaliency",
    "GradCam",
    "GradientSaliency",
    "IntegratedGradients",
    "Occlusion",
    "TorchModel",
    "torch_model",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pysal.pair' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
