"""Events of a build, its progress, and files for machines."""
