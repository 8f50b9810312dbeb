"""Text for a terminal: passages that cannot steer it, and answers with what answers in bold."""

import textwrap
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from tandemqa.search.searcher import Answer, Hit

# Lines of a passage that are shown.
SHOWN_LINES = 5
# Columns that a line has room for, however narrow the terminal says it is.
NARROWEST = 40
# Stand before and after the answer while lines are broken; no printable text has them.
_BEGIN, _END = "\x02", "\x03"


def printable(text: str) -> str:
    """`text` without what would steer the terminal, as long as it was."""
    return "".join(character if character.isprintable() else " " for character in text)


def answer_text(answer: "Answer", width: int) -> str:
    """The hits for a terminal `width` columns wide, each with the sentence that answers best in bold."""
    width = max(width, NARROWEST)
    blocks = [] if answer.found else [_nothing_found(answer)]
    for hit in answer:
        score = f"{hit.score:8.2f}"
        room = width - 4
        title = textwrap.shorten(printable(hit.title.strip() or hit.id), room - len(score), placeholder=" …")
        source = f"[{printable(hit.id)}, {hit.retriever_rank} of the candidates at {hit.retriever_score:.3f}]"
        lines = [*_passage(hit, room), source]
        blocks.append(
            "\n".join([f"{hit.rank:2}  {title:{room - len(score)}}{score}", *(f"    {line}" for line in lines)])
        )
    spent = ", ".join(f"{stage} {seconds * 1000:.0f} ms" for stage, seconds in answer.seconds.items())
    return "\n\n".join([*blocks, spent])


def _nothing_found(answer: "Answer") -> str:
    if not answer.hits:
        return (
            "No passage was found: none fulfils the conditions, or none shares a word with the question (mode bm25)."
        )
    return f"No good answer found (confidence {answer.confidence:.2f}); the nearest passages:"


def _passage(hit: "Hit", width: int) -> list[str]:
    """The lines of a passage from its start, or from its answer if that lies too far down."""
    text = printable(hit.text)
    start, end = hit.answer_start, hit.answer_end
    marked = f"{text[:start]}{_BEGIN}{text[start:end]}{_END}{text[end:]}" if end > start else text
    lines = textwrap.wrap(marked, width)
    first = next((number for number, line in enumerate(lines) if _BEGIN in line), 0)
    last = next((number for number, line in enumerate(lines) if _END in line), 0)
    if last >= SHOWN_LINES:
        cut = "… " + " ".join(lines[first:])
        lines = textwrap.wrap(cut, width)
    if len(lines) > SHOWN_LINES:
        lines = textwrap.wrap(" ".join(lines), width, max_lines=SHOWN_LINES, placeholder=" …")
    return _in_bold(lines)


def _in_bold(lines: list[str]) -> list[str]:
    """The lines with what stands between the marks in bold, line by line."""
    shown, inside = [], False
    for line in lines:
        before, began, rest = line.partition(_BEGIN)
        if not inside and not began:
            shown.append(line)
            continue
        if inside:
            before, rest = "", line
        answer, ended, after = rest.partition(_END)
        inside = not ended
        shown.append(before + typer.style(answer, bold=True) + after)
    return shown
