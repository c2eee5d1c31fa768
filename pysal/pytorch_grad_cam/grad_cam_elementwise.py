"""GradCAMElementWise of the peer."""

from typing import ClassVar

from pysal.methods.cam_kinds import Kind
from pysal.pytorch_grad_cam.base_cam import BaseCAM


class GradCAMElementWise(BaseCAM):
    """Grad-CAM cell by cell: what is positive of gradient times activation; see `BaseCAM`.

    Source:
        Pillai and Pirsiavash 2021.
    """

    kind: ClassVar[str | Kind | None] = "grad_cam_elementwise"
