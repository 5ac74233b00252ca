"""One request and its answer: sent over the session of its model, and read as its jobs are done."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing

import numpy as np

from embedstream.shared.errors import Overloaded, ResultTimeout
from embedstream.shared.keys import Keys
from embedstream.shared.results import ROW_TRUNCATED, ResultPart

from .admission import ASSUMED_DIMENSION, Undelivered, result_bytes
from .assemble import assemble, check_revision
from .failures import raise_for_rows
from .merging import Merger
from .notices import Notices
from .ordered import ON_LOOP_BYTES, in_order
from .pending import PendingRequest
from .request import EmbeddedSlice, Embeddings, Prepared, cut_into_jobs
from .sessions import Sessions


class Exchange:
    """Sends prepared requests and gives what comes of them, as a whole or piece by piece.

    Args:
        keys: tells the keys of the model that is served now.
        sessions: where requests are sent.
        undelivered: bounds what is asked for and not yet read.
        notices: calls off what nobody waits for any more.
    """

    def __init__(
        self, keys: Callable[[], Awaitable[Keys]], sessions: Sessions, undelivered: Undelivered, notices: Notices
    ) -> None:
        self._keys = keys
        self._sessions = sessions
        self._undelivered = undelivered
        self._notices = notices

    async def whole(self, prepared: Prepared, deadline_s: float) -> Embeddings:
        """All of the answer.

        Args:
            prepared: the request.
            deadline_s: when nobody waits any more, on the event loop's clock.

        Raises:
            EmbedstreamError: the first reason why there is none.
        """
        async with aclosing(self.in_order(prepared, deadline_s)) as pieces:
            slices = [piece async for piece in pieces]
        if sum(piece.vectors.nbytes for piece in slices) > ON_LOOP_BYTES:
            return await asyncio.to_thread(assemble, slices)
        return assemble(slices)

    def in_order(self, prepared: Prepared, deadline_s: float) -> AsyncGenerator[EmbeddedSlice, None]:
        """The answer piece by piece, in the order of the inputs. Arguments and errors are those of `whole`."""
        return in_order(self._parts(prepared, deadline_s), Merger.of(prepared))

    async def as_they_come(self, prepared: Prepared, deadline_s: float) -> AsyncGenerator[EmbeddedSlice, None]:
        """The answer piece by piece, as jobs are done; in order, where an input may be made of several jobs.

        Arguments and errors are those of `whole`.
        """
        if not prepared.plan.is_plain:
            async with aclosing(self.in_order(prepared, deadline_s)) as slices:
                async for piece in slices:
                    yield piece
            return
        async with aclosing(self._parts(prepared, deadline_s)) as parts:
            async for part in parts:
                lost = part.rows["flags"] & ROW_TRUNCATED != 0
                if prepared.tokens.cut is not None:
                    lost |= prepared.tokens.cut[part.first_row : part.first_row + part.n_rows]
                yield EmbeddedSlice(
                    part.first_row, part.vectors, part.rows["tokens"], int(np.count_nonzero(lost)), part.timing
                )

    async def _parts(self, prepared: Prepared, deadline_s: float) -> AsyncGenerator[ResultPart, None]:
        """Send a request and give its parts as its jobs are done; what is not wanted any more is called off."""
        plan, dimension = prepared.plan, prepared.dimension or ASSUMED_DIMENSION
        if plan.n_rows == 0:  # every input was refused
            return
        keys = await self._keys()
        session = self._sessions.of(keys)
        now = asyncio.get_running_loop().time()
        if deadline_s <= now:
            raise ResultTimeout("The request's time was over before it could be sent.")
        request_id = os.urandom(16)
        jobs = cut_into_jobs(prepared, request_id, max(1, int((deadline_s - now) * 1000)))
        request = PendingRequest(request_id, jobs, now, deadline_s)
        expected = result_bytes(plan.travelling, plan.n_rows, prepared.least_tokens, dimension)
        with self._undelivered.expecting(expected), request.held:
            session.replies.requests[request_id] = request
            try:
                session.writer.send(request, request.jobs)
                revision = b""
                async with aclosing(request.parts()) as parts:
                    async for part in parts:
                        raise_for_rows(part, partial=prepared.options.partial)
                        revision = revision or part.fingerprint
                        check_revision(part, revision)
                        yield part
            finally:
                del session.replies.requests[request_id]
                if request.outstanding() and not isinstance(request.error, Overloaded):
                    self._notices.abandon(keys, request_id)
                request.fail(ResultTimeout("Nobody waits for it any more."))  # what has not been sent yet stays here
