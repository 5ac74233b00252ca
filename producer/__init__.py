"""The producer library: text in, vectors out, straight through the queue, without torch or model files."""

from embedstream.shared.errors import (
    EmbedstreamError,
    InputTooLong,
    InvalidInput,
    JobFailed,
    NotServed,
    Overloaded,
    ResultNotFound,
    ResultTimeout,
    ServerNotFound,
    StaleCard,
    Unavailable,
)
from embedstream.shared.lanes import Lane
from embedstream.shared.options import VectorType

from .client import Producer
from .request import EmbeddedSlice, Embeddings, Options, Prepared
from .sync import SyncProducer

__all__ = [
    "EmbeddedSlice",
    "Embeddings",
    "EmbedstreamError",
    "InputTooLong",
    "InvalidInput",
    "JobFailed",
    "Lane",
    "NotServed",
    "Options",
    "Overloaded",
    "Prepared",
    "Producer",
    "ResultNotFound",
    "ResultTimeout",
    "ServerNotFound",
    "StaleCard",
    "SyncProducer",
    "Unavailable",
    "VectorType",
]
