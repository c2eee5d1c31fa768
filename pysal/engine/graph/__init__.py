"""The snapshot of a model: traced, folded, fused, and held against what it was made from."""
