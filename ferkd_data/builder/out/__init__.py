"""OUT while a build works on it: its state, its locks, its end."""
