"""What only another library has: it is that library's where that is installed, and says so in a sentence where it is not.

Below a face of a library, `pysal.captum.PATH` stands for `captum.PATH`, whatever path the library has: a finder makes a module
of that name on demand. It holds the library's own names, but for the classes that the face has, which take the place of the
library's wherever those are named.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from pysal._interrupts import import_whole
from pysal._spelling import close_to, did_you_mean


class Elsewhere(MetaPathFinder, Loader):
    """Where the names and modules of a library are that a face of it lacks.

    Args:
        face: the package that stands for the library.
        peer: the library.
        public: the library's module whose names are its public ones.
        install: what pip installs it by.
        homes: our classes: the module that each is in below the face, and the library's below the library.
    """

    def __init__(self, face: str, peer: str, public: str, install: str, homes: Mapping[str, tuple[str, str]]) -> None:
        self.face, self.peer, self.public, self.homes = face, peer, public, homes
        self._install = f"pip install {install}"

    @property
    def is_installed(self) -> bool:
        """Whether the library can be imported."""
        return sys.modules.get(self.peer) is not None or importlib.util.find_spec(self.peer) is not None

    def ours(self, name: str) -> Any:
        """Return a class of the face by its name."""
        return getattr(import_whole(f"{self.face}.{self.homes[name][0]}"), name)

    def names(self) -> list[str]:
        """Return the public names of the library, ours alone where it is not installed."""
        theirs = importlib.import_module(self.public).__all__ if self.is_installed else ()
        return sorted({*self.homes, *theirs})

    def get(self, name: str, module: str, peers: Iterable[str]) -> Any:
        """Return a name of a module of the face: ours, or else that of the first of the library's modules which has it.

        Raises:
            AttributeError: there is none, or the library is not installed.
        """
        if name in self.homes:
            return self.ours(name)
        return self.theirs(name, module, peers)

    def theirs(self, name: str, module: str, peers: Iterable[str]) -> Any:
        """Return the library's own by that name.

        Raises:
            AttributeError: there is none, or the library is not installed.
        """
        if name.startswith("__") and name != "__version__":
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        if not self.is_installed:
            raise AttributeError(self._missing(f"{module}.{name}"))
        for peer in peers:
            try:
                found = importlib.import_module(peer)
            except Exception as error:  # of what the library imports, of any kind; `hasattr` lets through no other than ours
                why = f"{peer}, whose names it hands on, must be importable, got {type(error).__name__}: {error}"
                raise AttributeError(f"{module} has no {name} of its own: {why}") from error
            if hasattr(found, name):
                return self._in_place_of(getattr(found, name))
        known = [*self.homes, *dir(importlib.import_module(self.public))]
        meant = did_you_mean([repr(one) for one in close_to(name, known)])
        raise AttributeError(f"module {module!r} has no attribute {name!r}, nor has {self.peer}{meant}")

    def falling_through(self, module: str) -> Callable[[str], Any]:
        """Return the `__getattr__` of a module of the face, which gives what the library's module of that path has."""
        peer = self.peer + module.removeprefix(self.face)
        return lambda name: self.theirs(name, module, (peer,))

    def install(self) -> None:
        """Let the library's paths be imported below the face; what is here is found before it."""
        if not any(isinstance(one, Elsewhere) and one.face == self.face for one in sys.meta_path):
            sys.meta_path.append(self)

    def _missing(self, asked: str) -> str:
        module, _, name = asked.rpartition(".")
        meant = did_you_mean([repr(one) for one in close_to(name, self.homes)])
        must = f"{self.peer}, whose names it hands on, must be installed ({self._install})"
        return f"{module} has no {name} of its own: {must}{meant}"

    def _in_place_of(self, value: Any) -> Any:
        """Return what stands here for a value of the library's: our class for its class, the face's module for its module."""
        if isinstance(value, ModuleType) and self._is_peers(value.__name__):
            return importlib.import_module(self.face + value.__name__.removeprefix(self.peer))
        if isinstance(value, type) and value.__name__ in self.homes and self._is_peers(value.__module__):
            return self.ours(value.__name__)
        return value

    def _is_peers(self, module: str) -> bool:
        return module == self.peer or module.startswith(f"{self.peer}.")

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Find a module of the face where the library has it, or has one of our classes there, and the face has none."""
        if not name.startswith(f"{self.face}.") or name.rpartition(".")[2].startswith("__"):
            return None
        if not self.is_installed:
            if not any(f"{self.face}.{home}.".startswith(f"{name}.") for _, home in self.homes.values()):
                raise ImportError(self._missing(name), name=name)
            return ModuleSpec(name, self, is_package=True)
        try:
            found = importlib.util.find_spec(self.peer + name.removeprefix(self.face))
        except ModuleNotFoundError:  # what is above it is no package
            return None
        return None if found is None else ModuleSpec(name, self, is_package=found.submodule_search_locations is not None)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Return an empty module that asks for what it lacks."""
        return _Mirror(spec.name, self)

    def exec_module(self, module: ModuleType) -> None:
        """Fill a module with the names of the library's."""
        if not self.is_installed:
            for name, (_, home) in self.homes.items():
                if module.__name__ == f"{self.face}.{home}":
                    setattr(module, name, self.ours(name))
            return
        peer = importlib.import_module(self.peer + module.__name__.removeprefix(self.face))
        for name, value in vars(peer).items():
            if not isinstance(value, ModuleType) and (not name.startswith("__") or name in ("__all__", "__doc__")):
                setattr(module, name, self._in_place_of(value))


class _Mirror(ModuleType):
    """A module with the names of one of a library's."""

    def __init__(self, name: str, elsewhere: Elsewhere) -> None:
        super().__init__(name)
        self.__dict__["__elsewhere__"] = elsewhere

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # of this module alone: the library's __path__ would load its files a second time
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        elsewhere: Elsewhere = self.__dict__["__elsewhere__"]
        if not elsewhere.is_installed:
            raise AttributeError(elsewhere._missing(f"{self.__name__}.{name}"))
        return elsewhere._in_place_of(getattr(sys.modules[elsewhere.peer + self.__name__.removeprefix(elsewhere.face)], name))
