"""`kvcapsule analyze`: what a model's visual keys and values are like on some data, and what compression to expect,
before any training."""
