"""Internal: the oracles: each op's formula in pure torch, which is also what runs where nothing is compiled."""
