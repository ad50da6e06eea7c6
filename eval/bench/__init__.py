"""`kvcapsule bench`: bytes and time of attention over segments, of decode steps and of serving, against the full cache
(docs/bench.md)."""
