"""Publishing and exchanging label sets: verify, publish, pull, merge, convert."""
