"""torchvision, timm and onnx2torch are imported in these tests, whatever the machine's torch was built for."""

from tests.models.torchvision_ops import define

define()
