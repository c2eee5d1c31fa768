"""pysal explains an image model in seven ways.

Names are imported on first use, so that `import pysal` and `pysal --help` do not wait for torch.
"""

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pysal import audit, captum, metrics, models, ops, pair, reference, segments, viz
    from pysal.engine.model.black_box import numpy_model
    from pysal.engine.not_applicable import NotApplicable
    from pysal.engine.prepared.model import PreparedModel, prepare
    from pysal.engine.request.extra_inputs import PerImage, Shared
    from pysal.engine.request.target import Margin, RowTarget
    from pysal.engine.running.chunks import Cancelled, progress
    from pysal.explain import explain
    from pysal.explanation import Explanation
    from pysal.methods.blur_integrated_gradients import blur_integrated_gradients
    from pysal.methods.grad_cam import grad_cam, guided_grad_cam
    from pysal.methods.gradient import class_gradients, gradient
    from pysal.methods.guided_backprop import guided_backprop
    from pysal.methods.integrated_gradients import integrated_gradients
    from pysal.methods.leave_one_out import leave_one_out
    from pysal.methods.smooth_grad import smooth_grad
    from pysal.models import Normalized, read_image, read_images
    from pysal.ops import build_info
    from pysal.segments import Grid, Slic, Window

    __version__: str

# PySAL, the library for spatial analysis, installs into a folder of the same name; its viz/ would hide our viz.py.
if _STRANGERS := [name for name in ("base.py", "explore", "lib", "model", "viz") if (Path(__file__).parent / name).exists()]:
    raise ImportError(
        f"pysal: {Path(__file__).parent} must hold pysal-saliency alone, got {', '.join(_STRANGERS)} of PySAL, the spatial "
        "analysis library: install the two in different environments (pip uninstall pysal pysal-saliency, then one of them)"
    )

_HOMES = {
    "Cancelled": "pysal.engine.running.chunks",
    "Explanation": "pysal.explanation",
    "Grid": "pysal.segments",
    "Margin": "pysal.engine.request.target",
    "Normalized": "pysal.models",
    "NotApplicable": "pysal.engine.not_applicable",
    "RowTarget": "pysal.engine.request.target",
    "Shared": "pysal.engine.request.extra_inputs",
    "Slic": "pysal.segments",
    "Window": "pysal.segments",
    "blur_integrated_gradients": "pysal.methods.blur_integrated_gradients",
    "PerImage": "pysal.engine.request.extra_inputs",
    "PreparedModel": "pysal.engine.prepared.model",
    "build_info": "pysal.ops",
    "class_gradients": "pysal.methods.gradient",
    "prepare": "pysal.engine.prepared.model",
    "explain": "pysal.explain",
    "grad_cam": "pysal.methods.grad_cam",
    "gradient": "pysal.methods.gradient",
    "guided_backprop": "pysal.methods.guided_backprop",
    "guided_grad_cam": "pysal.methods.grad_cam",
    "integrated_gradients": "pysal.methods.integrated_gradients",
    "leave_one_out": "pysal.methods.leave_one_out",
    "numpy_model": "pysal.engine.model.black_box",
    "progress": "pysal.engine.running.chunks",
    "read_image": "pysal.models",
    "read_images": "pysal.models",
    "smooth_grad": "pysal.methods.smooth_grad",
}
_MODULES = ("audit", "captum", "metrics", "models", "ops", "pair", "reference", "segments", "viz")

__all__ = [
    "Cancelled",
    "Explanation",
    "Grid",
    "Margin",
    "Normalized",
    "NotApplicable",
    "PerImage",
    "PreparedModel",
    "RowTarget",
    "Shared",
    "Slic",
    "Window",
    "__version__",
    "audit",
    "blur_integrated_gradients",
    "build_info",
    "captum",
    "class_gradients",
    "explain",
    "grad_cam",
    "gradient",
    "guided_backprop",
    "guided_grad_cam",
    "integrated_gradients",
    "leave_one_out",
    "metrics",
    "models",
    "numpy_model",
    "ops",
    "pair",
    "prepare",
    "progress",
    "read_image",
    "read_images",
    "reference",
    "segments",
    "smooth_grad",
    "viz",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
    elif name in _MODULES:
        return importlib.import_module(f"pysal.{name}")
    elif name == "__version__":
        value = importlib.import_module("pysal._library").version()
    else:
        raise AttributeError(f"module 'pysal' has no attribute {name!r}")
    globals()[name] = value
    return value


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and _HOMES.get(name) == value.__name__:
            value = getattr(value, name)  # importing the module pysal.explain must not hide the function pysal.explain
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
