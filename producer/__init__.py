"""The producer library: text in, vectors out, straight through the queue, without torch or model files."""

from embedstream.shared.lanes import Lane
from embedstream.shared.options import VectorType

from .client import Producer
from .request import EmbeddedSlice, Embeddings, Options, Prepared
from .sync import SyncProducer

__all__ = [
    "EmbeddedSlice",
    "Embeddings",
    "Lane",
    "Options",
    "Prepared",
    "Producer",
    "SyncProducer",
    "VectorType",
]
