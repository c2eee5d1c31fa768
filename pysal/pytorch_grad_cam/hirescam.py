"""HiResCAM of the peer."""

from typing import ClassVar

from pysal.methods.cam_kinds import Kind
from pysal.pytorch_grad_cam.base_cam import BaseCAM


class HiResCAM(BaseCAM):
    """HiResCAM: gradient times activation; see `BaseCAM`.

    Source:
        Draelos and Carin 2020, arXiv:2011.08891.
    """

    kind: ClassVar[str | Kind | None] = "hirescam"
