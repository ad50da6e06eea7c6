"""Segments, the form in which attention reads a KV cache, and the forms of their stored rows."""
