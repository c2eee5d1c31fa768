"""What `pysal.prepare` returns."""
