"""Evaluation: capsules and policies against the full cache, on the same questions, in one run."""
