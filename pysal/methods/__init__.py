"""Internal: the methods, whose functions are in `pysal`."""
