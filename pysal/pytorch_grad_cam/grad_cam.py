"""GradCAM of the peer."""

from typing import ClassVar

from pysal.methods.cam_kinds import Kind
from pysal.pytorch_grad_cam.base_cam import BaseCAM


class GradCAM(BaseCAM):
    """Grad-CAM: channels weighted by their mean gradients; see `BaseCAM`.

    Source:
        Selvaraju et al. 2016, arXiv:1610.02391.
    """

    kind: ClassVar[str | Kind | None] = "grad_cam"
