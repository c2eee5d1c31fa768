"""Tests of what runs the model."""
