"""The driver of a build and its workers: processes of this machine, or actors on Ray."""
