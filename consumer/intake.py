"""Intake: from a raw stream entry to rows that can be computed, or to the reason why not."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from embedstream.shared import jobs
from embedstream.shared.cards import ModelCard
from embedstream.shared.chunks import piece_counts, piece_lengths, travelling
from embedstream.shared.errors import InvalidInput, MalformedJob
from embedstream.shared.input_checks import resolve_truncation
from embedstream.shared.jobs import Job, LongInputs, TruncationSide
from embedstream.shared.keys import FIELD_BODY, FIELD_HEADER, FIELD_REPLY
from embedstream.shared.left_out import NOT_IN_PIECES, check_side, is_left_out
from embedstream.shared.logs import frames_of, get_logger
from embedstream.shared.results import ResultPart, Status, failed
from embedstream.shared.tokenization import TextTokenizer, Tokens, cut, offsets

from .entries import Entry, Pieces, RawEntry

log = get_logger()


@dataclass(frozen=True, slots=True)
class Refused:
    """An entry that will not be computed.

    Args:
        raw: the stream entry.
        reason: for people.
        reply_to: the caller's reply stream, or "" when nobody can be told.
        answer: what the caller is told, or None when the entry does not say who asked.
        dead_letter: whether the entry is kept as a dead letter: it is no job at all, or it kills consumers.
    """

    raw: RawEntry
    reason: str
    reply_to: str = ""
    answer: ResultPart | None = None
    result_ttl_s: int = 0
    dead_letter: bool = False


class Intake:
    """Checks jobs against the model this consumer serves.

    Args:
        card: of the model.
        tokenizer: made of the card, for jobs that carry text.
        reply_prefix: how keys of reply streams begin; nothing is written elsewhere.
    """

    def __init__(self, card: ModelCard, tokenizer: TextTokenizer, reply_prefix: str) -> None:
        self._model = card.model
        self._recipe = card.recipe
        self._fingerprint = card.fingerprint
        self._tokenizer = tokenizer
        self._reply_prefix = reply_prefix
        self._left_out: dict[tuple[str, bool], int] = {}

    async def accept(self, raw: RawEntry, now_ms: float) -> Entry | Refused:
        """Look into an entry.

        Args:
            raw: as read.
            now_ms: the time on Redis's clock.
        """
        header = raw.fields.get(FIELD_HEADER, b"")
        reply_to = raw.fields.get(FIELD_REPLY, b"").decode(errors="replace")
        if reply_to and not reply_to.startswith(self._reply_prefix):
            return Refused(raw, f"the reply stream {reply_to[:80]!r} is outside {self._reply_prefix}", dead_letter=True)
        try:
            job = jobs.decode(header, raw.fields.get(FIELD_BODY, b""))
        except MalformedJob as error:
            return self._malformed(raw, header, reply_to, str(error))
        if now_ms > raw.enqueued_ms + job.ttl_ms:
            return self._refuse(raw, job, reply_to, Status.EXPIRED, f"The job waited longer than its {job.ttl_ms} ms.")
        if job.texts is None and job.fingerprint != self._fingerprint:
            return self._refuse(
                raw,
                job,
                reply_to,
                Status.STALE_CARD,
                f"The token ids were made for revision {job.fingerprint.hex()} of `{self._model}`; "
                f"{self._fingerprint.hex()} is served. Fetch the model card again and tokenise anew.",
            )
        reason = self._not_served(job)
        if reason is not None:
            return self._refuse(raw, job, reply_to, Status.NOT_SERVED, reason)
        try:
            options = job.options
            self._recipe.check_dimensions(options.dimensions, self._model, per_token=options.per_token)
            return await self._rows(raw, job, reply_to)
        except InvalidInput as error:
            return self._refuse(raw, job, reply_to, Status.INVALID_INPUT, str(error))
        except (asyncio.CancelledError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # noqa: BLE001 - a panic of the tokenizer is no `Exception`
            log.error("intake.failed", entry=raw.entry_id.decode(), error=type(error).__name__, frames=frames_of(error))
            return self._refuse(
                raw, job, reply_to, Status.FAILED, f"The job could not be prepared: {type(error).__name__}."
            )

    def give_up(self, raw: RawEntry, reason: str) -> Refused:
        """What a job's sender is told when it will not be computed, and is kept as a dead letter."""
        header = raw.fields.get(FIELD_HEADER, b"")
        reply_to = raw.fields.get(FIELD_REPLY, b"").decode(errors="replace")
        try:
            job = jobs.decode(header, raw.fields.get(FIELD_BODY, b""))
        except MalformedJob:
            return self._malformed(raw, header, reply_to, reason)
        refused = self._refuse(raw, job, reply_to, Status.FAILED, reason)
        return replace(refused, dead_letter=True)

    def _not_served(self, job: Job) -> str | None:
        if self._recipe.per_token and not job.options.per_token:
            return f"The model `{self._model}` is served with pooling `all`: one vector for each token."
        return None

    async def _rows(self, raw: RawEntry, job: Job, reply_to: str) -> Entry:
        recipe, limit = self._recipe, self._limit(job)
        asked = "" if job.texts is None else job.prompt_name
        name = job.prompt_name if job.texts is None else recipe.prompt_of(asked)
        prompt, adapter = recipe.prompt_text(name), recipe.adapter_of(job.adapter, asked)
        skip = self._skip(job, name, prompt)
        unreadable: dict[int, InvalidInput] = {}
        if job.texts is not None:
            tokens, unreadable = await asyncio.to_thread(self._tokenize, job, job.texts, prompt, limit)
        else:
            ids = np.empty(0, np.uint32) if job.ids is None else job.ids
            most = int(job.lengths.max()) if limit is None else limit
            tokens = cut(ids, job.lengths, most, job.truncation_side, recipe.truncation_side)
        too_long = tokens.lengths > recipe.max_length
        if too_long.any() and job.long_inputs is LongInputs.CHUNK and not skip:
            entry = self._in_pieces(raw, job, reply_to, tokens)
            too_long = np.zeros(len(entry.rows), np.bool_)
        else:
            entry = Entry(raw, job, reply_to, tokens, np.zeros_like(too_long) if tokens.cut is None else tokens.cut)
        entry.adapter, entry.skip = adapter, skip
        for place, reason in unreadable.items():
            entry.fail(np.flatnonzero(entry.places() == place), Status.INVALID_INPUT, str(reason))
        self._fail_rows(entry, too_long)
        return entry

    def _skip(self, job: Job, name: str, prompt: str) -> int:
        """How many leading tokens of each input are those of a prompt that the model leaves out of the vector."""
        if not is_left_out(self._recipe, prompt, per_token=job.options.per_token):
            return 0
        if job.long_inputs is LongInputs.TRUNCATE:
            # Ids are cut as they are: the model's side is one of the two then.
            plain = job.texts is None and job.truncation_side is TruncationSide.MODEL
            check_side(self._recipe.truncation_side if plain else job.truncation_side)
        key = (name, job.add_special_tokens)
        if key not in self._left_out:
            self._left_out[key] = self._tokenizer.prompt_length(
                prompt, add_special_tokens=job.add_special_tokens, most=self._recipe.max_length
            )
        return self._left_out[key]

    def _tokenize(
        self, job: Job, texts: Sequence[str], prompt: str, limit: int | None
    ) -> tuple[Tokens, dict[int, InvalidInput]]:
        """The texts' tokens, and which texts have none because the tokenizer refuses them, by their place."""

        def encode(some: Sequence[str]) -> Tokens:
            return self._tokenizer.encode(
                some,
                prompt=prompt,
                add_special_tokens=job.add_special_tokens,
                truncate_to=limit,
                side=job.truncation_side,
            )

        try:
            return encode(texts), {}
        except InvalidInput:
            refused = dict(self._tokenizer.unreadable(texts, job.first_input, prompt))
            if not refused:
                raise
        return encode(["" if place in refused else text for place, text in enumerate(texts, job.first_input)]), refused

    def _limit(self, job: Job) -> int | None:
        """Most tokens of an input, what is above being cut; None cuts nothing."""
        if job.long_inputs is not LongInputs.TRUNCATE:
            return None
        keeps_specials = (
            job.texts is not None and job.add_special_tokens and job.truncation_side is TruncationSide.MODEL
        )
        return resolve_truncation(
            job.truncate_to or -1, self._recipe, self._tokenizer.n_special if keeps_specials else 0
        )

    def _in_pieces(self, raw: RawEntry, job: Job, reply_to: str, tokens: Tokens) -> Entry:
        """An entry with several rows for each long input; an input without tokens keeps one, which fails."""
        counts = np.maximum(piece_counts(tokens.lengths, self._recipe.max_length), 1)
        lengths = piece_lengths(tokens.lengths, counts, self._recipe.max_length)
        options = job.options
        normalize = self._recipe.normalize if options.normalize is None else options.normalize
        return Entry(
            raw,
            replace(job, options=travelling(options)),
            reply_to,
            Tokens(tokens.ids, lengths),
            np.zeros(len(lengths), np.bool_),
            Pieces(counts, options, normalize),
        )

    def _fail_rows(self, entry: Entry, too_long: NDArray[np.bool_]) -> None:
        """Give up single rows, so that they do not fail their neighbours."""
        most, lengths, ids = self._recipe.max_length, entry.tokens.lengths, entry.tokens.ids
        too_long = too_long & (entry.rows["status"] == Status.OK)  # a refused text stands as its prompt alone
        if too_long.any():
            longer = f"This model's maximum context length is {most} tokens, and the input is longer"
            in_pieces = entry.job.long_inputs is LongInputs.CHUNK
            message = f"{longer}, {NOT_IN_PIECES}" if in_pieces else f"{longer}."
            entry.fail(np.flatnonzero(too_long), Status.INPUT_TOO_LONG, message)
        starts = offsets(lengths)
        outside = np.zeros(len(lengths), np.bool_)
        outside[np.searchsorted(starts, np.flatnonzero(ids >= self._recipe.vocab_size), side="right") - 1] = True
        for rows, message in (
            (lengths == 0, "The decoder prompt cannot be empty."),
            (lengths <= entry.skip, f"Nothing is left of the input beside the {entry.skip} tokens of its prompt."),
            (outside, f"A token id is out of vocabulary; legal are 0 to {self._recipe.vocab_size - 1}."),
        ):
            bad = np.flatnonzero(rows & (entry.rows["status"] == Status.OK))
            if len(bad):
                entry.fail(bad, Status.INVALID_INPUT, message)

    def _refuse(self, raw: RawEntry, job: Job, reply_to: str, status: Status, reason: str) -> Refused:
        answer = failed(
            job.request_id, self._fingerprint, job.index, job.count, job.first_input, job.n_inputs, status, reason
        )
        return Refused(raw, reason, reply_to, answer, job.result_ttl_s)

    def _malformed(self, raw: RawEntry, header: bytes, reply_to: str, reason: str) -> Refused:
        sender = jobs.sender_of(header)
        if sender is None:
            return Refused(raw, reason, dead_letter=True)
        message = f"The job does not follow the wire format: {reason}"
        answer = failed(
            sender.request_id,
            self._fingerprint,
            sender.job,
            sender.n_jobs,
            sender.first_input,
            sender.n_inputs,
            Status.INVALID_INPUT,
            message,
        )
        return Refused(raw, reason, reply_to, answer, dead_letter=True)
