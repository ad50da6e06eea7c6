"""The image store: what was compressed of an image once, kept as bytes under a key. Needs neither torch's models nor
transformers."""
