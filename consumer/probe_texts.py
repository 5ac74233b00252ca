"""Built-in texts that a model is tried with: several languages and scripts, code, oddities, and all lengths."""
# ruff: noqa: RUF001 - letters that look like others are what some of these texts are for

from __future__ import annotations

from dataclasses import dataclass

from embedstream.shared.tokenization import TextTokenizer

MOST_TOKENS = 1024
"""Of the longest one: models that read books would take minutes for it on a CPU."""

SHORT = {
    "one letter": "a",
    "word": "queue",
    "question": "What is the capital of France?",
    "sentence": "A consumer reads jobs greedily and embeds them in batches.",
    "another": "He bought two kilos of apples, three pears and a melon at the market.",
    "near to it": "At the market he bought 2 kg of apples, 3 pears, and one melon!",
    "German": "Die Straßenbahn hält größtenteils pünktlich vor dem Rathaus.",
    "French": "L'été dernier, nous avons loué une maison près de la mer.",
    "Spanish": "¿Dónde queda la estación de tren más cercana?",
    "Polish": "Zażółć gęślą jaźń, powiedział poeta o świcie.",
    "Turkish": "İstanbul'da ılık bir akşam, ışıklar yanıyor.",
    "Russian": "Быстрая коричневая лиса перепрыгнула через ленивую собаку.",
    "Greek": "Η γρήγορη αλεπού πήδηξε πάνω από τον τεμπέλη σκύλο.",
    "Chinese": "机器学习模型把文本变成向量。",
    "Japanese": "東京タワーは夜になると美しく光ります。",
    "Korean": "서울의 겨울은 춥고 눈이 자주 내립니다.",
    "Arabic": "تحول النماذج النصوص إلى متجهات.",
    "Hebrew": "הרכבת מתל אביב לירושלים יוצאת בשעה שמונה.",
    "Hindi": "मशीन लर्निंग मॉडल पाठ को सदिश में बदलते हैं।",
    "Thai": "กรุงเทพมหานครเป็นเมืองหลวงของประเทศไทย",
    "emoji": "Great news 🎉🎉 see you soon 👩\u200d👩\u200d👧 🏳️\u200d🌈",
    "code": "def add(a: int, b: int) -> int:\n\treturn a + b  # and no more",
    "JSON": '{"id": 17, "tags": ["a", "b"], "ok": true, "price": 12.50}',
    "address": "https://example.org/a/b?q=1&r=%20#top me@example.org",
    "numbers": "3.14159 2,718 -42 1e-9 007 ½ ² Ⅷ",
    "spaces": "  two  leading, a tab\there,  and a line\n\nbreak at the end  \n",
    "marks": "[CLS] <s> </s> [SEP] [MASK] <|endoftext|> <bos>",
    "accents": "cafe\u0301 café ﬁnancial ＡＢＣ naïve",
    "capitals": "SHOUTING IS NOT whispering",
    "a long word": "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft",
    "empty": "",
}
_FEW = (
    *("word", "question", "sentence", "another", "near to it", "German", "Russian", "Chinese", "Arabic"),
    *("emoji", "code", "numbers", "marks", "empty"),
)
_PASSAGE = (
    "Vectors of texts let a machine find what is meant instead of what is written. A passage about the care of roses "
    "in winter lies close to one about protecting shrubs from frost, though hardly a word is the same; a price list "
    "lies far from both. To find the neighbours of a question, it is turned into a vector by the same model that "
    "embedded the passages, and the nearest ones are looked up in an index. "
)


@dataclass(frozen=True, slots=True)
class ProbeText:
    """A text and what to call it in a report."""

    name: str
    text: str


def few_texts() -> dict[str, str]:
    """So few of the texts that a model of any size embeds them in a moment: name -> text."""
    return {name: SHORT[name] for name in _FEW} | {
        "half a passage": _PASSAGE[: len(_PASSAGE) // 2],
        "a passage": _PASSAGE,
    }


def built_in(tokenizer: TextTokenizer, max_length: int) -> list[ProbeText]:
    """The texts for a model: short ones, some of its lengths, and one that is longer than it reads.

    Args:
        tokenizer: the model's.
        max_length: tokens it reads; of those that read more than `MOST_TOKENS`, that many are tried, and no cut.
    """
    most = min(max_length, MOST_TOKENS)
    n_passage = max(1, int(tokenizer.encode([_PASSAGE]).lengths[0]) - tokenizer.n_special)
    texts = [ProbeText(name, text) for name, text in SHORT.items()]
    for part in (8, 4, 2):
        size = len(_PASSAGE) * (most // part) // n_passage
        texts.append(ProbeText(f"about {most // part} tokens", _repeated(size)))
    over = len(_PASSAGE) * most // n_passage
    name = "too long" if most == max_length else f"about {most} tokens"
    return [*texts, ProbeText(name, _repeated(over * 3 // 2 if most == max_length else over))]


def _repeated(size: int) -> str:
    """So many characters of the passage again and again, at least one."""
    return (_PASSAGE * (size // len(_PASSAGE) + 1))[: max(1, size)]
