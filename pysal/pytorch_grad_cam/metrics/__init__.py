"""How the score changes when what a map shows is removed or kept."""
