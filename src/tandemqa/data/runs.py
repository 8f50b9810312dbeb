"""Runs: the rankings a retriever or a re-ranker gives for a set of queries, and TREC's file format for them.

trec_eval orders a ranking by score, highest first, compared as float32, and equal scores by passage id,
highest first in Unicode code point order; it never reads the rank. A `Run` is already in order and metrics
trust that order: whoever builds one and wants trec_eval's figures calls `break_ties`.
"""

from array import array
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tandemqa.data.lines import check_trec_names, fault, fields, read_lines
from tandemqa.errors import TandemError
from tandemqa.files import whole_file
from tandemqa.wording import counted

_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True, eq=False)
class Run:
    """One ranking a query, for Q queries, at most k deep.

    rows: int32 (Q, k), rows into `Passages`, best first, none twice, -1 from where the ranking ends;
    scores: float32 (Q, k), finite and not increasing along a ranking, -inf where the row is -1.
    """

    query_ids: list[str]
    rows: NDArray[np.int32]
    scores: NDArray[np.float32]

    def cut(self, k: int) -> "Run":
        """The first k of every ranking."""
        return Run(self.query_ids, self.rows[:, :k], self.scores[:, :k])


def break_ties(run: Run, ids: Sequence[str]) -> Run:
    """Order every ranking as trec_eval would: by score, and equal scores by passage id, both highest first.

    ids: the passage id of every row. Only ties within the run can be put right: which of several equal
    passages stand at its lower end was settled by whoever cut it.
    """
    present = np.unique(run.rows)
    present = present[present >= 0]
    names = [ids[row] for row in present.tolist()]
    by_id = sorted(range(len(names)), key=names.__getitem__, reverse=True)
    place_by_id = np.empty(len(present), dtype=np.int64)
    place_by_id[by_id] = np.arange(len(present))
    ended = run.rows < 0
    place = np.zeros(run.rows.shape, dtype=np.int64)
    place[~ended] = place_by_id[np.searchsorted(present, run.rows[~ended])]
    order = np.lexsort((place, -run.scores, ended), axis=-1)
    return Run(
        run.query_ids,
        np.take_along_axis(run.rows, order, axis=-1),
        np.take_along_axis(run.scores, order, axis=-1),
    )


def write_trec(run: Run, path: Path, passage_ids: Sequence[str], tag: str) -> None:
    """Write a TREC run file: a line `query Q0 passage rank score tag` a ranked passage, ranks from 1.

    A score that does not fall below the one before it, as in a tie, is lowered to the next float32 below
    that, so sorting by score always gives the ranking back. A query without a passage has no line.

    Raises `TandemError` for an id or a tag that is empty or holds whitespace, and for a score not finite.
    """
    ranked = run.rows >= 0
    if not np.isfinite(run.scores[ranked]).all():
        query = run.query_ids[int(np.argwhere(ranked & ~np.isfinite(run.scores))[0, 0])]
        what = f"query {query!r} has a score that is not finite; rank it again."
        raise TandemError(f"{path} was not written: {what}")
    ids = (passage_ids[row] for row in np.unique(run.rows[ranked]))
    check_trec_names((tag, *run.query_ids, *ids), f"{path} was not written")
    scores = _strictly_falling(run.scores)
    with whole_file(path) as partial, partial.open("w", encoding="utf-8", newline="\n") as file:
        for number, query in enumerate(run.query_ids):
            for place in np.flatnonzero(ranked[number]):
                passage = passage_ids[run.rows[number, place]]
                file.write(f"{query} Q0 {passage} {place + 1} {scores[number, place]!s} {tag}\n")


def read_trec(path: Path, row: Mapping[str, int]) -> Run:
    """Read a TREC run file over the passages in `row` (passage id -> row, from 0 up), in trec_eval's order.

    Queries come in the order of their first line; k is the longest ranking. What is wrong is a `TandemError`.
    `any_passage()` takes a run over passages that are not known beforehand.
    """
    place: dict[str, int] = {}
    # Columns, for as dictionaries of strings a large run takes ten times the memory.
    query, passage, score, line = array("i"), array("i"), array("f"), array("q")
    for number, _, text in read_lines(path):
        columns = fields(text)
        if len(columns) != 6:
            what = f"{counted(len(columns), 'column')}; write six: query, Q0, passage, rank, score, tag."
            raise fault(path, number, what)
        try:
            passage.append(row[columns[2]])
        except KeyError as error:
            what = f"passage {columns[2]!r} is not in the corpus; use the corpus the run was made on."
            raise fault(path, number, what) from error
        query.append(place.setdefault(columns[0], len(place)))
        score.append(_score(path, number, columns[4]))
        line.append(number)
    if not place:
        raise TandemError(f"{path} has no rows; it must be a TREC run file with at least one line.")

    queries, passages = np.asarray(query), np.asarray(passage)
    order = np.lexsort((passages, queries))
    twice = order[1:][(np.diff(queries[order]) == 0) & (np.diff(passages[order]) == 0)]
    ids = list(row)
    if len(twice):
        first = int(twice.min())
        what = f"passage {ids[passage[first]]!r} stands twice for query {list(place)[query[first]]!r}"
        raise fault(path, line[first], f"{what}; keep one of the lines.")
    lengths = np.bincount(queries)
    shape = len(place), int(lengths.max())
    rows = np.full(shape, -1, dtype=np.int32)
    scores = np.full(shape, -np.inf, dtype=np.float32)
    filled = np.arange(shape[1]) < lengths[:, None]
    rows[filled] = passages[order]
    scores[filled] = np.asarray(score)[order]
    return break_ties(Run(list(place), rows, scores), ids)


def any_passage() -> dict[str, int]:
    """Rows for `read_trec` that a file itself gives out: each new passage id gets the next one."""
    row: defaultdict[str, int] = defaultdict()
    row.default_factory = row.__len__
    return row


def _score(path: Path, number: int, text: str) -> float:
    try:
        score = float(text)
    except ValueError:
        score = float("nan")
    if not abs(score) <= _LARGEST:
        raise fault(path, number, f"score {text!r} is not a finite number; write one like 12.5.")
    return float(np.float32(score))  # as trec_eval, to which scores that differ by less are equal


def _strictly_falling(scores: NDArray[np.float32]) -> NDArray[np.float32]:
    falling = scores.astype(np.float32)
    for place in range(1, scores.shape[1]):
        below = np.nextafter(falling[:, place - 1], np.float32(-np.inf))
        falling[:, place] = np.minimum(falling[:, place], below)
    return falling
