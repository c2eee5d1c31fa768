"""Targets, ready made: what to explain of detectors, segmenters, captioners, CLIP, embeddings, many labels and regressions."""

from pysal.targets.boxes import Box
from pysal.targets.columns import Contrast, Label, Output
from pysal.targets.embeddings import Norm, Similarity
from pysal.targets.pixels import Pixel
from pysal.targets.spelling import parse
from pysal.targets.words import Caption, Token

__all__ = ["Box", "Caption", "Contrast", "Label", "Norm", "Output", "Pixel", "Similarity", "Token", "parse"]
