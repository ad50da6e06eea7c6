"""Attention over segments: the reference that every faster path is tested against."""
