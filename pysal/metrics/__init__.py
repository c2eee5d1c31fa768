"""Figures that say how good a map is: what each measures, its range and its failings are in docs/metrics.md."""

from pysal.metrics.agreement import agreement
from pysal.metrics.average_drop import average_drop, increase_in_confidence
from pysal.metrics.curves import Curve, deletion, insertion
from pysal.metrics.grid_pointing import grid_pointing_game
from pysal.metrics.infidelity import infidelity
from pysal.metrics.localisation import mass_in_mask, pointing_game
from pysal.metrics.max_sensitivity import max_sensitivity
from pysal.metrics.pic import pic
from pysal.metrics.randomisation import Randomisation, parameter_randomisation
from pysal.metrics.registry import METRICS, PER_IMAGE, Metric, per_image
from pysal.metrics.road import Road, road

__all__ = [
    "METRICS",
    "PER_IMAGE",
    "Curve",
    "Metric",
    "Randomisation",
    "Road",
    "agreement",
    "average_drop",
    "deletion",
    "grid_pointing_game",
    "increase_in_confidence",
    "infidelity",
    "insertion",
    "mass_in_mask",
    "max_sensitivity",
    "parameter_randomisation",
    "per_image",
    "pic",
    "pointing_game",
    "road",
]
