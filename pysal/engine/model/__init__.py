"""What can be asked of any model: its state and modes, its rows, its classes, its ReLUs."""
