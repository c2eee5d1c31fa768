"""XGradCAM of the peer."""

from typing import ClassVar

from pysal.methods.cam_kinds import Kind
from pysal.pytorch_grad_cam.base_cam import BaseCAM


class XGradCAM(BaseCAM):
    """XGrad-CAM: channels weighted by the gradients where they are active; see `BaseCAM`.

    Source:
        Fu et al. 2020, arXiv:2008.02312.
    """

    kind: ClassVar[str | Kind | None] = "xgrad_cam"
