"""One package under two names: `pysal`, and `pysal_saliency` beside PySAL, the spatial analysis library.

Installed from a wheel, the files lie in `pysal_saliency/` and import each other by that name (setup.py); `pysal.py` gives them
the other one wherever no folder `pysal/`, which is PySAL's, comes first. In a checkout the files lie in `pysal/`, and
`pysal_saliency.py` is what gives them the other name. Every module exists once, whatever it is called.
"""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

PACKAGE = __name__.partition(".")[0]  # the name that the files were found by


class _OtherName(MetaPathFinder, Loader):
    """Finds the modules of `name` among those of the package."""

    def __init__(self, name: str) -> None:
        self.name = name

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if not name.startswith(f"{self.name}.") or importlib.util.find_spec(self._own(name)) is None:
            return None
        return ModuleSpec(name, self)

    def exec_module(self, module: ModuleType) -> None:
        sys.modules[module.__name__] = importlib.import_module(self._own(module.__name__))

    def _own(self, name: str) -> str:
        return PACKAGE + name.removeprefix(self.name)


def also_called(name: str) -> None:
    """Let the package and all of its modules be imported by another name as well.

    Args:
        name: "pysal_saliency" for `pysal`, or the other way round.
    """
    sys.modules[name] = sys.modules[PACKAGE]
    # first, for what finds modules by their folder would load them once more
    sys.meta_path.insert(0, _OtherName(name))
