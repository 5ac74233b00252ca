"""The recipe: what a model's files say about turning text into a vector."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from .errors import InvalidInput
from .jobs import TruncationSide

NO_PROMPT = "-"
"""Asked for instead of a prompt's name: none, whatever the model's default is."""
ROLE = "role:"
"""Before `query`, `document` and their like: the prompt that the model has for such texts."""


_SHOWN_CHARS = 100


class Pooling(StrEnum):
    """How the hidden states of a sequence become its vector."""

    CLS = "cls"
    MEAN = "mean"
    LAST = "last"
    ALL = "all"
    MAX = "max"
    MEAN_SQRT_LEN = "mean_sqrt_len"
    WEIGHTED_MEAN = "weighted_mean"


_QUERY, _DOCUMENT = "query", "document"
_ROLES = {
    "search_query": _QUERY,
    "query": _QUERY,
    "search_document": _DOCUMENT,
    "document": _DOCUMENT,
    "passage": _DOCUMENT,
    "corpus": _DOCUMENT,
}
"""What clients call the two sides of a search (OpenAI-like servers, Cohere, Voyage, sentence-transformers)."""
_NAMES = {
    _QUERY: ("query", "retrieval.query", "search_query"),
    _DOCUMENT: ("document", "passage", "corpus", "retrieval.passage", "search_document"),
}
"""What models call the prompts and adapters of the two sides: the names that sentence-transformers looks for, and more.

It never gets past `query` and `document`, though: a model without these has empty ones there."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one model makes vectors; the same for every side of the queue.

    Args:
        max_length: longest sequence in tokens, special tokens included.
        pooling: hidden states to vector, one way or several whose vectors are put side by side; ALL alone gives one
            vector for each token.
        normalize: whether the model itself scales its vectors to unit length.
        dimension: components of a full vector.
        vocab_size: token ids are below this number.
        matryoshka_dims: shorter sizes a caller may ask for; None allows any, () none.
        truncation_side: the end the model's own tokenizer cuts (RIGHT or LEFT).
        do_lower_case: texts are lower-cased first; the card's tokenizer does it by itself.
        token_dimension: components of a token's vector: of the hidden states, before what follows the pooling. 0 for
            the same as `dimension`.
        prompts: text put before each input, by the prompt's name.
        default_prompt: name of the prompt of texts that come without a choice, or "" for none.
        include_prompt: whether the prompt's tokens are pooled with the rest.
        adapters: names of the model's adapters (LoRA), one of which may be chosen for a request.
        default_adapter: the one of requests without a choice, or "" for the bare model.
        similarity: how the model's authors compare its vectors: cosine, dot, euclidean or manhattan.
        head: what follows the pooling before vectors are cut and scaled, such as `dense 768>256 tanh`; "" for nothing.
        pooling_source: where `pooling` was found, for people: "modules.json", "override", …; not part of a card.
    """

    max_length: int
    pooling: tuple[Pooling, ...]
    normalize: bool
    dimension: int
    vocab_size: int
    matryoshka_dims: tuple[int, ...] | None = ()
    truncation_side: TruncationSide = TruncationSide.RIGHT
    do_lower_case: bool = False
    token_dimension: int = 0
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str = ""
    include_prompt: bool = True
    adapters: tuple[str, ...] = ()
    default_adapter: str = ""
    similarity: str = "cosine"
    head: str = ""
    pooling_source: str = ""

    @property
    def pooling_name(self) -> str:
        """The ways of pooling in their order, such as `mean` or `cls+mean`."""
        return "+".join(self.pooling)

    @property
    def per_token(self) -> bool:
        """Whether the model is served with one vector for each token and no other."""
        return self.pooling == (Pooling.ALL,)

    def size(self, *, per_token: bool) -> int:
        """Components of a full vector, of a whole input or of a token."""
        return self.token_dimension or self.dimension if per_token else self.dimension

    def prompt_of(self, asked: str) -> str:
        """The name of the prompt that is put before texts.

        Args:
            asked: a prompt's name; "" for the model's default; NO_PROMPT; or ROLE and a role.

        Returns:
            A key of `prompts`, or "" for none.

        Raises:
            InvalidInput: the model has no such prompt; naming those it has.
        """
        if asked == "":
            return self.default_prompt
        if asked == NO_PROMPT:
            return ""
        if asked in self.prompts:
            return asked
        if not asked.startswith(ROLE):
            raise InvalidInput(self._no_such("prompt", asked, self.prompts), param="prompt_name")
        role = asked.removeprefix(ROLE)
        found = _find(role, self.prompts)
        known = role in _ROLES or role in self.adapters
        if found is None and not known and any(self.prompts.values()):
            raise InvalidInput(self._no_such("prompt", role, self.prompts), param="input_type")
        return found or ""  # as in sentence-transformers: a query without a prompt of its own gets none

    def prompt_text(self, name: str) -> str:
        """The text of a prompt, "" for the name "".

        Args:
            name: of a prompt.

        Raises:
            InvalidInput: the model has no such prompt; naming those it has.
        """
        if name and name not in self.prompts:
            raise InvalidInput(self._no_such("prompt", name, self.prompts), param="prompt_name")
        return self.prompts[name] if name else ""

    def adapter_of(self, asked: str, prompt: str = "") -> str:
        """The name of the adapter that computes a request.

        Args:
            asked: an adapter's name, or "" for no choice.
            prompt: as for `prompt_of`: of a role, the adapter for it is taken where none is chosen.

        Returns:
            One of `adapters`, or "" for the bare model.

        Raises:
            InvalidInput: the model has no such adapter; naming those it has.
        """
        if asked:
            if asked not in self.adapters:
                raise InvalidInput(self._no_such("adapter", asked, self.adapters), param="task")
            return asked
        found = _find(prompt.removeprefix(ROLE), self.adapters) if prompt.startswith(ROLE) else None
        return found or self.default_adapter

    @staticmethod
    def _no_such(what: str, asked: str, known: Iterable[str]) -> str:
        names = ", ".join(f"`{name}`" for name in known)
        return f"The model has no {what} `{asked[:_SHOWN_CHARS]}`; " + (f"it has {names}." if names else "it has none.")

    def check_dimensions(self, dimensions: int | None, model: str, *, per_token: bool = False) -> None:
        """Refuse a vector size the model does not offer; its own full size is always offered.

        Args:
            dimensions: asked for; None for the full size.
            model: its name, for the message.
            per_token: whether the vectors of tokens are meant, which are never cut.

        Raises:
            InvalidInput: naming the sizes there are.
        """
        full = self.size(per_token=per_token)
        if dimensions is None or dimensions == full:
            return
        if per_token:
            raise InvalidInput(
                f"Model '{model}' gives the vectors of tokens in full size only; dimensions must be unset or {full} "
                f"(received dimensions={dimensions}).",
                param="dimensions",
            )
        if self.matryoshka_dims == ():
            raise InvalidInput(
                f"Model '{model}' does not support Matryoshka embeddings; dimensions must be unset or "
                f"{self.dimension} (received dimensions={dimensions}).",
                param="dimensions",
            )
        if not 1 <= dimensions <= self.dimension:
            raise InvalidInput(
                f"Model '{model}' only supports dimensions in range [1, {self.dimension}], got {dimensions}.",
                param="dimensions",
            )
        if self.matryoshka_dims is not None and dimensions not in self.matryoshka_dims:
            sizes = ", ".join(map(str, self.matryoshka_dims))
            raise InvalidInput(
                f"Model '{model}' only supports Matryoshka dimensions [{sizes}], got {dimensions}.",
                param="dimensions",
            )


def _find(role: str, names: Collection[str]) -> str | None:
    """Which of a model's names stands for a role; None when none does."""
    wanted = (role, *_NAMES.get(_ROLES.get(role, ""), ()))
    return next((name for name in wanted if name in names), None)
