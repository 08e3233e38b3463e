"""Blocks of pairs of vectors: what losses and metrics both stand on."""
