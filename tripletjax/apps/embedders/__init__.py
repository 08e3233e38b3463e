"""Embedders of run directories, functions and ONNX files."""

from tripletjax.apps.embedders.functions import FunctionEmbedder
from tripletjax.apps.embedders.onnx_files import OnnxEmbedder
from tripletjax.apps.embedders.sources import embedder_of, open_embedder, vectors_of

__all__ = [
    "FunctionEmbedder",
    "OnnxEmbedder",
    "embedder_of",
    "open_embedder",
    "vectors_of",
]
