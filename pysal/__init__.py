"""pysal explains an image model in seven ways."""

from pysal import ops
from pysal._library import build_info, version

__version__ = version()
__all__ = ["__version__", "build_info", "ops"]
