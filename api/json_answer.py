"""An answer as JSON, made slice by slice: of a whole result at once, or of one that is on its way."""

from __future__ import annotations

from collections.abc import AsyncGenerator

import orjson

from embedstream.producer import EmbeddedSlice

from .context import Context
from .finite import failed_inputs, failure
from .layout import Envelope, Layout
from .responses import Form, json_items
from .turns import Turns


class JsonAnswer:
    """The JSON of one answer, in pieces that follow one another: `opening`, those of all slices in order, `closing`.

    Args:
        envelope: the fields beside `data`; its tokens are not looked at, the slices tell them.
        form: `float` or `base64`.
        context: of the request; gets the number of failed inputs.
        turns: of all answers that are being made.
        partial: whether inputs that fail leave the others their vectors.
    """

    media_type = "application/json"

    def __init__(self, envelope: Envelope, form: Form, context: Context, turns: Turns, *, partial: bool) -> None:
        self._envelope = envelope
        self._form = form
        self._context = context
        self._turns = turns
        self._partial = partial
        self._tokens = 0
        self._n_failed = 0

    def n_bytes(self, layout: Layout) -> None:
        """Nobody knows before it is made: numbers have as many digits as they need."""
        del layout

    @property
    def opening(self) -> bytes:
        """What stands before the items."""
        envelope = self._envelope
        head = {"id": envelope.id, "object": "list", "created": envelope.created, "model": envelope.model}
        return orjson.dumps(head)[:-1] + b',"data":['

    async def pieces(self, piece: EmbeddedSlice, layout: Layout) -> AsyncGenerator[bytes, None]:
        """The items of a slice; other requests get their turn while they are made.

        Args:
            piece: the next one.
            layout: tells its number format.

        Raises:
            JobFailed: one of its vectors cannot be used, unless `partial`.
        """
        failures: dict[int, Exception] = {index: failed.error() for index, failed in piece.failures.items()}
        tokens = piece.tokens.copy()
        for place in await failed_inputs(piece.vectors, layout.dtype, tokens if self._form.per_token else None):
            error = failure(piece.first + place)
            if not self._partial:
                raise error
            failures[piece.first + place], tokens[place] = error, 0
        self._count(self._form.usage(tokens), len(failures))
        items = json_items(piece, self._form, failures)
        comma = b"," if piece.first else b""
        while True:
            async with self._turns:
                made = next(items, None)
            if made is None:
                return
            yield comma + made
            comma = b""

    def _count(self, tokens: int, n_failed: int) -> None:
        self._tokens += tokens
        self._n_failed += n_failed
        if n_failed:
            self._context.note(failed_inputs=self._n_failed)

    def closing(self) -> bytes:
        """What stands behind the items of all slices."""
        usage = {
            "prompt_tokens": self._tokens,
            "total_tokens": self._tokens,
            "completion_tokens": 0,
            "prompt_tokens_details": None,
            "completion_tokens_details": None,
        }
        return b'],"usage":' + orjson.dumps(usage) + b"}"
