"""Why a training list looks as it does: every candidate of one question, with what became of it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tandemqa.data.dataset import Dataset
from tandemqa.errors import TandemError
from tandemqa.files import read_json
from tandemqa.lists.build import TrainingLists, Verdict
from tandemqa.lists.confidence import Calibration
from tandemqa.recipe.run import dataset_of, read_run
from tandemqa.recipe.stage import reading, why_not_complete

WHY = {
    Verdict.NONE: "ranked below lists.depth",
    Verdict.LABELLED: "labelled positive",
    Verdict.SAME_TEXT: "reads like a positive or like a candidate above it",
    Verdict.UNSCORED: "negative: unlabelled, and no re-ranker score was asked for",
    Verdict.NEGATIVE: "negative: confidence {confidence:.2f} is below {low:.2f}",
    Verdict.DROPPED: "dropped from denoised lists: confidence {confidence:.2f} is between {low:.2f} and {high:.2f}",
    Verdict.JUDGED: "negative: judged not relevant, confidence {confidence:.2f}",
    Verdict.POSITIVE: "further positive: confidence {confidence:.2f} is above {high:.2f}",
}


@dataclass(frozen=True)
class Candidate:
    """A candidate of a question. `rank` counts from 1 and is None for a passage that is no candidate; `lists` says in
    how many training lists it stands, and `heads` how many it heads as their positive."""

    rank: int | None
    id: str
    title: str
    retriever_score: float | None
    reranker_score: float | None
    confidence: float | None
    verdict: str
    why: str
    lists: int
    heads: int


@dataclass(frozen=True)
class Explanation:
    """The candidates of one question and the lists that were made from them."""

    query_id: str
    question: str
    pseudo_labelled: bool
    candidates: list[Candidate]


def explain(run: str | Path, query_id: str, round_number: int = 1) -> Explanation:
    """The candidates of a question in a training run's joint lists, those that stand in a list but are no candidate
    last; what the run lacks is a `TandemError`."""
    told = read_run(Path(run))
    suffix = "" if round_number == 1 else f"-{round_number}"
    names = [f"{name}{suffix}" for name in ("mine", "score", "lists")]
    if names[-1] not in told.stages:
        raise TandemError(f"{run} has no round {round_number}; its stages are {', '.join(told.stages)}.")
    for name in names:
        if name in told.stages and (missing := why_not_complete(told.stages, name)):
            raise TandemError(missing)
    mined, scored, listed = (told.stage(name) for name in names)
    with reading(listed):
        about = read_json(listed / "lists.json")
        lists = TrainingLists.load(listed / "lists.npz")
        verdicts = np.load(listed / "verdicts.npy", allow_pickle=False)
    with reading(mined), np.load(mined / "candidates.npz", allow_pickle=False) as arrays:
        query_ids, rows, retriever_scores = arrays["query_ids"].tolist(), arrays["rows"], arrays["scores"]
    if query_id not in query_ids:
        raise TandemError(f"{run} was not trained on a question {query_id!r}; one that it was is {query_ids[0]!r}.")
    number = query_ids.index(query_id)
    dataset = dataset_of(told.data)
    if isinstance(dataset, str):
        raise TandemError(dataset)
    below = rows.shape[1] - verdicts.shape[1]  # candidates deeper than the lists reach
    verdict = np.pad(verdicts[number], (0, below))
    scores = np.full(rows.shape[1], np.nan)
    if "slope" in about:
        with reading(scored):
            scores[: verdicts.shape[1]] = np.load(scored / "scores.npy", allow_pickle=False)[number]
    own = lists.passages[lists.query_rows == number]
    # The questions without labels stand behind those with.
    pseudo_labelled = number >= len(query_ids) - about.get("unlabelled", 0)
    candidates = []
    for place in np.flatnonzero(rows[number] >= 0).tolist():
        score = None if np.isnan(scores[place]) else float(scores[place])
        candidates.append(
            _candidate(
                dataset,
                int(rows[number, place]),
                place + 1,
                float(retriever_scores[number, place]),
                score,
                Verdict(int(verdict[place])),
                about,
                own,
                pseudo_labelled,
            )
        )
    outside = np.setdiff1d(own[own >= 0], rows[number]).tolist()
    candidates += [_candidate(dataset, row, None, None, None, Verdict.NONE, about, own, False) for row in outside]
    return Explanation(query_id, dataset.queries[query_id], pseudo_labelled and len(own) > 0, candidates)


def _candidate(
    dataset: Dataset,
    row: int,
    rank: int | None,
    retriever_score: float | None,
    reranker_score: float | None,
    verdict: Verdict,
    about: dict[str, Any],
    own: Any,
    pseudo_labelled: bool,
) -> Candidate:
    passage = dataset.passages[row]
    confidence = None
    if reranker_score is not None:
        confidence = float(Calibration(about["slope"], about["offset"]).confidence(np.array([reranker_score]))[0])
    heads = int((own[:, 0] == row).sum())
    why = WHY[verdict].format(confidence=confidence, low=about.get("low"), high=about.get("high"))
    if verdict == Verdict.LABELLED and pseudo_labelled:
        why = f"taken for the positive: of highest confidence, {confidence:.2f}, and above {about['high']:.2f}"
    if verdict == Verdict.NONE and heads:
        why = "labelled positive, ranked below lists.depth"
    elif pseudo_labelled and not len(own):
        why = "in no list: no candidate of this unlabelled question is sure enough to be its positive"
    if rank is None:
        why = (
            "labelled positive that was not retrieved"
            if heads
            else "drawn from outside the candidates to fill a list"
        )
    name = "outside" if rank is None else verdict.name.lower().replace("_", " ")
    return Candidate(
        rank,
        passage.id,
        passage.title,
        retriever_score,
        reranker_score,
        confidence,
        name,
        why,
        int((own == row).any(axis=1).sum()),
        heads,
    )
