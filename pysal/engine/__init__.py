"""Runs the model: targets, chunks, ReLU rules, captured features, paths."""
