"""Attention over segments on the CPU, in C++ that is compiled at first use (docs/kernels.md)."""
