"""From encoded images to a shard's files: what a worker does."""
