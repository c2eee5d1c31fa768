"""Which method to trust for a model: every method and figure on its own photos, and a recommendation with its evidence."""

from pysal.comparison.experiment import compare
from pysal.comparison.found import Comparison
from pysal.comparison.statistics import Estimate, Figure, Vote

__all__ = ["Comparison", "Estimate", "Figure", "Vote", "compare"]
