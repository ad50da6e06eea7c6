"""The HTML page about a capsule that `kvcapsule report` writes."""
