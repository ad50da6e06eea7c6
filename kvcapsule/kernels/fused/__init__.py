"""Attention over segments by Triton kernels (docs/kernels.md): the same results as kvcapsule.kernels.reference, without its temporaries.

Rows of a unit (an entry's KV head) are the query heads that share it, times the queries: R = G * Q. Shapes, beside those of
kvcapsule.segments.segment: U units, P partial results (a unit's splits), R rows.
"""
