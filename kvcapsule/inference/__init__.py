"""Compressed inference inside transformers: the cache, the attention hook, attach and generate."""
