"""Names of the protocols of an evaluation (protocols.py)."""

ASK_FIRST, ASK_LATER = "ask-first", "ask-later"
PROTOCOL_NAMES = (ASK_FIRST, ASK_LATER)
"""What --protocol may be."""
