"""The peer needs torchvision, which beside a torch without CUDA needs two ops declared."""

from importlib.util import find_spec

from tests.models.torchvision_ops import define

if find_spec("pytorch_grad_cam") is not None:
    define()
# Where the peer is not installed, as on a machine that is lent for its GPU, the other tests still run.
collect_ignore_glob = ["test_*.py"] if find_spec("pytorch_grad_cam") is None else []
