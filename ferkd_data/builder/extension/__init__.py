"""More crops or images for a finished label set."""
