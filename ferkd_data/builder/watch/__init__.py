"""What a build tells: events, progress, and files for machines."""
