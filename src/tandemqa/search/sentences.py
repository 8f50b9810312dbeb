"""A passage cut into sentences, each with its place in the text."""

from collections.abc import Iterator

import sentencex

# A "sentence" beyond this many characters is a list, a table or a script without full stops: it is cut at spaces.
LONGEST = 400


def sentences(text: str) -> Iterator[tuple[int, int]]:
    """Where each sentence of `text` begins and ends, in characters, without the whitespace around it.

    Rules by `sentencex`, those for English and for the full stops of all scripts. A text of whitespace has none.
    """
    for boundary in sentencex.get_sentence_boundaries("en", text):
        yield from _pieces(text, boundary["start_index"], boundary["end_index"])


def _pieces(text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    """The span without whitespace at its ends, in as many pieces as its length asks for."""
    while start < end and text[start].isspace():
        start += 1
    while start < end and text[end - 1].isspace():
        end -= 1
    while end - start > LONGEST:
        cut = text.rfind(" ", start + 1, start + LONGEST)
        cut = start + LONGEST if cut < 0 else cut
        yield start, start + len(text[start:cut].rstrip())
        start = cut
        while text[start].isspace():
            start += 1
    if start < end:
        yield start, end
