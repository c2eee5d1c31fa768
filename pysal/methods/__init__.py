"""The seven methods."""
