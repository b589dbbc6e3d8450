"""Label files of other projects: read without running their code, and written for FKD's training script."""
