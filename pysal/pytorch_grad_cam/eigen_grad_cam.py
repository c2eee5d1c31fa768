"""EigenGradCAM of the peer."""

from typing import ClassVar

from pysal.methods.cam_kinds import Kind
from pysal.pytorch_grad_cam.base_cam import BaseCAM


class EigenGradCAM(BaseCAM):
    """The first principal component of gradient times activation; see `BaseCAM`.

    Source:
        After Muhammad and Yeasin 2020, arXiv:2008.00299.
    """

    kind: ClassVar[str | Kind | None] = "eigen_grad_cam"
