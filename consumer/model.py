"""The model on its device: load, check, warm up, forward."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from embedstream.shared.cards import ModelCard
from embedstream.shared.errors import ModelLoadError
from embedstream.shared.json_files import read_object
from embedstream.shared.logs import get_logger
from embedstream.shared.models import ModelFiles, locate
from embedstream.shared.recipe import Recipe
from embedstream.shared.recipe_files import read_head, read_recipe, transformer_folder
from embedstream.shared.settings import Dtype, Settings
from embedstream.shared.tokenization import TextTokenizer, finished

from .adapters import default_of, find_adapters, with_adapters
from .backbone import first_line, load_backbone, quiet
from .device import choose_device, choose_dtype, thread_count
from .faults import Fault, fault_of
from .heads import build_head
from .padding import feels_padding, without_padding
from .pooling import pool
from .rope import follows_longest
from .token_types import check_token_types
from .tokenizer_files import read_tokenizer
from .vocabulary import check_tokenizer, with_embeddings

log = get_logger()

_WARM_UP_TOKENS = 512  # enough to touch every kernel; longer ones only cost start-up time
_TYPICAL_TOKENS = 64
_TIMED_RUNS = 2
_LONG_RUN_S = 0.1  # what takes so long is no matter of cold caches
_PART_OF_BUDGET = 4  # a full one would take seconds on a slow CPU; larger batches take longer in proportion


class Model:
    """A transformer on its device, with its card.

    `forward` and everything else on the device belongs to one thread.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        card: ModelCard,
        tokenizer: TextTokenizer,
        pad_id: int,
        files: ModelFiles,
        dtype_reason: str,
        adapted: Mapping[str, torch.nn.Module],
    ) -> None:
        self.card = card
        self.tokenizer = tokenizer
        self.files = files
        self.dtype_reason = dtype_reason
        """Why `dtype` was chosen, for people."""
        self._module = module
        self._modules = {**adapted, "": module}  # by adapter
        self.head: Callable[[Tensor], Tensor] = lambda pooled: pooled
        """What follows the pooling, in float32: (rows, ways * hidden) to (rows, dimension)."""
        self._pad_id = pad_id
        weights = next(module.parameters())
        self.device = weights.device
        self.dtype = str(weights.dtype).removeprefix("torch.")
        """Number format of weights and forward pass, such as `bfloat16`."""
        self.feels_padding = False
        """Whether only sequences of equal length are computed together."""

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
        files = locate(settings.model, settings.revision)
        recipe = read_recipe(files, settings)
        folder = transformer_folder(files.path)
        device = choose_device(settings.device)
        dtype, reason = choose_dtype(settings.dtype, device, read_object(folder / "config.json"))
        if device.type == "cpu":
            torch.set_num_threads(thread_count(settings))
        with quiet():
            adapters = find_adapters(files.path)
            module = load_backbone(folder, device, dtype)
            adapted = with_adapters(module, adapters)
            own = read_tokenizer(folder, settings.chat_template)
            tokenizer_text = finished(own.json, do_lower_case=recipe.do_lower_case)
        recipe = replace(
            with_embeddings(recipe, module),
            truncation_side=own.truncation_side,
            adapters=tuple(adapted),
            default_adapter=default_of(settings.default_task, adapters),
        )
        tokenizer = TextTokenizer(tokenizer_text, recipe)
        check_tokenizer(tokenizer, recipe, module.config)
        card = ModelCard(settings.served_names[0], recipe, tokenizer_text, files.revision, chat=own.chat)
        model = cls(module, card, tokenizer, _pad_id(module.config), files, reason, adapted)
        model.head = build_head(read_head(files, recipe), model.device)
        if follows_longest(module.config, recipe.max_length):
            model._compute_equal_lengths_alone()
        for adapter in ("", *recipe.adapters):
            model._warm_up(adapter)
        check_token_types(module, own.typed, recipe.max_length)
        log.info(
            "model.loaded",
            model=card.model,
            path=str(files.path),
            revision=card.revision,
            device=str(device),
            dtype=model.dtype,
            dtype_reason=reason,
            threads=torch.get_num_threads(),
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

    def forward(
        self, ids: NDArray[np.integer], lengths: NDArray[np.integer], adapter: str = ""
    ) -> tuple[Tensor, Tensor]:
        """Run a batch, padded on the right to its longest sequence; not padded where the model feels that.

        Args:
            ids: (total,) token ids, special tokens included, any integer type.
            lengths: (n,) tokens of each sequence, at least 1, adding up to `total`.
            adapter: one of the recipe's; "" for the bare model.

        Returns:
            The last hidden states (n, max_len, dim) in the model's dtype, and the mask (n, max_len) int64 with 1 for a
            token, both on the device. Hidden states of padding have no meaning.
        """
        run = partial(self._padded, adapter=adapter)
        with torch.inference_mode():
            return without_padding(run, ids, lengths) if self.feels_padding else run(ids, lengths)

    def _padded(self, ids: NDArray[np.integer], lengths: NDArray[np.integer], adapter: str) -> tuple[Tensor, Tensor]:
        width = int(lengths.max())
        present = np.arange(width) < lengths[:, None]
        padded = np.full(present.shape, self._pad_id, np.int64)
        padded[present] = ids  # row by row, as the ids lie
        mask = torch.from_numpy(present.astype(np.int64)).to(self.device)
        given = {"input_ids": torch.from_numpy(padded).to(self.device), "attention_mask": mask}
        output = self._modules[adapter](**given, return_dict=True)  # a model's files may ask for a bare tuple
        hidden: Tensor = output.last_hidden_state
        return hidden, mask

    def time_batches(self, budget: int, observe: Callable[[int, int, float], None]) -> None:
        """Time a short query and a part of a full batch, so that predictions are there before the first request.

        Args:
            budget: tokens of a full batch.
            observe: told cost, tokens and seconds of each; not of the part, if it is more than the memory holds.
        """
        length = min(self.recipe.max_length, _TYPICAL_TOKENS)
        row = np.resize(self.tokenizer.encode(["warm up"]).ids, length)
        for rows in (1, max(1, budget // _PART_OF_BUDGET // length)):
            ids, lengths = np.tile(row, rows), np.full(rows, length)
            try:
                seconds = self._time(ids, lengths)
            except Exception as error:
                if rows == 1 or fault_of(error) is not Fault.MEMORY:
                    raise
                # Batches of requests that are too large are halved; their times will be known then.
                log.warning("model.batch_too_large", tokens=rows * length, advice="lower --batch-tokens")
                return
            observe(rows * length, rows * length, seconds)

    def _time(self, ids: NDArray[np.integer], lengths: NDArray[np.integer]) -> float:
        for _ in range(_TIMED_RUNS):  # the last one counts: the first meets cold caches
            started_s = time.perf_counter()
            self.forward(ids, lengths, self.recipe.default_adapter)[0].sum().item()  # waits for the device
            seconds = time.perf_counter() - started_s
            if seconds > _LONG_RUN_S:
                break
        return seconds

    def _compute_equal_lengths_alone(self) -> None:
        log.warning("model.feels_padding", reason="only texts of as many tokens are computed together")
        self.feels_padding = True

    def _warm_up(self, adapter: str) -> None:
        """A short and a long sequence: checks the vectors' size, and no request pays for the first kernels."""
        of_adapter = f" with the adapter {adapter}" if adapter else ""
        row = self.tokenizer.encode(["warm up"]).ids
        long = min(self.recipe.max_length, _WARM_UP_TOKENS)
        lengths = np.array([min(len(row), long), long])
        ids = np.concatenate([row[: lengths[0]], np.resize(row, long)])
        try:
            hidden, mask = self.forward(ids, lengths, adapter)
            finite = bool(torch.isfinite(hidden[mask != 0]).all())
            short, run = ids[: lengths[0]], partial(self._padded, adapter=adapter)
            with torch.inference_mode():
                felt = not self.feels_padding and feels_padding(run, short, hidden[0, : len(short)])
        except Exception as error:  # any model code may run here
            raise ModelLoadError(f"the first forward pass{of_adapter} failed: {first_line(error)}") from error
        expected = self.recipe.size(per_token=True)
        if hidden.shape[-1] != expected:
            raise ModelLoadError(f"the model gives vectors of {hidden.shape[-1]} components, its files say {expected}")
        if not finite:
            half = "" if self.dtype == Dtype.FLOAT32 else ", or need --dtype float32"
            raise ModelLoadError(
                f"the first forward pass{of_adapter} in {self.dtype} gave values that are not numbers: the weights are "
                f"damaged{half}"
            )
        if felt:
            self._compute_equal_lengths_alone()
        with torch.inference_mode():
            if not self.recipe.per_token and not self.head(pool(self.recipe.pooling, hidden, mask)).isfinite().all():
                raise ModelLoadError(
                    f"what follows the pooling ({self.recipe.head}) gave values that are not numbers: its weights are "
                    "damaged"
                )


def _pad_id(config: Any) -> int:
    pad_id = getattr(config, "pad_token_id", None)
    return pad_id if isinstance(pad_id, int) and pad_id >= 0 else 0
