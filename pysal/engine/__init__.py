"""Internal: runs the model: targets, chunks, ReLU rules, captured features, paths."""
