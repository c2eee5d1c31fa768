"""SegEigenCAM of the peer."""

from typing import ClassVar

from pysal.methods.cam_kinds import Kind
from pysal.pytorch_grad_cam.base_cam import BaseCAM


class SegEigenCAM(BaseCAM):
    """The first principal component of |gradient| times activation, its largest value positive; see `BaseCAM`.

    Source:
        Chung and Ying 2025, Applied Sciences 15.
    """

    kind: ClassVar[str | Kind | None] = "seg_eigen_cam"
