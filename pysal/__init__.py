"""pysal explains an image model in seven ways.

Names are imported on first use, so that `import pysal` and `pysal --help` do not wait for torch.
"""

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from pysal._interrupts import import_whole

if TYPE_CHECKING:
    from pysal import (
        annotations,
        audit,
        captum,
        comparison,
        gradio,
        metrics,
        models,
        ops,
        pair,
        plots,
        pytorch_grad_cam,
        segments,
        targets,
        viz,
    )
    from pysal.engine.model.black_box import numpy_model
    from pysal.engine.model.not_applicable import NotApplicable
    from pysal.engine.prepared.model import PreparedModel
    from pysal.engine.prepared.prepare import load_prepared, prepare
    from pysal.engine.request.extra_inputs import PerImage, Shared
    from pysal.engine.request.target import Margin, RowTarget
    from pysal.engine.running.chunks import Cancelled, progress
    from pysal.explain import explain
    from pysal.explanation import Explanation, MethodResult
    from pysal.methods.attention_maps import gradient_attention, legrad
    from pysal.methods.blur_integrated_gradients import blur_integrated_gradients
    from pysal.methods.grad_cam import grad_cam, guided_grad_cam
    from pysal.methods.gradient import class_gradients, gradient
    from pysal.methods.guided_backprop import guided_backprop
    from pysal.methods.guided_integrated_gradients import guided_integrated_gradients
    from pysal.methods.integrated_gradients import integrated_gradients
    from pysal.methods.interactions import Interactions, interactions
    from pysal.methods.leave_one_out import leave_one_out
    from pysal.methods.rise import rise
    from pysal.methods.shapley import shapley
    from pysal.methods.smooth_grad import smooth_grad
    from pysal.methods.xrai import xrai
    from pysal.models import Normalized, read_image, read_images
    from pysal.ops import build_info
    from pysal.segments import Grid, Slic, Window

    __version__: str

# module, from this package on
_HOMES = {
    "Cancelled": ".engine.running.chunks",
    "Explanation": ".explanation",
    "Grid": ".segments",
    "Interactions": ".methods.interactions",
    "Margin": ".engine.request.target",
    "MethodResult": ".explanation",
    "Normalized": ".models",
    "NotApplicable": ".engine.model.not_applicable",
    "RowTarget": ".engine.request.target",
    "Shared": ".engine.request.extra_inputs",
    "Slic": ".segments",
    "Window": ".segments",
    "blur_integrated_gradients": ".methods.blur_integrated_gradients",
    "PerImage": ".engine.request.extra_inputs",
    "PreparedModel": ".engine.prepared.model",
    "build_info": ".ops",
    "class_gradients": ".methods.gradient",
    "legrad": ".methods.attention_maps",
    "load_prepared": ".engine.prepared.prepare",
    "prepare": ".engine.prepared.prepare",
    "explain": ".explain",
    "grad_cam": ".methods.grad_cam",
    "gradient": ".methods.gradient",
    "gradient_attention": ".methods.attention_maps",
    "guided_backprop": ".methods.guided_backprop",
    "guided_grad_cam": ".methods.grad_cam",
    "guided_integrated_gradients": ".methods.guided_integrated_gradients",
    "interactions": ".methods.interactions",
    "integrated_gradients": ".methods.integrated_gradients",
    "leave_one_out": ".methods.leave_one_out",
    "numpy_model": ".engine.model.black_box",
    "progress": ".engine.running.chunks",
    "read_image": ".models",
    "read_images": ".models",
    "rise": ".methods.rise",
    "shapley": ".methods.shapley",
    "smooth_grad": ".methods.smooth_grad",
    "xrai": ".methods.xrai",
}
_MODULES = (
    "annotations",
    "audit",
    "captum",
    "comparison",
    "gradio",
    "metrics",
    "models",
    "ops",
    "pair",
    "plots",
    "pytorch_grad_cam",
    "segments",
    "targets",
    "viz",
)

__all__ = [
    "Cancelled",
    "Explanation",
    "Grid",
    "Interactions",
    "Margin",
    "MethodResult",
    "Normalized",
    "NotApplicable",
    "PerImage",
    "PreparedModel",
    "RowTarget",
    "Shared",
    "Slic",
    "Window",
    "__version__",
    "annotations",
    "audit",
    "blur_integrated_gradients",
    "build_info",
    "captum",
    "class_gradients",
    "comparison",
    "explain",
    "grad_cam",
    "gradient",
    "gradient_attention",
    "gradio",
    "guided_backprop",
    "guided_grad_cam",
    "guided_integrated_gradients",
    "integrated_gradients",
    "interactions",
    "leave_one_out",
    "legrad",
    "load_prepared",
    "metrics",
    "models",
    "numpy_model",
    "ops",
    "pair",
    "plots",
    "prepare",
    "progress",
    "pytorch_grad_cam",
    "read_image",
    "read_images",
    "rise",
    "segments",
    "shapley",
    "smooth_grad",
    "targets",
    "viz",
    "xrai",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(import_whole(__name__ + _HOMES[name]), name)
    elif name in _MODULES:
        return import_whole(f"{__name__}.{name}")
    elif name == "__version__":
        value = import_whole(f"{__name__}._library").version()
    else:
        raise AttributeError(f"module 'pysal' has no attribute {name!r}")
    globals()[name] = value
    return value


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and name in _HOMES and value.__name__ == __name__ + _HOMES[name]:
            value = getattr(value, name)  # importing the module pysal.explain must not hide the function pysal.explain
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
