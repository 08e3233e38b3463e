"""Networks from images to embeddings, their layers, heads and weights."""
