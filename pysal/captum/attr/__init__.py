"""`captum.attr` by its own path: the names of `pysal.captum`, and captum's where only captum has them."""

from typing import Any

from pysal.captum._elsewhere import CAPTUM


def __getattr__(name: str) -> Any:
    if name == "__all__":  # of `from pysal.captum.attr import *`
        return CAPTUM.names()
    return CAPTUM.get(name, __name__, ("captum.attr",))


def __dir__() -> list[str]:
    return sorted({*globals(), *CAPTUM.names()})
