"""pytorch-grad-cam's classes over pysal: change the import, keep the program.

`pytorch_grad_cam.utils.image` becomes `pysal.pytorch_grad_cam.utils.image`, and so with every module. Constructors, arguments,
defaults, shapes and dtypes are those of grad-cam 1.5.7; docs/migrating.md lists where the answers differ and who is right.
grad-cam need not be installed; the few names that are not here are its own where it is, and say so where it is not.
"""

import importlib
from typing import TYPE_CHECKING, Any

from pysal.pytorch_grad_cam._elsewhere import GRAD_CAM

if TYPE_CHECKING:
    from pysal.pytorch_grad_cam.ablation_cam import AblationCAM
    from pysal.pytorch_grad_cam.ablation_layer import AblationLayer, AblationLayerFasterRCNN, AblationLayerVit
    from pysal.pytorch_grad_cam.base_cam import BaseCAM
    from pysal.pytorch_grad_cam.eigen_cam import EigenCAM
    from pysal.pytorch_grad_cam.eigen_grad_cam import EigenGradCAM
    from pysal.pytorch_grad_cam.fem import FEM
    from pysal.pytorch_grad_cam.finer_cam import FinerCAM
    from pysal.pytorch_grad_cam.fullgrad_cam import FullGrad
    from pysal.pytorch_grad_cam.grad_cam import GradCAM
    from pysal.pytorch_grad_cam.grad_cam_elementwise import GradCAMElementWise
    from pysal.pytorch_grad_cam.grad_cam_plusplus import GradCAMPlusPlus
    from pysal.pytorch_grad_cam.guided_backprop import GuidedBackpropReLUModel
    from pysal.pytorch_grad_cam.hirescam import HiResCAM
    from pysal.pytorch_grad_cam.kpca_cam import KPCA_CAM
    from pysal.pytorch_grad_cam.layer_cam import LayerCAM
    from pysal.pytorch_grad_cam.random_cam import RandomCAM
    from pysal.pytorch_grad_cam.refine_cam import RefineCAM
    from pysal.pytorch_grad_cam.score_cam import ScoreCAM
    from pysal.pytorch_grad_cam.seg_eigen_cam import SegEigenCAM
    from pysal.pytorch_grad_cam.shapley_cam import ShapleyCAM
    from pysal.pytorch_grad_cam.xgrad_cam import XGradCAM


# Modules, which `import pytorch_grad_cam` brings along.
_MODULES = ("metrics", "utils")

__all__ = [
    "FEM",
    "KPCA_CAM",
    "AblationCAM",
    "AblationLayer",
    "AblationLayerFasterRCNN",
    "AblationLayerVit",
    "BaseCAM",
    "EigenCAM",
    "EigenGradCAM",
    "FinerCAM",
    "FullGrad",
    "GradCAM",
    "GradCAMElementWise",
    "GradCAMPlusPlus",
    "GuidedBackpropReLUModel",
    "HiResCAM",
    "LayerCAM",
    "RandomCAM",
    "RefineCAM",
    "ScoreCAM",
    "SegEigenCAM",
    "ShapleyCAM",
    "XGradCAM",
]

GRAD_CAM.install()


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    value = GRAD_CAM.get(name, __name__, (GRAD_CAM.peer,))
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
