"""The model on its device: load, check, warm up, forward."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from embedstream.shared.cards import ModelCard
from embedstream.shared.errors import ModelLoadError
from embedstream.shared.logs import get_logger
from embedstream.shared.models import ModelFiles
from embedstream.shared.recipe import Recipe
from embedstream.shared.settings import Dtype, Settings
from embedstream.shared.tokenization import TextTokenizer

from .backbone import first_line
from .cpu import thread_count
from .device import choose_device
from .encoders import cuda_attention
from .encoders.choice import Wanted, choose_encoder, in_streams
from .encoders.cuda_graphs import Bounds, with_graphs
from .encoders.encoder import Encoder
from .encoders.guarded import guarded
from .encoders.padded import EqualLengths, Padded
from .formats import set_float32_precision
from .heads import Head
from .loading import Source
from .measured import Measured
from .pooling import pool
from .precision import Check, Vectors, settle, vectors_of
from .probe_texts import few_texts
from .rope import follows_longest
from .token_types import check_token_types

log = get_logger()

_WARM_UP_TOKENS = 512  # enough to touch every kernel; longer ones only cost start-up time


class Model:
    """A transformer on its device, with its card.

    `forward` and everything else on the device belongs to one thread.
    """

    def __init__(
        self,
        modules: Mapping[str, torch.nn.Module],
        card: ModelCard,
        tokenizer: TextTokenizer,
        files: ModelFiles,
        measured: Measured,
        head: Head,
    ) -> None:
        self.card = card
        self.tokenizer = tokenizer
        self.files = files
        self.dtype_reason = ""
        """Why `dtype` was chosen, for people."""
        self.measured = measured
        """What was measured of this model in this number format on this device."""
        self._module = modules[""]
        self._modules = modules  # by adapter
        self._encoders: dict[str, Encoder] = {}  # by adapter
        self.head = head
        """What follows the pooling, in float32: (rows, ways * hidden) to (rows, dimension)."""
        weights = next(self._module.parameters())
        self.device = weights.device
        self.dtype = _name_of(weights.dtype)
        """Number format of weights and forward pass, such as `bfloat16`."""

    @property
    def recipe(self) -> Recipe:
        """How hidden states become vectors."""
        return self.card.recipe

    @property
    def architecture(self) -> str:
        """The class of transformers that computes it, such as `BertModel`."""
        return type(self._module).__name__

    @property
    def n_parameters(self) -> int:
        """Numbers in its weights, those shared by several layers counted once."""
        return sum(weights.numel() for weights in self._module.parameters())

    @classmethod
    def load(cls, settings: Settings) -> Model:
        """Find the model's files, read them, and run it once.

        Args:
            settings: model, revision, overrides of the recipe, dtype, device and threads.

        Raises:
            ModelLoadError: with one line that says what is wrong.
        """
        started_s = time.perf_counter()
        device = choose_device(settings.device)
        set_float32_precision(settings.float32_precision)
        if device.type == "cpu":
            torch.set_num_threads(thread_count(settings))
        source = Source(settings, device)
        check: Check[Model] = Check(
            source.check_name,
            exact=lambda: cls._exact_vectors(source),
            vectors=lambda model: vectors_of(model, alone=False),
            kept=source.measured.with_dtype,
            skipped=source.unchecked,
        )
        model, reason = settle(source.formats, check, lambda dtype: cls._started(source, dtype, settings))
        model.dtype_reason = reason
        recipe = model.recipe
        log.info(
            "model.loaded",
            model=model.card.model,
            path=str(model.files.path),
            revision=model.card.revision,
            device=str(device),
            dtype=model.dtype,
            dtype_reason=reason,
            threads=torch.get_num_threads(),
            encoder=model.encoder.name,
            dimension=recipe.dimension,
            max_length=recipe.max_length,
            pooling=recipe.pooling_name,
            pooling_source=recipe.pooling_source,
            normalize=recipe.normalize,
            adapters=recipe.adapters,
            default_adapter=recipe.default_adapter,
            load_s=round(time.perf_counter() - started_s, 3),
        )
        return model

    @classmethod
    def _read(cls, source: Source, dtype: torch.dtype) -> Model:
        """A model that cannot compute anything yet."""
        modules = source.modules(dtype)
        card = source.card
        assert card is not None  # noqa: S101 (it comes with the modules)
        tokenizer = TextTokenizer(card.tokenizer, card.recipe)
        return cls(modules, card, tokenizer, source.files, source.measured.with_dtype(_name_of(dtype)), source.head)

    @classmethod
    def _started(cls, source: Source, dtype: torch.dtype, settings: Settings) -> Model:
        model = cls._read(source, dtype)
        recipe = model.recipe
        follows = follows_longest(model._module.config, recipe.max_length)
        for adapter in ("", *recipe.adapters):
            model._choose_encoder(adapter, settings, follows_longest=follows)
            model._warm_up(adapter)
        check_token_types(model._module, source.tokenizer.typed, recipe.max_length)
        return model

    @classmethod
    def _exact_vectors(cls, source: Source) -> Vectors:
        """In float32 and with the model's own attention, each text alone: nothing of what makes it fast."""
        model = cls._read(source, torch.float32)
        adapter = model.recipe.default_adapter
        model._encoders[adapter] = Padded(model._modules[adapter])
        with _first_pass(adapter):
            return vectors_of(model, alone=True)

    @property
    def encoder(self) -> Encoder:
        """What computes requests that choose no adapter."""
        return self._encoders[self.recipe.default_adapter]

    @property
    def fills_up(self) -> bool:
        """Whether every sequence costs as much as the longest one of its batch, with one of the adapters at least."""
        return any(encoder.fills_up for encoder in self._encoders.values())

    @property
    def feels_padding(self) -> bool:
        """Whether only sequences of equal length are computed together."""
        return isinstance(self.encoder, EqualLengths)

    def forward(self, ids: NDArray[np.integer], lengths: NDArray[np.integer], adapter: str = "") -> Tensor:
        """Run a batch.

        Args:
            ids: (total,) token ids, special tokens included, any integer type.
            lengths: (n,) tokens of each sequence, at least 1, adding up to `total`.
            adapter: one of the recipe's; "" for the bare model.

        Returns:
            (total, dim) the last hidden states, sequence after sequence, in the model's dtype and on its device.
        """
        with torch.inference_mode():
            return self._encoders[adapter](ids, lengths)

    def _choose_encoder(self, adapter: str, settings: Settings, *, follows_longest: bool) -> None:
        if self.device.type == "cuda":
            cuda_attention.install()
        wanted = Wanted(self._modules[adapter], self.recipe.max_length, self.measured, settings)
        with _first_pass(adapter):
            encoder = choose_encoder(wanted, *self._probe(), follows_longest=follows_longest)
            encoder = in_streams(encoder, wanted)
        if isinstance(encoder, EqualLengths):
            log.warning("model.feels_padding", reason="only texts of as many tokens are computed together")
        bounds = Bounds(settings.graph_tokens, settings.graph_memory_bytes, self.recipe.max_length)
        encoder = with_graphs(encoder, bounds, self.device)
        self._encoders[adapter] = guarded(encoder, self._modules[adapter])

    def _probe(self) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        """Ids and lengths of a short sequence and a long one of many scripts: tokens that are alike show little."""
        row, text = (self.tokenizer.encode([part]).ids for part in ("warm up", " ".join(few_texts().values())))
        long = min(self.recipe.max_length, _WARM_UP_TOKENS)
        lengths = np.array([min(len(row), long), long])
        return np.concatenate([row[: lengths[0]], np.resize(text, long)]), lengths

    def _warm_up(self, adapter: str) -> None:
        """A short and a long sequence: checks the vectors' size, and no request pays for the first kernels."""
        ids, lengths = self._probe()
        with _first_pass(adapter):
            hidden = self.forward(ids, lengths, adapter)
            finite = bool(torch.isfinite(hidden).all())
        expected = self.recipe.size(per_token=True)
        if hidden.shape[-1] != expected:
            raise ModelLoadError(f"the model gives vectors of {hidden.shape[-1]} components, its files say {expected}")
        if not finite:
            half = "" if self.dtype == Dtype.FLOAT32 else ", or need --dtype float32"
            raise ModelLoadError(
                f"the first forward pass{_of(adapter)} in {self.dtype} gave values that are not numbers: the weights "
                f"are damaged{half}"
            )
        with torch.inference_mode():
            lengths_there = torch.from_numpy(lengths).to(self.device)
            pooled = None if self.recipe.per_token else pool(self.recipe.pooling, hidden, lengths_there)
            if pooled is not None and not self.head(pooled).isfinite().all():
                raise ModelLoadError(
                    f"what follows the pooling ({self.recipe.head}) gave values that are not numbers: its weights are "
                    "damaged"
                )


@contextmanager
def _first_pass(adapter: str) -> Iterator[None]:
    """Any model code may run within."""
    try:
        yield
    except Exception as error:
        raise ModelLoadError(f"the first forward pass{_of(adapter)} failed: {first_line(error)}") from error


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _of(adapter: str) -> str:
    return f" with the adapter {adapter}" if adapter else ""
