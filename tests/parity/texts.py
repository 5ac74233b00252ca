"""The texts of the matrix, and what its tokenizers learn their vocabularies from."""

from __future__ import annotations

LEARNED_FROM = (
    "How do I renew my passport? The renewal takes three weeks, and costs 42.50 euros.",
    "A queue hands out jobs in the order in which they came; a consumer embeds them.",
    "The quick brown fox jumps over the lazy dog while nobody is looking at the passport office.",
    "Grüße aus Zürich: naïve façade, größer als gedacht. Straße, Übung, Äpfel, Öl.",
    "東京タワーは東京都港区にある。",
    "Embeddings are vectors: lists of numbers that stand for what a text means.",
    "renew renewal renewing queue queued queues embed embedding embedded embeds vector vectors",
)

_SENTENCE = (
    "how do I renew the passport queue and what does a consumer embed when three vectors stand for the numbers of "
    "texts while nobody looks at the renewal office in the order in which jobs came over the lazy brown dog"
)
WORDS = _SENTENCE.split()

TEXTS = (
    "",
    "a",
    "Queue",
    "the passport?",
    *(" ".join(WORDS[at : at + count]) for at, count in ((3, 3), (0, 5), (11, 8), (2, 12), (20, 17))),
    "  Grüße aus   Zürich,\tnaïve façade\nund Straße ",
    "東京タワー は 42.50 🙂",
    "</s> is no [SEP] <eos> here",
    " ".join(WORDS),
    " ".join(reversed(WORDS)) + " " + " ".join(WORDS),
)
"""From no token of their own to more than any model of the matrix reads."""
