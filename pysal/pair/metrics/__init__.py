"""PAIR's metrics: `from saliency.metrics import pic` becomes `from pysal.pair.metrics import pic`."""

from pysal.pair.metrics import pic

__all__ = ["pic"]
