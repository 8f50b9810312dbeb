"""Texts that are nearly the same, found without comparing every pair."""

import math
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from itertools import islice

from tandemqa.progress import track

# Of the character 5-grams of two texts together, the share that both must have.
SIMILAR = 0.8
GRAM = 5
# Of thousands of texts made from one template, each might be nearly all the others: enough of them are compared.
MOST = 100


class _NoPunctuation(dict[int, int]):
    """A table for `str.translate` that fills itself: every punctuation mark becomes a space."""

    def __missing__(self, code: int) -> int:
        self[code] = ord(" ") if unicodedata.category(chr(code)).startswith("P") else code
        return self[code]


_NO_PUNCTUATION = _NoPunctuation()


def normalised(text: str) -> str:
    """`text` without case, punctuation, runs of whitespace and the compatibility forms of Unicode (NFKC)."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().translate(_NO_PUNCTUATION).split())


class SimilarTexts:
    """Texts in which to look for one that is nearly another: a Jaccard index of their 5-grams of 0.8 or more.

    Two such texts have one of their rarest fifth of grams in common, so only these are indexed (prefix filtering;
    Bayardo, Ma and Srikant, Scaling up all pairs similarity search, WWW 2007). None is missed among the 100 texts
    that share the rarest of them.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = texts
        self._frequency: Counter[str] = Counter()
        for text in track(texts, "count", len(texts), "text"):
            self._frequency.update(_grams(text))
        self._sizes: list[int] = []
        self._rows: defaultdict[str, list[int]] = defaultdict(list)
        for row, text in enumerate(track(texts, "index", len(texts), "text")):
            grams = _grams(text)
            self._sizes.append(len(grams))
            for gram in self._rarest(grams):
                self._rows[gram].append(row)

    def most_similar(self, text: str) -> tuple[int, float] | None:
        """The row of the text most like `text` and their Jaccard index, or None if none reaches 0.8."""
        grams = _grams(text)
        best = None
        for row in islice(self._candidates(grams), MOST):
            other = _grams(self.texts[row])
            similarity = len(grams & other) / len(grams | other)
            if similarity >= SIMILAR and (best is None or similarity > best[1]):
                best = row, similarity
        return best

    def _candidates(self, grams: set[str]) -> Iterator[int]:
        """Rows that have one of the rarest grams in common and a fitting size, those with the rarest first."""
        seen: set[int] = set()
        for gram in self._rarest(grams):
            for row in self._rows.get(gram, ()):
                if row not in seen and SIMILAR <= self._sizes[row] / len(grams) <= 1 / SIMILAR:
                    seen.add(row)
                    yield row

    def _rarest(self, grams: set[str]) -> list[str]:
        needed = math.ceil(SIMILAR * len(grams) - 1e-9)  # 0.8 of 5 is 4, whatever the rounding
        by_rarity = sorted(grams, key=lambda gram: (self._frequency[gram], gram))
        return by_rarity[: len(grams) - needed + 1]


def _grams(text: str) -> set[str]:
    return {text[start : start + GRAM] for start in range(max(1, len(text) - GRAM + 1))}
