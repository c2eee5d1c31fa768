"""LayerCAM of the peer."""

from typing import ClassVar

from pysal.methods.cam_kinds import Kind
from pysal.pytorch_grad_cam.base_cam import BaseCAM


class LayerCAM(BaseCAM):
    """LayerCAM: positive gradient times activation; see `BaseCAM`.

    Source:
        Jiang et al. 2021, IEEE TIP 30.
    """

    kind: ClassVar[str | Kind | None] = "layer_cam"
