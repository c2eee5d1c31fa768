"""Internal: `pysal.Explanation`, the maps and findings that `explain` returns, shown, written and read back."""

from pysal.explanation.drawing import PlotKind
from pysal.explanation.findings import RESERVED, Detail, MethodResult
from pysal.explanation.result import Explanation

__all__ = ["RESERVED", "Detail", "Explanation", "MethodResult", "PlotKind"]
