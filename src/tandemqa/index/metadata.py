"""What a passage carries besides its text, and the conditions that a search may set on it.

In `corpus.jsonl`, beside `_id`, `title` and `text`, stand further fields, at the top level or in an object `metadata`
(which has precedence). All of them are kept; a field whose value is a string, a number, true or false, or a list of
these, each of which then counts, can be searched by.
"""

import contextlib
import math
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from tandemqa.data.lines import Metadata, is_text
from tandemqa.errors import TandemError


class Execute(Protocol):
    """The rows that an SQL query finds in the database of the passages."""

    def __call__(self, query: str, /, *values: str | int | float) -> Iterator[Any]: ...


_CONDITION = re.compile(r"\s*([^<>=]*[^<>=\s])\s*(<=|>=|<|>|=)\s*([^<>=\s].*?)\s*", re.DOTALL)
_LARGEST_INTEGER = 2**63 - 1


def searchable(metadata: Metadata) -> Iterator[tuple[str, str | int | float]]:
    """(field, value) pairs that a passage can be found by; a string that reads as a number is also that number."""
    for name, value in metadata.items():
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, bool):
                yield name, "true" if one else "false"
            elif isinstance(one, int) and abs(one) > _LARGEST_INTEGER:
                yield name, str(one)
                if abs(one) <= sys.float_info.max:
                    yield name, float(one)
            elif isinstance(one, str | int | float):
                yield name, one
                if isinstance(one, str) and (number := _number(one)) is not None and math.isfinite(number):
                    yield name, number


@dataclass(frozen=True)
class Condition:
    """`field`, one of = < <= > >=, and a value, as in "year>=2001".

    A value that reads as a number is compared with the field's numbers, and its strings that read as numbers; any
    other with its strings, by code point (so that dates written as 2001-05-31 are in order). A whole number too large
    for 64 bits equals only what is written alike: it is an identifier.
    """

    field: str
    operator: str
    value: str

    @classmethod
    def parse(cls, text: str) -> "Condition":
        match = _CONDITION.fullmatch(text)
        if match is None or not is_text(text):
            raise TandemError(f"The condition {text!r} cannot be read; write it like year>=2001 or lang=en.")
        return cls(match[1], match[2], match[3])

    def mask(self, execute: Execute, size: int) -> npt.NDArray[np.bool_]:
        """Which of the rows 0 to size - 1 fulfil it, bool of shape (size,)."""
        allowed = np.zeros(size, dtype=np.bool_)
        # In SQLite every number is less than every string.
        query = f"SELECT row FROM fields WHERE field = ? AND value {self.operator} ?"
        number = _number(self.value)
        if number is None:
            queries: list[tuple[str, str | int | float]] = [(query + " AND value >= ''", self.value)]
        elif self.operator == "=":
            queries = [(query, self.value)]
            if _exact(self.value, number):
                queries.append((query + " AND value < ''", number))
        else:
            queries = [(query + " AND value < ''", number)]
        for sql, value in queries:
            rows = execute(sql, self.field, value)
            found = np.fromiter((row for (row,) in rows), dtype=np.int64)
            allowed[found[found < size]] = True
        return allowed


def mask_of(conditions: Sequence[str], execute: Execute, size: int) -> npt.NDArray[np.bool_]:
    """Which rows fulfil every condition; a field that no passage has is a `TandemError` that names those that are."""
    allowed = np.ones(size, dtype=np.bool_)
    for condition in map(Condition.parse, conditions):
        mask = condition.mask(execute, size)
        if not mask.any():
            _check_field(condition.field, execute)
        allowed &= mask
    return allowed


def field_names(execute: Execute) -> list[str]:
    """The fields that passages can be found by, in alphabetical order."""
    # From each field straight to the next one, instead of through all its rows.
    steps = execute(
        "WITH RECURSIVE step(field) AS (SELECT min(field) FROM fields UNION ALL "
        "SELECT (SELECT min(field) FROM fields WHERE field > step.field) FROM step WHERE step.field IS NOT NULL) "
        "SELECT field FROM step WHERE field IS NOT NULL"
    )
    return [field for (field,) in steps]


def _check_field(field: str, execute: Execute) -> None:
    known = field_names(execute)
    if field not in known:
        advice = f"choose one of {', '.join(known)}" if known else "no passage has any"
        raise TandemError(f"No passage has a field {field!r} to search by; {advice}.")


def _number(text: str) -> int | float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    with contextlib.suppress(ValueError):
        if abs(integer := int(text)) <= _LARGEST_INTEGER:
            return integer
    # "inf" and "nan" are words here; what is larger than any number of a field may well be infinite.
    return number if any(map(str.isdigit, text)) else None


def _exact(text: str, number: int | float) -> bool:
    """Whether a number is compared with others for being equal: not a whole one that 64 bits do not hold."""
    if isinstance(number, int):
        return True
    with contextlib.suppress(ValueError):
        int(text)
        return False
    return math.isfinite(number)
