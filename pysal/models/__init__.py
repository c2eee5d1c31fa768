"""Classifiers from wherever they come, and photos as tensors in [0, 1]: normalisation is the first layer of a model."""

from pysal.models.classifier import DATA, Classifier, Normalized
from pysal.models.loading import LIBRARIES, load
from pysal.models.photos import Source, example_photo, read_image, read_images
from pysal.models.wrapping import wrap

__all__ = [
    "DATA",
    "LIBRARIES",
    "Classifier",
    "Normalized",
    "Source",
    "example_photo",
    "load",
    "read_image",
    "read_images",
    "wrap",
]
