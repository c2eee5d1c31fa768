"""The layers of a model: one captured, its map read, the default one found."""
