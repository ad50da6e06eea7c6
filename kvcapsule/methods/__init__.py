"""The contract of a compression method, and what methods share."""
