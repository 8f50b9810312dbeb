"""How messages name a text and count things."""

# Characters of a text that a message quotes.
QUOTED = 60


def quoted(text: str) -> str:
    """The beginning of a text, in quotes and on one line."""
    text = " ".join(text.split())
    return repr(text if len(text) <= QUOTED else f"{text[: QUOTED - 1]}…")


def counted(number: int, noun: str) -> str:
    """A number and what it counts: "1 passage", "2,000 passages"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
