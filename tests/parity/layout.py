"""Models as sentence-transformers itself writes them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import transformers

from .families import MAX_LENGTH, Family

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of its imports, none of which is ours
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import transformer as transformers_module
    from sentence_transformers.base.modules.transformer import Transformer
    from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling

__all__ = ["Dense", "Normalize", "Pooling", "pooling", "read", "write", "write_bare"]


def write(family: Family, folder: Path, *layers: torch.nn.Module, prompts: dict[str, str] | None = None) -> Path:
    """A model of a family.

    Args:
        family: that the transformer is of.
        folder: where it is made.
        layers: that follow the transformer; without any, the mean.
        prompts: of the model.

    Returns:
        The folder of it, inside `folder`.
    """
    bare, path = write_bare(family, folder), folder / "model"
    with _processor(family):
        transformer = Transformer(str(bare), max_seq_length=MAX_LENGTH)
        modules = [transformer, *(layers or [pooling(family, ("mean",))])]
        made = SentenceTransformer(modules=modules, device="cpu", prompts=prompts)
        made.save(str(path), create_model_card=False)
    return path


def write_bare(family: Family, folder: Path) -> Path:
    """The transformer and the tokenizer alone, as transformers writes them."""
    tokenizer = family.tokenizer()
    tokenizer.model_max_length = MAX_LENGTH
    bare = folder / "bare"
    family.make(tokenizer).save_pretrained(bare)
    tokenizer.save_pretrained(bare)
    return bare


def read(family: Family, path: Path) -> SentenceTransformer:
    """The model of a folder, as sentence-transformers reads it."""
    with _processor(family):
        return SentenceTransformer(str(path), device="cpu", local_files_only=True)


def pooling(family: Family, modes: Sequence[str]) -> Pooling:
    """The module that pools, by one mode or by several."""
    made: Pooling = Pooling(family.dimension, list(modes))
    return made


@contextmanager
def _processor(family: Family) -> Iterator[None]:
    """A tokenizer in place of a processor that cannot be made here; a text meets nothing else of it."""
    with pytest.MonkeyPatch.context() as patch:
        if family.only_tokenizer:
            patch.setattr(transformers_module, "AutoProcessor", transformers.AutoTokenizer)
        yield
