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
from embedstream.shared.jobs import LongInputs, TruncationSide
from embedstream.shared.lanes import Lane
from embedstream.shared.options import VectorType

from .arguments import MapOptions, RequestOptions
from .client import Producer
from .deliveries import Delivery
from .failures import InputFailure
from .request import EmbeddedSlice, Embeddings, Options, Prepared
from .sync import SyncProducer

__all__ = [
    "Delivery",
    "EmbeddedSlice",
    "Embeddings",
    "EmbedstreamError",
    "InputFailure",
    "InputTooLong",
    "InvalidInput",
    "JobFailed",
    "Lane",
    "LongInputs",
    "MapOptions",
    "NotServed",
    "Options",
    "Overloaded",
    "Prepared",
    "Producer",
    "RequestOptions",
    "ResultNotFound",
    "ResultTimeout",
    "ServerNotFound",
    "StaleCard",
    "SyncProducer",
    "TruncationSide",
    "Unavailable",
    "VectorType",
]
