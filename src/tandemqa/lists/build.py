"""From candidates to training lists: one positive first, then its hard negatives."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from tandemqa.data.dataset import Qrels
from tandemqa.data.runs import Run
from tandemqa.data.tokens import TokenIds
from tandemqa.errors import TandemError
from tandemqa.files import whole_file

NO_PASSAGE = -1


class ListsConfig(BaseModel):
    """How training lists are drawn from the candidates."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: int = Field(8, ge=2, description="Passages in a list: one positive and size - 1 negatives.")
    depth: int = Field(50, ge=1, description="Negatives are drawn at random from this many top candidates.")
    per_query: int = Field(
        1, ge=1, description="Lists made for each question and positive, with different negatives."
    )


@dataclass(frozen=True)
class TrainingLists:
    """Lists of passage rows. `query_rows` int32 (L,) into the queries; `passages` int32 (L, n), the positive in
    column 0, NO_PASSAGE where a list is short."""

    query_rows: npt.NDArray[np.int32]
    passages: npt.NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.query_rows)

    def save(self, path: Path) -> None:
        with whole_file(path) as partial, partial.open("wb") as file:
            np.savez(file, query_rows=self.query_rows, passages=self.passages)

    @classmethod
    def load(cls, path: Path) -> "TrainingLists":
        with np.load(path, allow_pickle=False) as arrays:
            return cls(arrays["query_rows"], arrays["passages"])


def undenoised_lists(
    candidates: Run,
    qrels: Qrels,
    passage_row: dict[str, int],
    same_text: npt.NDArray[np.int64],
    config: ListsConfig,
    seed: int,
) -> TrainingLists:
    """Lists whose negatives are random picks from the candidates (RocketQAv2, section 3.3, "undenoised").

    Every positive of a question heads `per_query` lists. No labelled positive of the question, and no passage that
    reads the same as one (`same_text` equal, see `text_groups`), is ever a negative; no text stands twice in a list.
    A list is shorter than `size` where there are fewer negatives, and left out where there is none.
    `query_rows` refer to `candidates.query_ids`.
    """
    generator = np.random.default_rng(seed)
    query_rows: list[int] = []
    lists: list[npt.NDArray[np.int32]] = []
    for query_row, query_id in enumerate(candidates.query_ids):
        positives = [passage_row[pid] for pid, grade in qrels[query_id].items() if grade > 0]
        ranked = candidates.rows[query_row, : config.depth]
        pool = _distinct_texts(ranked[ranked != NO_PASSAGE], positives, same_text)
        if not len(pool):
            continue  # a list of one passage teaches nothing
        for positive in positives:
            for _ in range(config.per_query):
                count = min(config.size - 1, len(pool))
                negatives = generator.choice(pool, size=count, replace=False)
                row = np.full(config.size, NO_PASSAGE, dtype=np.int32)
                row[0], row[1 : 1 + count] = positive, negatives
                query_rows.append(query_row)
                lists.append(row)
    if not lists:
        raise TandemError(
            "No training list could be made: no question has both a positive and a negative passage; "
            "raise lists.depth or add passages."
        )
    return TrainingLists(np.asarray(query_rows, dtype=np.int32), np.stack(lists))


def text_groups(store: TokenIds, length: int) -> npt.NDArray[np.int64]:
    """A 64-bit hash per passage, equal for passages whose first `length` tokens are the same, int64 of shape (N,).

    `length` is what a model reads: passages that differ only beyond it are one passage to it.
    """
    digests = b"".join(
        hashlib.blake2b(store[row][:length].tobytes(), digest_size=8).digest() for row in range(len(store))
    )
    return np.frombuffer(digests, dtype=np.int64)


def _distinct_texts(
    ranked: npt.NDArray[np.int32], positives: list[int], same_text: npt.NDArray[np.int64]
) -> npt.NDArray[np.int32]:
    """The candidates that may be negatives: each text once, none that reads like a positive."""
    _, first = np.unique(same_text[ranked], return_index=True)
    distinct = ranked[np.sort(first)]
    return distinct[~np.isin(same_text[distinct], same_text[positives])]
