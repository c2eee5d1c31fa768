"""A validated request: images, target, score, and the passes that answer it."""
