"""Products with stored rows on the CPU, compiled by Numba: they read bytes and codes as they are stored (docs/kernels.md)."""
