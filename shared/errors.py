"""Every error embedstream raises on purpose.

    EmbedstreamError
    ├── InvalidInput            the caller can mend the request
    │   ├── InputTooLong        an input is longer than the model reads
    │   └── UnknownTokenId      a token id that the model does not have
    ├── ModelNotFound           no such model is served
    ├── ResultNotFound          no result is kept under this id
    ├── NotServed               the model cannot do what was asked of it
    ├── Overloaded              refused before acceptance, worth a retry later
    ├── Unavailable             no consumer, or no Redis
    │   └── UnfitServer         a Redis that is too old, or would drop jobs
    ├── ResultTimeout           accepted, but no result before the deadline
    ├── JobFailed               the consumer gave the job up
    │   └── StaleCard           the token ids were made for another revision of the model
    ├── MalformedMessage        bytes on the queue that do not follow the wire format
    │   ├── MalformedJob
    │   └── MalformedResult
    ├── ModelLoadError          a model's files are missing, damaged or not understood
    ├── Misconfigured           settings, or a file they name, cannot work
    └── ServerNotFound          no running server, or more than one, to talk to

Messages name the limit and the value met; they never hold input texts or API keys.
"""

from __future__ import annotations


class EmbedstreamError(Exception):
    """Base of all errors raised on purpose."""


class InvalidInput(EmbedstreamError):
    """The request cannot be served as it stands; `param` names the field to mend."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class InputTooLong(InvalidInput):
    """An input has more tokens than the model reads, and no truncation was asked for."""


class UnknownTokenId(InvalidInput):
    """A token id that the model has no embedding for: most likely another tokenizer's."""


class ModelNotFound(EmbedstreamError):
    """No consumer has ever announced the model; `param` names the field that asked for it."""

    def __init__(self, model: str, *, known: tuple[str, ...] = (), param: str | None = None) -> None:
        super().__init__(f"The model `{model}` does not exist.")
        self.model = model
        self.known = known
        self.param = param


class ResultNotFound(EmbedstreamError):
    """No result is kept under this id: never submitted, expired, or cancelled."""


class NotServed(EmbedstreamError):
    """The model is there, but does not offer what was asked for."""


class Overloaded(EmbedstreamError):
    """Refused before acceptance; try again after `retry_after_s` seconds."""

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Unavailable(EmbedstreamError):
    """Nothing can serve the request now; try again after `retry_after_s` seconds."""

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class UnfitServer(Unavailable):
    """The Redis server must not be used as it is set up; its operator can mend that, and the message says how."""

    def __init__(self, message: str, *, retry_after_s: float = 10.0) -> None:
        super().__init__(message, retry_after_s=retry_after_s)


class ResultTimeout(EmbedstreamError):
    """The deadline passed before the whole result came."""


class JobFailed(EmbedstreamError):
    """The consumer could not compute the result; sending it again would fail again."""


class StaleCard(JobFailed):
    """The token ids belong to a revision of the model that is no longer served."""


class MalformedMessage(EmbedstreamError):
    """Bytes that do not follow `docs/wire-format.md`."""


class MalformedJob(MalformedMessage):
    """A stream entry that is not a job."""


class MalformedResult(MalformedMessage):
    """A reply that is not a result part."""


class ModelLoadError(EmbedstreamError):
    """The model's files are missing, damaged, or say something that is not understood."""


class Misconfigured(EmbedstreamError):
    """A setting, or a file that a setting names, cannot work; starting again is no help."""


class ServerNotFound(EmbedstreamError):
    """No running server was found, or several and none was named."""
