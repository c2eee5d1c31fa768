"""Integrals of gradients along paths."""
