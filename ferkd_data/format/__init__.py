"""Label sets on disk: the manifest, rejects, and shards in both layouts."""
