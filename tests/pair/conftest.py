"""What is compared with PAIR needs it."""

from importlib.util import find_spec

# Where the peer is not installed, as on a machine that is lent for its GPU, the other tests still run.
collect_ignore_glob = ["test_*.py"] if find_spec("saliency") is None else []
