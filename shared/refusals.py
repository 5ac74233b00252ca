"""Models that are not served, each with what to use instead.

What a model's files name and nothing here computes is told apart by these tables when it is loaded: a vector made
without it would look just as good as a right one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_RERANKER = (
    "a reranker or classifier, which scores texts and has no vectors; use a reranker server, such as TEI's /rerank"
)
_TAGGER = "a classifier of tokens, which has no vectors; use the model that it was made from"
_SPARSE = "a sparse encoder (SPLADE); use sentence-transformers' SparseEncoder, or TEI's /embed_sparse"
_MULTI_VECTOR = "a late-interaction model (ColBERT); use sentence-transformers' MultiVectorEncoder or PyLate"
_IMAGES = "made for images too; use sentence-transformers"
_ROUTES = "several models for several kinds of texts; use sentence-transformers, or save each as a model of its own"
_OLD = "made before transformers; use sentence-transformers"
_LAYERS = "pooled over its layers; use sentence-transformers"

_MODULES = {
    **dict.fromkeys(("Router", "Asym"), _ROUTES),
    **dict.fromkeys(("BoW", "CNN", "LSTM", "WordEmbeddings", "WordWeights"), _OLD),
    "StaticEmbedding": "a table of static token vectors, which needs no GPU and no queue; use sentence-transformers",
    "WeightedLayerPooling": _LAYERS,
    "CLIPModel": _IMAGES,
    **dict.fromkeys(("MLMTransformer", "SpladePooling", "SparseAutoEncoder", "SparseStaticEmbedding"), _SPARSE),
    **dict.fromkeys(("MultiVectorMask", "TokenPooling"), _MULTI_VECTOR),
    "LogitScore": _RERANKER,
}
_FAMILIES = {
    "CrossEncoder": _RERANKER,
    "SparseEncoder": _SPARSE,
    "MultiVectorEncoder": _MULTI_VECTOR,
    "ColBERT": _MULTI_VECTOR,
}
_TASKS = {
    "sequence-classification": _RERANKER,
    "text-generation": _RERANKER,
    "any-to-any": _RERANKER,
    "fill-mask": _SPARSE,
    "retrieval": _MULTI_VECTOR,
}
_HEADS = {
    "ForSequenceClassification": _RERANKER,
    "ForMultipleChoice": _RERANKER,
    "ForTokenClassification": _TAGGER,
    "ForQuestionAnswering": _TAGGER,
    "ForRetrieval": _MULTI_VECTOR,
    "HF_ColBERT": _MULTI_VECTOR,
}
"""Ends of the names of transformers' classes."""


def of_module(path: str, config: Mapping[str, Any]) -> str:
    """What a module is that is not run, and what to use.

    Args:
        path: the class, as `modules.json` names it.
        config: the model's `config.json`, empty where there is none.
    """
    package, _, name = path.rpartition(".")
    root = package.partition(".")[0]
    if root == "sentence_transformers":
        return _MODULES.get(name, "of a kind that is not known here; use sentence-transformers")
    if root == "pylate":
        return _MULTI_VECTOR
    if "lora_adaptations" in config:
        return "the authors' own code, which is never run; use jinaai/jina-embeddings-v3-hf, the same model without it"
    return "the authors' own code, which is never run; use a version of the model that transformers runs by itself"


def of_family(model_type: str) -> str | None:
    """What a model is by sentence-transformers' own name for its kind, and what to use; None for one that is served."""
    if model_type == "SentenceTransformer":
        return None
    return _FAMILIES.get(model_type, "of a kind that is not known here; use sentence-transformers")


def of_task(task: str) -> str | None:
    """What a model is by the task that its Transformer module is loaded for; None for one that is served."""
    if task == "feature-extraction":
        return None
    return _TASKS.get(task, "of a kind that is not known here; use sentence-transformers")


def of_architecture(name: str) -> str | None:
    """What a model is by the class that its weights were saved from; None for one that may be served."""
    return next((what for end, what in _HEADS.items() if name.endswith(end)), None)
