"""Names of splits."""

import re

from tandemqa.errors import TandemError

_KNOWN = ("train", "dev", "test")


def split_in(name: str, otherwise: str) -> str:
    """The split that the name of a file or a dataset tells, such as dev for `qrels.dev.small.tsv`."""
    return next((word for word in re.split(r"[^a-z]+", name.lower()) if word in _KNOWN), otherwise)


def checked_split(name: str) -> str:
    """`name`, if it can be the name of a file `qrels/NAME.tsv`."""
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise TandemError(f"{name!r} cannot name a split; write letters and digits, such as train.")
    return name
