"""From candidates to training lists: one positive first, then its hard negatives."""

import hashlib
from collections import Counter
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Literal, NamedTuple, Self

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, model_validator

from tandemqa.data.qrels import Qrels
from tandemqa.data.runs import Run
from tandemqa.data.tokens import TokenIds
from tandemqa.errors import TandemError
from tandemqa.files import save_arrays

NO_PASSAGE = -1

COUNTED = (
    "undenoised lists",
    "denoised lists",
    "short lists",
    "further positives",
    "dropped candidates",
    "negatives from outside the candidates",
    "questions without a positive",
)

Rows = npt.NDArray[np.int32]


class DrawConfig(BaseModel):
    """How negatives are drawn from the candidates."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    size: int = Field(8, ge=2, description="Passages in a list: one positive and size - 1 negatives.")
    depth: int = Field(50, ge=1, description="Negatives are drawn at random from this many top candidates.")
    per_query: int = Field(
        1, ge=1, description="Lists made for each question and positive, with different negatives."
    )


class ListsConfig(DrawConfig):
    """Undenoised and denoised lists (hybrid data augmentation; RocketQAv2, section 3.3)."""

    denoised_share: float = Field(
        0.0, ge=0, le=1, description="Share of the lists that are denoised; the paper's hybrid is 0.5."
    )
    low: float = Field(0.1, ge=0, le=1, description="Candidates below this confidence are denoised negatives.")
    high: float = Field(0.9, ge=0, le=1, description="Candidates above this confidence are further positives.")
    thresholds: Literal["confidence", "quantile"] = Field(
        "confidence",
        description="Whether low and high are confidences, or quantiles of the confidences of all candidates, for a "
        "re-ranker whose scores bunch up.",
    )

    @model_validator(mode="after")
    def _low_is_lower(self) -> Self:
        if self.low > self.high:
            raise ValueError(f"low ({self.low}) is above high ({self.high})")
        return self


class Verdict(IntEnum):
    """What a candidate is to a question's lists."""

    NONE = 0  # no candidate, or one below the depth
    LABELLED = 1  # a labelled positive
    SAME_TEXT = 2  # reads like a positive, or like a candidate ranked higher
    UNSCORED = 3  # may be a negative; no confidence was asked for
    NEGATIVE = 4  # confidence below the low threshold
    DROPPED = 5  # between the thresholds: in no denoised list
    POSITIVE = 6  # confidence above the high threshold: heads a list of its own
    JUDGED = 7  # judged not relevant: a negative whatever its confidence


DENOISED_NEGATIVES = (Verdict.NEGATIVE, Verdict.JUDGED)


class Denoising(NamedTuple):
    """What tells true negatives from unlabelled positives.

    confidence: float64 of the candidates' shape; low, high: the thresholds on it; share: of the lists that are
    denoised; always: questions whose lists are all denoised (pseudo-labelled ones).
    """

    confidence: npt.NDArray[np.float64]
    low: float
    high: float
    share: float
    always: frozenset[str] = frozenset()


@dataclass(frozen=True)
class TrainingLists:
    """Lists of passage rows. `query_rows` int32 (L,) into the queries; `passages` int32 (L, n), the positive in
    column 0, NO_PASSAGE where a list is short."""

    query_rows: Rows
    passages: Rows

    def __len__(self) -> int:
        return len(self.query_rows)

    def take(self, numbers: npt.NDArray[np.int64]) -> "TrainingLists":
        """Some of the lists."""
        return TrainingLists(self.query_rows[numbers], self.passages[numbers])

    def save(self, path: Path) -> None:
        save_arrays(path, query_rows=self.query_rows, passages=self.passages)

    @classmethod
    def load(cls, path: Path) -> "TrainingLists":
        with np.load(path, allow_pickle=False) as arrays:
            return cls(arrays["query_rows"], arrays["passages"])


class Drawn(NamedTuple):
    """Training lists; what each candidate was to them, `Verdict` as int8 (Q, depth); how many there are of what."""

    lists: TrainingLists
    verdicts: npt.NDArray[np.int8]
    counts: dict[str, int]


def build_lists(
    candidates: Run,
    qrels: Qrels,
    passage_row: dict[str, int],
    same_text: npt.NDArray[np.int64],
    config: DrawConfig,
    seed: int,
    denoising: Denoising | None = None,
    keep_single: bool = False,
) -> Drawn:
    """Lists whose negatives are drawn from the candidates (RocketQAv2, section 3.3).

    Every positive of a question heads `per_query` lists, each of one of two kinds. In an undenoised list the
    negatives are random picks from the candidates. In a denoised one they are random picks from those whose
    confidence is below the low threshold, filled up with random passages that are no candidates at all; a candidate
    above the high threshold heads one further denoised list. Passages judged not relevant (grade 0) may be
    negatives of either kind.

    No labelled positive of the question, and no passage that reads the same as one (`same_text` equal, see
    `text_groups`), is ever a negative; no text stands twice in a list. A list is shorter than `size` where there
    are fewer negatives, and left out where there is none, for a list of one passage teaches nothing, unless
    `keep_single` says that other questions' passages will be its negatives. `query_rows` refer to
    `candidates.query_ids`; a question without a positive in `qrels` has no list.
    """
    generator = np.random.default_rng(seed)
    query_rows: list[int] = []
    lists: list[Rows] = []
    counts: Counter[str] = Counter(dict.fromkeys(COUNTED, 0))
    verdicts = np.zeros(candidates.rows[:, : config.depth].shape, dtype=np.int8)
    for query_row, query_id in enumerate(candidates.query_ids):
        grades = {passage_row[pid]: grade for pid, grade in qrels.get(query_id, {}).items()}
        positives = np.array([row for row, grade in grades.items() if grade > 0], dtype=np.int32)
        judged = np.array([row for row, grade in grades.items() if grade <= 0], dtype=np.int32)
        if not len(positives):
            counts["questions without a positive"] += 1
            continue
        ranked = candidates.rows[query_row, : config.depth]
        share = 0.0
        if denoising is not None:
            share = 1.0 if query_id in denoising.always else denoising.share
        verdict = _verdicts(ranked, positives, judged, same_text, query_row, denoising)
        verdicts[query_row] = verdict
        pools = {
            "undenoised": _join(ranked[verdict >= Verdict.UNSCORED], judged, positives, same_text),
            "denoised": _join(ranked[np.isin(verdict, DENOISED_NEGATIVES)], judged, positives, same_text),
        }
        heads = [
            (head, "denoised" if share > 0 and generator.random() < share else "undenoised")
            for head in np.repeat(positives, config.per_query).tolist()
        ]
        if share > 0:
            further = ranked[verdict == Verdict.POSITIVE].tolist()
            heads += [(head, "denoised") for head in further]
            counts["further positives"] += len(further)
            counts["dropped candidates"] += int(np.count_nonzero(verdict == Verdict.DROPPED))
        for head, kind in heads:
            negatives = generator.choice(pools[kind], size=min(config.size - 1, len(pools[kind])), replace=False)
            missing = config.size - 1 - len(negatives)
            if kind == "denoised" and missing:
                avoid = np.concatenate([ranked[ranked != NO_PASSAGE], positives, negatives])
                filling = _elsewhere(generator, missing, avoid, same_text)
                counts["negatives from outside the candidates"] += len(filling)
                negatives = np.concatenate([negatives, filling])
            if not len(negatives) and not keep_single:
                continue
            row = np.full(config.size, NO_PASSAGE, dtype=np.int32)
            row[0], row[1 : 1 + len(negatives)] = head, negatives
            query_rows.append(query_row)
            lists.append(row)
            counts[f"{kind} lists"] += 1
            counts["short lists"] += len(negatives) < config.size - 1
    if not lists:
        raise TandemError(
            "No training list could be made: no question has both a positive and a negative passage; "
            "raise the depth or the low threshold of the lists, or add passages."
        )
    return Drawn(TrainingLists(np.asarray(query_rows, dtype=np.int32), np.stack(lists)), verdicts, dict(counts))


def text_groups(store: TokenIds, length: int) -> npt.NDArray[np.int64]:
    """A 64-bit hash per passage, equal for passages whose first `length` tokens are the same, int64 of shape (N,).

    `length` is what a model reads: passages that differ only beyond it are one passage to it.
    """
    digests = b"".join(
        hashlib.blake2b(store[row][:length].tobytes(), digest_size=8).digest() for row in range(len(store))
    )
    return np.frombuffer(digests, dtype=np.int64)


def _verdicts(
    ranked: Rows,
    positives: Rows,
    judged: Rows,
    same_text: npt.NDArray[np.int64],
    query_row: int,
    denoising: Denoising | None,
) -> npt.NDArray[np.int8]:
    """The `Verdict` of each candidate of one question, int8 of the shape of `ranked`."""
    present = ranked != NO_PASSAGE
    verdict = np.where(present, Verdict.SAME_TEXT, Verdict.NONE).astype(np.int8)
    _, first = np.unique(same_text[ranked[present]], return_index=True)
    verdict[np.flatnonzero(present)[first]] = Verdict.UNSCORED
    verdict[present & np.isin(same_text[ranked], same_text[positives])] = Verdict.SAME_TEXT
    verdict[np.isin(ranked, positives)] = Verdict.LABELLED
    if denoising is not None:
        confidence = denoising.confidence[query_row, : len(ranked)]
        scored = np.full(len(ranked), Verdict.DROPPED, dtype=np.int8)
        scored[confidence < denoising.low] = Verdict.NEGATIVE
        scored[confidence > denoising.high] = Verdict.POSITIVE
        scored[np.isin(same_text[ranked], same_text[judged])] = Verdict.JUDGED
        verdict = np.where(verdict == Verdict.UNSCORED, scored, verdict)
    return verdict


def _join(pool: Rows, judged: Rows, positives: Rows, same_text: npt.NDArray[np.int64]) -> Rows:
    """The pool and the passages judged not relevant: each text once, none that reads like a positive."""
    rows = np.concatenate([pool, judged])
    _, first = np.unique(same_text[rows], return_index=True)
    rows = rows[np.sort(first)]
    return rows[~np.isin(same_text[rows], same_text[positives])]


def _elsewhere(generator: np.random.Generator, count: int, avoid: Rows, same_text: npt.NDArray[np.int64]) -> Rows:
    """Random passages of other texts than those in `avoid`; fewer than `count` in a corpus too small."""
    draws = generator.integers(len(same_text), size=8 * count + 32).astype(np.int32)
    _, first = np.unique(same_text[draws], return_index=True)
    draws = draws[np.sort(first)]
    return draws[~np.isin(same_text[draws], same_text[avoid])][:count]
