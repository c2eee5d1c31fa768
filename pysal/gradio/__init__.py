"""Explanations inside other people's Gradio apps: of a function alone by leave-one-out, of a torch model by every method."""

from pysal.gradio.piece import Piece, add_explanations, explanations

__all__ = ["Piece", "add_explanations", "explanations"]
