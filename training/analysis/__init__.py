"""`kvcapsule analyze`: statistics of a model's visual keys and values on a data set, and the compression to expect,
before any training."""
