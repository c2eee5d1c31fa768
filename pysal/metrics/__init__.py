"""Figures that say how good a map is: what each measures, its range and its failings are in docs/metrics.md."""

from pysal.metrics.agreement import agreement
from pysal.metrics.curves import Curve, deletion, insertion
from pysal.metrics.infidelity import infidelity
from pysal.metrics.localisation import mass_in_mask, pointing_game
from pysal.metrics.max_sensitivity import max_sensitivity
from pysal.metrics.randomisation import Randomisation, parameter_randomisation
from pysal.metrics.registry import METRICS, PER_IMAGE, Metric, per_image

__all__ = [
    "METRICS",
    "PER_IMAGE",
    "Curve",
    "Metric",
    "Randomisation",
    "agreement",
    "deletion",
    "infidelity",
    "insertion",
    "mass_in_mask",
    "max_sensitivity",
    "parameter_randomisation",
    "per_image",
    "pointing_game",
]
