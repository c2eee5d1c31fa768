"""Features left out of whole batches, of inputs of every rank and dtype."""
