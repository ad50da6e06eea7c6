"""Triton kernels for attention over segments (docs/kernels.md): the results of kvcapsule.kernels.reference.

A unit is one KV head of one entry. Its rows are the query heads that share the KV head, times the queries: R = G * Q.
Shapes, beside those of kvcapsule.segments.segment: U units, P partial results (the splits of all units), R rows, S sets
of neighbouring KV heads that store their rows once.
"""
