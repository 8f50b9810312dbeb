"""The numbers of a report, from the files that a training run left.

What a run does not have, or not yet, is a `Missing`: the sentence that stands in its place.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tandemqa.data.dataset import Dataset, Passage
from tandemqa.data.lines import fault, read_lines
from tandemqa.data.qrels import Qrels
from tandemqa.data.runs import Run, read_trec
from tandemqa.encoders.bundle import MANIFEST
from tandemqa.errors import TandemError
from tandemqa.evaluation.compare import Difference, compare
from tandemqa.evaluation.report import Report
from tandemqa.evaluation.significance import ROUNDING
from tandemqa.files import read_json
from tandemqa.lists.build import Verdict
from tandemqa.lists.confidence import Calibration
from tandemqa.recipe.config import Recipe
from tandemqa.recipe.run import Data, dataset_of, read_run
from tandemqa.recipe.stage import Progress, leaves, reading, why_not_complete
from tandemqa.recipe.stages import EVALUATION

SUSPECTS = 20
EXAMPLES = 5
SHOWN_CHARACTERS = 300
BINS = 60
METRIC = "mrr@10"
BEFORE, AFTER = "retriever-before", "re-ranked"

Missing = str


@dataclass(frozen=True)
class Setting:
    """A setting of the recipe that is not the default."""

    name: str
    value: Any
    default: Any


@dataclass(frozen=True)
class Suspect:
    """A candidate that nobody judged and the re-ranker takes for a positive; `rank`: among the candidates, from 1."""

    question: str
    id: str
    title: str
    text: str
    rank: int
    confidence: float


@dataclass(frozen=True)
class Confidence:
    """The re-ranker's scores of the candidates, and the confidences that they mean.

    edges: float64 (B + 1,), of bins of the score; positives, others: int64 (B,), labelled positives and all other
    candidates in each; positives_by_band: labelled positives whose confidence would have given them this verdict;
    suspects: of highest confidence first.
    """

    calibration: Calibration
    low: float
    high: float
    edges: NDArray[np.float64]
    positives: NDArray[np.int64]
    others: NDArray[np.int64]
    positives_by_band: dict[Verdict, int]
    suspects: list[Suspect]


@dataclass(frozen=True)
class Lists:
    """The lists of a round's joint training: what the candidates were to them, and how many there are of what."""

    verdicts: dict[Verdict, int]
    counts: dict[str, int]
    confidence: Confidence | Missing


@dataclass(frozen=True)
class Curve:
    """The log of a training stage: `values` by name, each float64 of the length of `steps`."""

    stage: str
    steps: NDArray[np.int64]
    values: dict[str, NDArray[np.float64]]

    @property
    def minutes(self) -> float:
        return float(self.values["seconds"].sum() / 60)

    @property
    def tokens_per_second(self) -> float:
        return float(self.values["tokens"].sum() / max(self.values["seconds"].sum(), 0.001))


@dataclass(frozen=True)
class Example:
    """A question whose ranking changed. `title` is of its labelled passage, the highest one if it has several, `top`
    of the passage on rank 1 now; `before` and `after` are ranks from 1, None where no labelled passage is ranked."""

    question: str
    title: str
    before: int | None
    after: int | None
    top: str
    top_is_labelled: bool


@dataclass(frozen=True)
class Changes:
    """The final ranking against the retriever before training, question by question.

    differences: float64 (N,), of MRR@10, rising; wins, losses: the largest first.
    """

    split: str
    difference: Difference
    differences: NDArray[np.float64]
    wins: list[Example]
    losses: list[Example]


@dataclass(frozen=True)
class Facts:
    """All that a report tells of a run."""

    run: Path
    data: Data
    settings: list[Setting]
    stages: dict[str, Progress]
    bundle: Path | Missing
    evaluation: Report | Missing
    lists: list[Lists | Missing]
    curves: list[Curve | Missing]
    changes: Changes | Missing

    @property
    def confidences(self) -> list[Confidence | Missing]:
        """Of each round."""
        return [lists if isinstance(lists, Missing) else lists.confidence for lists in self.lists]

    @property
    def suspects(self) -> list[Suspect] | Missing:
        """Those of the last round that has any, by the re-ranker that learnt most."""
        found = [each if isinstance(each, Missing) else each.suspects for each in self.confidences]
        return next((each for each in reversed(found) if not isinstance(each, Missing)), found[0])


def gather(run: Path) -> Facts:
    """Everything a report tells of the training run in `run`; what is damaged in it is a `TandemError`."""
    told = read_run(run)
    data, stages, names = told.data, told.stages, list(told.stages)
    settings = _settings(told.recipe)
    dataset = dataset_of(data)
    rounds = [name.removeprefix("lists") for name in names if name.startswith("lists")]
    return Facts(
        run,
        data,
        settings,
        stages,
        run / "bundle" if (run / "bundle" / MANIFEST).exists() else "The run has no bundle yet.",
        _evaluation(run, stages),
        [_lists(run, stages, suffix, dataset) for suffix in rounds],
        [_curve(run, stages, name) for name in names if name.startswith(("warm_", "joint"))],
        _changes(run, stages, dataset),
    )


def _settings(recipe: dict[str, Any]) -> list[Setting]:
    defaults = dict(leaves(Recipe().model_dump()))
    settings = [Setting(name, value, defaults.get(name)) for name, value in leaves(recipe)]
    return [setting for setting in settings if setting.value != setting.default]


def _evaluation(run: Path, stages: dict[str, Progress]) -> Report | Missing:
    if "evaluate" not in stages:
        return "The recipe measures nothing (evaluation.split is null); tandemqa evaluate does."
    if missing := why_not_complete(stages, "evaluate"):
        return missing
    folder = run / "stages" / "evaluate"
    with reading(folder):
        return Report.from_json(read_json(folder / EVALUATION)["metrics"])


def _lists(run: Path, stages: dict[str, Progress], suffix: str, dataset: Dataset | Missing) -> Lists | Missing:
    if missing := why_not_complete(stages, f"lists{suffix}"):
        return missing
    listed = run / "stages" / f"lists{suffix}"
    with reading(listed):
        about = read_json(listed / "lists.json")
        verdicts = np.load(listed / "verdicts.npy", allow_pickle=False)
        counts = about["counts"] | {
            f"{name.replace('_', '-')} questions": about[name]
            for name in ("unlabelled", "pseudo_labelled")
            if name in about
        }
    found = np.bincount(verdicts.ravel(), minlength=len(Verdict)).tolist()
    confidence: Confidence | Missing
    if "slope" not in about:
        confidence = (
            "The recipe asked for no scores of the re-ranker (lists.denoised_share and data.unlabelled are 0), so "
            "there is no confidence to show."
        )
    elif isinstance(dataset, Missing):
        confidence = dataset
    else:
        confidence = _confidence(run, suffix, about, verdicts, dataset)
    return Lists({verdict: found[verdict] for verdict in Verdict if verdict != Verdict.NONE}, counts, confidence)


class _Marks(NamedTuple):
    """What the judgements say of candidates, bool of their shape."""

    positive: NDArray[np.bool_]
    judged: NDArray[np.bool_]


def _confidence(
    run: Path, suffix: str, about: dict[str, Any], verdicts: NDArray[np.int8], dataset: Dataset
) -> Confidence:
    mined, scored = (run / "stages" / f"{name}{suffix}" for name in ("mine", "score"))
    with reading(scored):
        scores = np.load(scored / "scores.npy", allow_pickle=False)
    with reading(mined), np.load(mined / "candidates.npz", allow_pickle=False) as arrays:
        candidates = Run(arrays["query_ids"].tolist(), arrays["rows"], arrays["scores"]).cut(scores.shape[1])
    marks = _marks(candidates, dataset.qrels.get("train", {}), dataset.passages.row)
    # The questions without labels stand behind those with; training did not see the labels they may have.
    marks.positive[len(candidates.query_ids) - about["unlabelled"] :] = False
    calibration = Calibration(about["slope"], about["offset"])
    low, high = about["low"], about["high"]
    others = scores[(candidates.rows >= 0) & ~marks.positive]
    positives = scores[marks.positive]
    edges = np.histogram_bin_edges(scores[candidates.rows >= 0], BINS).astype(np.float64)
    sure = calibration.confidence(positives)
    below, above = int(np.count_nonzero(sure < low)), int(np.count_nonzero(sure > high))
    return Confidence(
        calibration,
        low,
        high,
        edges,
        np.histogram(positives, edges)[0],
        np.histogram(others, edges)[0],
        {Verdict.NEGATIVE: below, Verdict.DROPPED: len(sure) - below - above, Verdict.POSITIVE: above},
        _suspects(candidates, scores, marks, verdicts, calibration, dataset),
    )


def _marks(candidates: Run, qrels: Qrels, row: dict[str, int]) -> _Marks:
    marks = _Marks(np.zeros(candidates.rows.shape, dtype=bool), np.zeros(candidates.rows.shape, dtype=bool))
    for number, query_id in enumerate(candidates.query_ids):
        for passage, grade in qrels.get(query_id, {}).items():
            found = candidates.rows[number] == row[passage]
            marks.judged[number] |= found
            marks.positive[number] |= found & (grade > 0)
    return marks


def _suspects(
    candidates: Run,
    scores: NDArray[np.float32],
    marks: _Marks,
    verdicts: NDArray[np.int8],
    calibration: Calibration,
    dataset: Dataset,
) -> list[Suspect]:
    """The unjudged candidates of highest score; none that is known to read like a positive or like one above it."""
    free = (candidates.rows >= 0) & ~marks.judged
    free[:, : verdicts.shape[1]] &= verdicts != Verdict.SAME_TEXT
    # By score, of which confidence is a function: among many a confidence rounds to 1.
    ranked = np.where(free, scores, -np.inf).ravel()
    best = np.argpartition(-ranked, min(SUSPECTS, len(ranked) - 1))[:SUSPECTS]
    best = best[free.ravel()[best]]
    suspects = []
    for place in best[np.lexsort((best, -ranked[best]))].tolist():
        number, column = divmod(place, candidates.rows.shape[1])
        passage = dataset.passages[candidates.rows[number, column]]
        suspects.append(
            Suspect(
                _cut(dataset.queries[candidates.query_ids[number]]),
                passage.id,
                _cut(passage.title),
                _cut(passage.text),
                column + 1,
                float(calibration.confidence(scores[number, column : column + 1])[0]),
            )
        )
    return suspects


def _curve(run: Path, stages: dict[str, Progress], name: str) -> Curve | Missing:
    """The log of a stage, which may be in the midst of its training."""
    path = run / "stages" / name / "log.jsonl"
    if stages[name] in ("to do", "outdated") or not path.exists():
        return why_not_complete(stages, name) or f"The stage {name} kept no log."
    lines = list(read_lines(path))
    records = []
    for number, _, line in lines:
        try:
            records.append(json.loads(line))
        except ValueError as error:
            if number != lines[-1][0]:  # the last one may be in the midst of being written
                raise fault(path, number, "not valid JSON; remove the line.") from error
    if not records:
        return f"The stage {name} has only begun; its log has no step yet."
    try:
        values = {key: np.array([record[key] for record in records], dtype=np.float64) for key in records[0]}
        # Seconds are kept to the millisecond, and a small step may take none.
        values["tokens_per_second"] = values["tokens"] / np.maximum(values["seconds"], 0.001)
        return Curve(name, values.pop("step").astype(np.int64), values)
    except (KeyError, TypeError, ValueError) as error:
        raise TandemError(f"{path} is not a log that `train` wrote ({error}); remove it.") from error


def _changes(run: Path, stages: dict[str, Progress], dataset: Dataset | Missing) -> Changes | Missing:
    evaluation = _evaluation(run, stages)
    if isinstance(evaluation, Missing):
        return evaluation
    if isinstance(dataset, Missing):
        return dataset
    paths = [run / "stages" / "evaluate" / f"{name}.trec" for name in (BEFORE, AFTER)]
    if not paths[0].exists():
        return "The retriever before training was not measured: its weights were no longer to be found."
    comparison = compare(dataset.folder, paths, evaluation.split, METRIC)
    before, after = (comparison.values[name][METRIC] for name in (BEFORE, AFTER))
    differences = after - before
    rising = np.argsort(differences, kind="stable")
    before_run, after_run = (read_trec(path, dataset.passages.row) for path in paths)

    def examples(numbers: NDArray[np.int64]) -> list[Example]:
        queries = [comparison.queries[number] for number in numbers[:EXAMPLES]]
        qrels = dataset.qrels[evaluation.split]
        return [_example(query, before_run, after_run, qrels[query], dataset) for query in queries]

    return Changes(
        evaluation.split,
        comparison.differences[AFTER],
        differences[rising],
        examples(rising[differences[rising] > ROUNDING][::-1]),
        examples(rising[differences[rising] < -ROUNDING]),
    )


def _example(query_id: str, before: Run, after: Run, grades: dict[str, int], dataset: Dataset) -> Example:
    row = dataset.passages.row
    positives = np.array([row[passage] for passage, grade in grades.items() if grade > 0], dtype=np.int32)
    rankings = [_ranking(run, query_id) for run in (after, before)]
    found = [np.flatnonzero(np.isin(ranking, positives)) for ranking in rankings]
    highest = [ranking[places[0]] for ranking, places in zip(rankings, found, strict=True) if len(places)]
    now, then = (int(places[0]) + 1 if len(places) else None for places in found)
    top = rankings[0][:1]
    return Example(
        _cut(dataset.queries[query_id]),
        _name(dataset.passages[[*highest, positives[0]][0]]),
        then,
        now,
        _name(dataset.passages[top[0]]) if len(top) else "nothing",
        bool(np.isin(top, positives).any()),
    )


def _ranking(run: Run, query_id: str) -> NDArray[np.int32]:
    """What a run ranks for a query, perhaps nothing."""
    if query_id not in run.query_ids:
        return np.zeros(0, dtype=np.int32)
    rows = run.rows[run.query_ids.index(query_id)]
    return np.asarray(rows[rows >= 0])


def _name(passage: Passage) -> str:
    return _cut(passage.title or passage.text)


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS].rstrip() + "…"
