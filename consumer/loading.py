"""A model's files, read once; its weights may be loaded several times, in one number format after the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from hashlib import sha256

import torch
from safetensors import SafetensorError

from embedstream.shared.cards import ModelCard
from embedstream.shared.json_files import read_object
from embedstream.shared.models import locate
from embedstream.shared.recipe_files import read_head, read_recipe, transformer_folder
from embedstream.shared.settings import Settings, flag_of
from embedstream.shared.tokenization import TextTokenizer, finished

from .adapters import default_of, find_adapters, with_adapters
from .backbone import load_backbone, quiet
from .formats import Format, formats
from .free_memory import float32_bytes, free_bytes
from .heads import Head, build_head
from .measured import Measured
from .precision import PROBES
from .tokenizer_files import ModelTokenizer, read_tokenizer
from .vocabulary import check_tokenizer, with_embeddings

_GB = 1e9
_ROOM = 1.25  # of the weights' size: what a forward pass and the reading of a file take beside them


class Source:
    """Where a model is loaded from.

    Args:
        settings: model, revision, overrides of the recipe, and dtype.
        device: that will compute; of a CPU the number of threads must be set.

    Raises:
        ModelLoadError: with one line that says what is wrong; so do `modules` and what is read with them.
    """

    def __init__(self, settings: Settings, device: torch.device) -> None:
        self._settings = settings
        self.device = device
        self.files = locate(settings.model, settings.revision)
        self._recipe = read_recipe(self.files, settings)
        self._folder = transformer_folder(self.files.path)
        threads = torch.get_num_threads() if device.type == "cpu" else 0
        self.measured = Measured.of(settings, self.files.revision, device, threads)
        self.card: ModelCard | None = None
        """Of the model, once some of its modules have been loaded."""

    @cached_property
    def formats(self) -> tuple[Format, ...]:
        """Number formats for it, the best first."""
        config = read_object(self._folder / "config.json")
        return formats(self._settings.dtype, self.device, config, self.measured)

    @cached_property
    def tokenizer(self) -> ModelTokenizer:
        """What its tokenizer files say."""
        return read_tokenizer(self._folder, self._settings.chat_template)

    @cached_property
    def head(self) -> Head:
        """What follows the pooling."""
        return build_head(read_head(self.files, self._recipe), self.device)

    def modules(self, dtype: torch.dtype) -> Mapping[str, torch.nn.Module]:
        """Its transformer by adapter, "" for the bare one, all on the same weights.

        Args:
            dtype: of the weights.
        """
        with quiet():
            adapters = find_adapters(self.files.path)
            module = load_backbone(self._folder, self.device, dtype)
            adapted = with_adapters(module, adapters)
            if self.card is None:
                self.card = self._card_of(module, tuple(adapted), default_of(self._settings.default_task, adapters))
        return {**adapted, "": module}

    def _card_of(self, module: torch.nn.Module, adapters: tuple[str, ...], default_adapter: str) -> ModelCard:
        own = self.tokenizer
        recipe = replace(
            with_embeddings(self._recipe, module),
            truncation_side=own.truncation_side,
            adapters=adapters,
            default_adapter=default_adapter,
        )
        text = finished(own.json, do_lower_case=recipe.do_lower_case)
        check_tokenizer(TextTokenizer(text, recipe), recipe, module.config)
        return ModelCard(self._settings.served_names[0], recipe, text, self.files.revision, chat=own.chat)

    @property
    def check_name(self) -> str:
        """Of a check of its vectors: another one with whatever changes them beside weights and number format."""
        recipe = self._recipe
        changes = (recipe.pooling, recipe.normalize, recipe.max_length, self._settings.default_task, PROBES)
        return f"vectors-{sha256(repr(changes).encode()).hexdigest()[:16]}"

    def unchecked(self) -> str:
        """Why its vectors in a half format are not to be compared with those in float32, or ""."""
        limit = self._settings.dtype_check_limit_bytes
        if not limit:
            return f"{flag_of('dtype_check_limit_bytes')} is 0"
        try:
            size = float32_bytes(self._folder)
        except (OSError, SafetensorError):  # loading them tells it in more words
            return ""
        if size > limit:
            return f"{size / _GB:.1f} GB in float32, {flag_of('dtype_check_limit_bytes')} is {limit}"
        for device in dict.fromkeys((torch.device("cpu"), self.device)):  # files are read by way of the host's memory
            free = free_bytes(device)
            if free is not None and size * _ROOM > free:
                return f"{size / _GB:.1f} GB in float32, {free / _GB:.1f} GB of memory free on {device.type}"
        return ""
