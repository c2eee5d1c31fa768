"""Leave-one-out's own inference: only what a changed box reaches is computed."""
