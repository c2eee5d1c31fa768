"""Deep feature factorization: the peer's own."""
