"""Scores of answers, in 0..1: 1 is right. `scorer` chooses among the metrics, each of which is a file."""
