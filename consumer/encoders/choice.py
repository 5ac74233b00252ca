"""Which encoder a model gets: the fastest one that computes what the model computes for each sequence alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch

from embedstream.consumer.measured import Measurements
from embedstream.shared.logs import get_logger
from embedstream.shared.settings import Settings

from .attention import AS_USUAL, Tuning
from .attention_tuning import heads_of, tuned
from .bert import BertEncoder
from .compiled import Compiler, compile_folder
from .encoder import Encoder, Ids, differ
from .linear import Linears
from .packed import Packed
from .padded import EqualLengths, Padded
from .streams import with_streams
from .trial import Trial

log = get_logger()


@dataclass(frozen=True, slots=True)
class Wanted:
    """What an encoder is made for.

    Args:
        module: of transformers, in evaluation mode, on its device.
        max_length: most tokens of a sequence.
        measured: where it is kept what is fastest here.
        settings: of the consumer.
    """

    module: torch.nn.Module
    max_length: int
    measured: Measurements
    settings: Settings

    @property
    def measures(self) -> bool:
        """Whether what is fastest may be found by measuring."""
        return self.settings.measure_ms > 0


Maker: TypeAlias = Callable[[Wanted], Encoder | None]
"""Makes an encoder, or nothing for a model that is not of its kind; any error rules it out as well."""


def _bert(wanted: Wanted) -> Encoder | None:
    encoder = BertEncoder.of(wanted.module, _linears(wanted))
    return None if encoder is None else _tuned(encoder, wanted)


def _linears(wanted: Wanted) -> Linears:
    return Linears(wanted.measured, wanted.settings.packed_weights_limit_bytes, measures=wanted.measures)


def _tuned(encoder: BertEncoder, wanted: Wanted) -> BertEncoder:
    """With the attention that is fastest here."""
    heads, head_dim = encoder.heads
    encoder.tuning = _attention(wanted, heads, heads, head_dim)
    return encoder


def _attention(wanted: Wanted, heads: int, key_heads: int, head_dim: int) -> Tuning:
    weights = next(wanted.module.parameters())
    if not wanted.measures:
        return AS_USUAL
    shape = {"heads": heads, "key_heads": key_heads, "head_dim": head_dim}
    return tuned(wanted.measured, weights.device, weights.dtype, **shape)


def _compiled_bert(wanted: Wanted) -> Encoder | None:
    if not wanted.settings.compile:
        return None
    compiler = Compiler(wanted.measured, compile_folder(wanted.settings))
    encoder = BertEncoder.of(wanted.module, _linears(wanted), compiles=compiler)
    if encoder is None:
        log.warning("compile.not_possible", reason="only models built like BERT are compiled")
        return None
    if compiler.used:
        encoder.name = "bert, compiled"
    return _tuned(encoder, wanted)


def _packed(wanted: Wanted) -> Encoder:
    heads = heads_of(wanted.module.config)
    tuning = AS_USUAL if heads is None else _attention(wanted, *heads)
    return Packed(wanted.module, wanted.max_length, tuning)


CANDIDATES: tuple[tuple[str, Maker], ...] = (("bert, compiled", _compiled_bert), ("bert", _bert), ("packed", _packed))
"""By name, the fastest first. Padded batches need no trial: they are the model itself."""


def in_streams(encoder: Encoder, wanted: Wanted) -> Encoder:
    """The encoder on several sequences at a time, where it can do that and is faster so.

    That of BERT alone can: transformers' modules, and what its compiler makes, keep notes of the pass they are in.

    Args:
        encoder: that was chosen.
        wanted: what for.
    """
    on_cpu = next(wanted.module.parameters()).device.type == "cpu"
    if not on_cpu or not isinstance(encoder, BertEncoder) or encoder.name != BertEncoder.plain_name:
        return encoder
    return with_streams(encoder, wanted.measured, torch.get_num_threads(), wanted.max_length, measure=wanted.measures)


def choose_encoder(
    wanted: Wanted,
    ids: Ids,
    lengths: Ids,
    *,
    follows_longest: bool,
    candidates: Sequence[tuple[str, Maker]] = CANDIDATES,
) -> Encoder:
    """Try encoders on some sequences, fastest first. One that fails, or differs, is passed over with a line in the log.

    Args:
        wanted: the model, and what is known of it.
        ids: (total,) of the sequences that are tried, which should differ in length.
        lengths: (n,) of each.
        follows_longest: whether hidden states hang on the longest sequence of the batch, whatever the trial shows.
        candidates: names and makers.
    """
    padded = Padded(wanted.module)
    if follows_longest:
        return EqualLengths(padded)
    with torch.inference_mode():
        trial = Trial(wanted.module, ids, lengths)
        for name, make in candidates:
            encoder = _that_agrees(name, make, wanted, trial)
            if encoder is not None:
                return encoder
        if differ(trial.given, padded(ids, lengths)):
            return EqualLengths(padded)
    return padded


def _that_agrees(name: str, make: Maker, wanted: Wanted, trial: Trial) -> Encoder | None:
    """An encoder, if it computes in batches what the model does for each sequence alone."""
    try:
        encoder = make(wanted)
        if encoder is None:
            return None
        difference = trial.of(encoder)
    except Exception as failed:  # noqa: BLE001 (whatever the code of a model does, another way may still work)
        reason = str(failed) or type(failed).__name__
    else:
        if difference.is_rounding(trial.given.dtype):
            return encoder
        reason = str(difference)
    log.info("encoder.fell_back", encoder=name, model=type(wanted.module).__name__, reason=reason)
    return None
