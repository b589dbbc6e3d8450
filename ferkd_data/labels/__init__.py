"""Labels in memory: the rows of a shard, difficulty buckets, the ensemble, statistics, and the rules that rows keep."""
