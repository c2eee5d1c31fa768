"""The peer needs torchvision, which beside a torch without CUDA needs two ops declared."""

from tests.models.torchvision_ops import define

define()
