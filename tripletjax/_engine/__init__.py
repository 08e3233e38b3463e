"""Sums and gradients of blockwise losses."""
