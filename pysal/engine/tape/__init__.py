"""A recorded pass: once forward, as often back as asked."""
