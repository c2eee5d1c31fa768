"""Plots of the numbers around maps: drops and interactions of segments, convergence, deletion and insertion, agreement.

Each plot is a function from numbers to a figure, in the style of `viz`: its page, its font, its colours, neither pyplot nor
the user's settings. `Explanation.plot(kind=...)` finds the numbers.
"""

from pysal.plots.agreement import agreement
from pysal.plots.axes import LOOKS, RANDOM
from pysal.plots.convergence import Convergence, converge, convergence
from pysal.plots.curves import Side, curves
from pysal.plots.drops import MOST_BARS, drops
from pysal.plots.interactions import MOST_PAIRS, interactions

__all__ = [
    "LOOKS",
    "MOST_BARS",
    "MOST_PAIRS",
    "RANDOM",
    "Convergence",
    "Side",
    "agreement",
    "converge",
    "convergence",
    "curves",
    "drops",
    "interactions",
]
