"""ShapleyCAM of the peer."""

from typing import ClassVar

from pysal.methods.cam_kinds import Kind
from pysal.pytorch_grad_cam.base_cam import BaseCAM


class ShapleyCAM(BaseCAM):
    """ShapleyCAM: Grad-CAM of the gradient less half the curvature times the activation; see `BaseCAM`.

    Source:
        Cai 2025, arXiv:2501.06261.
    """

    kind: ClassVar[str | Kind | None] = "shapley_cam"
