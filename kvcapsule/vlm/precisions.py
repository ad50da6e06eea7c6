"""Names of the precisions that a model can be loaded in."""

PRECISIONS = ("float32", "float16", "bfloat16")
"""As torch calls them."""
