"""A small transform code, and the tiles of a prefill."""

SIZES = {"key_rows": (8, 8), "key_channels": (6, 6), "value_rows": (16, 16), "value_channels": (5, 5)}
