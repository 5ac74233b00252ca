"""Token types (segments): which part of an input each token is of. Jobs carry none, and most models do without."""

from __future__ import annotations

import inspect

import torch

from embedstream.shared.errors import ModelLoadError

from .encoders.encoder import NOISE


def check_token_types(module: torch.nn.Module, typed: tuple[list[int], list[int]] | None, max_length: int) -> None:
    """Refuse a model whose hidden states hang on the types that its tokenizer gives to the tokens of a text.

    Without types BERT takes zeros, which its tokenizer gives as well. XLNet tells its last token apart by one, and
    GPT-2 adds the embedding of the token of that number.

    Args:
        module: transformers' own, which has computed something before.
        typed: token ids of a text and their types; None where its tokenizer gives none.
        max_length: most tokens that the model reads: of a longer text the last ones are tried.

    Raises:
        ModelLoadError: naming the types.
    """
    if typed is None or "token_type_ids" not in inspect.signature(module.forward).parameters:
        return
    ids, types = torch.tensor(typed, device=next(module.parameters()).device)[:, None, -max_length:]
    mask = torch.ones_like(ids)
    with torch.inference_mode():
        plain, told = (
            module(input_ids=ids, attention_mask=mask, return_dict=True, **given).last_hidden_state
            for given in ({}, {"token_type_ids": types})
        )
    if (plain - told).abs().max() > NOISE[plain.dtype] * plain.abs().max():
        kinds = ", ".join(map(str, sorted(set(typed[1]))))
        raise ModelLoadError(
            f"{type(module).__name__} computes other vectors with the token types of its tokenizer ({kinds}), which "
            "are not supported; use sentence-transformers"
        )
