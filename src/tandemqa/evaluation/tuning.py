"""The settings of search on judged questions, quality against latency, and the best of those that are fast enough.

A setting's ranking follows from scores that are made once: the re-ranker's of each candidate at the largest depth,
cut for smaller ones, with the dial of early stopping played on them. Its latency is that of `Searcher.search`, one
question after the other, the settings in an order drawn anew for each question, so that whatever else the machine
does falls on all of them alike.
"""

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tandemqa.code import code_version
from tandemqa.data.dataset import Dataset, load_dataset
from tandemqa.data.qrels import Qrels
from tandemqa.data.runs import Run
from tandemqa.encoders.backbone import Precision, device_of, has_bfloat16
from tandemqa.encoders.bundle import Bundle
from tandemqa.encoders.quantised import has_int8, most_in_weights
from tandemqa.errors import TandemError
from tandemqa.evaluation.metrics import counted_queries, evaluate_run
from tandemqa.evaluation.significance import paired_interval
from tandemqa.files import cache_folder, save_arrays
from tandemqa.index.dense import Kind
from tandemqa.index.index import MANIFEST, Index
from tandemqa.index.vectors import VectorCache, passage_index
from tandemqa.progress import bar, track
from tandemqa.search.candidates import Candidates, Mode, find
from tandemqa.search.learnt import Learnt, Setting, Tuned
from tandemqa.search.rank import blended, final_scores
from tandemqa.search.searcher import Searcher
from tandemqa.search.stopping import read_until_settled

DEPTHS = (0, 5, 10, 20, 50, 100)
MODES: tuple[Mode, ...] = ("dense", "hybrid")
DIAL = (0.003, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
METRICS = ("mrr@10", "ndcg@10")
RANKED = 10
# From so many passages on, exact search takes long enough for an approximate one to be worth building.
APPROXIMATE_FROM = 100_000
# Questions that a setting's latency is measured on, and those after which one that was always too slow is left.
TURNS, ENOUGH = 60, 10
# Latencies that differ by less than this factor differ by chance.
ALIKE = 1.1
# MRR@10 that may be lost to speed.
NEGLIGIBLE = 0.005
# Libraries that vectors, scores and indexes depend on.
MAKERS = ("torch", "transformers", "faiss-cpu", "bm25s")
# Pairs that are scored between two files; what an interruption loses at most.
BLOCK = 1000


@dataclass(frozen=True, eq=False)
class Point:
    """A setting over one index, and what it was measured at.

    values: metric -> float64 (Q,), by question. reads: int64 (Q,), candidates that the re-ranker reads of each.
    seconds: what single questions took, some of them only where all took too long.
    """

    searcher: Searcher
    setting: Setting
    values: dict[str, NDArray[np.float64]]
    reads: NDArray[np.int64]
    seconds: list[float] = field(default_factory=list)

    def mean(self, metric: str) -> float:
        return float(self.values[metric].mean())

    def milliseconds(self, percent: float) -> float:
        """The percentile of its latency."""
        return 1000 * float(np.percentile(self.seconds, percent))

    @property
    def kind(self) -> Kind:
        return self.searcher.index.segments[0].vectors.kind

    @property
    def precision(self) -> Precision:
        return self.searcher.index.precision

    def as_json(self) -> dict[str, Any]:
        return {
            "index": str(self.searcher.index.folder),
            "vectors": self.kind,
            "precision": self.precision,
            **self.setting.model_dump(),
            **{metric: self.mean(metric) for metric in METRICS},
            "reads": float(self.reads.mean()),
            "p50_ms": self.milliseconds(50),
            "p95_ms": self.milliseconds(95),
            "measured": len(self.seconds),
        }


@dataclass(frozen=True, eq=False)
class Tuning:
    """All settings measured, and the one that was chosen."""

    points: list[Point]
    chosen: Point
    tuned: Tuned

    @property
    def front(self) -> list[Point]:
        """The settings that none beats in both quality and latency, the fastest first."""
        front: list[Point] = []
        for point in sorted(self.points, key=lambda point: (point.milliseconds(95), -point.mean("mrr@10"))):
            if not front or point.mean("mrr@10") > front[-1].mean("mrr@10"):
                front.append(point)
        return front

    def as_json(self) -> dict[str, Any]:
        shown = {"tuned": self.tuned.model_dump(), "index": str(self.chosen.searcher.index.folder)}
        return shown | {name: [point.as_json() for point in getattr(self, name)] for name in ("front", "points")}

    def table(self) -> str:
        """The front as text, a line each, and what was chosen."""
        tuned = self.tuned
        lines = [
            f"{tuned.questions:,} {tuned.split} questions, {tuned.passages:,} passages; one question at a time, "
            f"{tuned.k} hits, {tuned.threads} threads",
            "",
            f"{'index':7}{'precision':11}{'mode':8}{'depth':>6}{'stopping':>10}{'MRR@10':>9}{'nDCG@10':>9}"
            f"{'p50 ms':>9}{'p95 ms':>9}",
        ]
        # What is chosen for its speed may stand a little below the front.
        shown = sorted({*self.front, self.chosen}, key=lambda point: point.milliseconds(95))
        for point in shown:
            setting = point.setting
            lines.append(
                f"{point.kind:7}{point.precision:11}{setting.mode:8}{setting.depth:6}{setting.stopping:10g}"
                f"{point.mean('mrr@10'):9.3f}{point.mean('ndcg@10'):9.3f}"
                f"{point.milliseconds(50):9.1f}{point.milliseconds(95):9.1f}{'  chosen' * (point is self.chosen)}"
            )
        return "\n".join(lines)


def tune(
    bundle: Bundle | str | Path,
    dataset: Dataset | str | Path,
    p95_ms: float,
    indexes: Sequence[Index | str | Path] = (),
    split: str = "dev",
    questions: int = 200,
    k: int = 5,
) -> Tuning:
    """Measure settings of search on questions of `split`, and make the best within the limit the bundle's own.

    Settings are depths, modes, values of the dial and indexes, with their structures and precisions. Without
    `indexes`, the passages of `dataset` are indexed in the cache: in each precision that the bundle can compute in,
    exact and, if there are many, IVF and HNSW. Of the settings of which 95 % of the questions take at most `p95_ms`
    milliseconds, the one with the best MRR@10 is chosen. A faster one takes its place only where it surely loses next
    to nothing: where the 95 % interval of the difference, question by question, ends below 0.005 (a test of
    non-inferiority). No setting that is fast enough is a `TandemError`, and nothing is written.
    """
    if not 0 < p95_ms < np.inf:
        raise TandemError(f"p95_ms is {p95_ms}; allow a time above 0.")
    if k < 1:
        raise TandemError(f"k is {k}; ask for at least 1 passage.")
    if not isinstance(dataset, Dataset):
        dataset = load_dataset(dataset)
    if not isinstance(bundle, Bundle):
        bundle = Bundle.load(bundle)
    qrels = _drawn(dataset.judged(split), questions)
    if len(qrels) < 2:
        raise TandemError(f"{len(qrels)} questions of {split} are too few to compare settings on; take at least 2.")
    searchers = [Searcher(index, bundle) for index in indexes or _built(bundle, dataset)]
    points = [point for searcher in searchers for point in _ranked(searcher, dataset, qrels, k)]
    _measure(points, [dataset.queries[query_id] for query_id in qrels][:TURNS], k, p95_ms / 1000)
    chosen = choose(points, p95_ms)
    tuned = Tuned(
        **chosen.setting.model_dump(),
        vectors=chosen.kind,
        precision=chosen.precision,
        passages=len(chosen.searcher.index),
        split=split,
        questions=len(qrels),
        mrr=chosen.mean("mrr@10"),
        ndcg=chosen.mean("ndcg@10"),
        limit_ms=p95_ms,
        p50_ms=chosen.milliseconds(50),
        p95_ms=chosen.milliseconds(95),
        k=k,
        threads=torch.get_num_threads(),
    )
    bundle.remember(tuned=tuned.model_dump())
    return Tuning(points, chosen, tuned)


def choose(points: Sequence[Point], p95_ms: float) -> Point:
    """The point within the limit with the best MRR@10, or the fastest of those that lose next to nothing against it;
    of those that are about as fast, the best."""
    within = [point for point in points if point.milliseconds(95) <= p95_ms]
    if not within:
        fastest = min(points, key=lambda point: point.milliseconds(95))
        setting = fastest.setting
        raise TandemError(
            f"No setting answers 95 % of the questions within {p95_ms:g} ms: the fastest, {setting.mode} with depth "
            f"{setting.depth} over the {fastest.kind} index, takes {fastest.milliseconds(95):.1f} ms; allow that."
        )
    best = max(within, key=lambda point: (point.mean("mrr@10"), -point.milliseconds(95)))
    equal = [point for point in within if _loses_nothing(point.values["mrr@10"], best.values["mrr@10"])]
    least = ALIKE * min(point.milliseconds(95) for point in equal)
    fast = [point for point in equal if point.milliseconds(95) <= least]
    return max(fast, key=lambda point: (point.mean("mrr@10"), -point.milliseconds(95)))


def _loses_nothing(values: NDArray[np.float64], best: NDArray[np.float64]) -> bool:
    """Whether the 95 % interval of the mean of `best - values`, question by question, ends below NEGLIGIBLE."""
    return paired_interval(values, best, seed=0)[1] < NEGLIGIBLE


def _drawn(judged: Qrels, count: int) -> Qrels:
    """The judgements of `count` questions that have a positive, in an order drawn by chance."""
    query_ids = counted_queries(judged)
    drawn = np.random.default_rng(0).permutation(len(query_ids))[: max(0, count)]
    return {query_ids[number]: judged[query_ids[number]] for number in drawn.tolist()}


def _built(bundle: Bundle, dataset: Dataset) -> list[Path]:
    """Indexes of the dataset in the cache, built unless they are there."""
    count = len(dataset.passages)
    kinds: tuple[Kind, ...] = ("exact", "ivf", "hnsw") if count >= APPROXIMATE_FROM else ("exact",)
    precisions: tuple[Precision, ...] = ("auto", "int8") if bundle.calibrated and has_int8() else ("auto",)
    folders: list[Path] = []
    for precision in precisions:
        pair = bundle.at(precision)
        # The vectors of an index are those of the cache, as long as what makes them stays the same.
        vectors = VectorCache(pair.retriever, dataset.passages.fingerprint).folder.name
        key = _key(bundle.fingerprint, vectors, code_version("data", "encoders", "index"))
        places = {kind: cache_folder() / "indexes" / key / f"{kind}-{precision}" for kind in kinds}
        missing = [kind for kind in kinds if not (places[kind] / MANIFEST).exists()]
        if missing:
            passage_index(pair.retriever, dataset)  # all take their vectors from the cache
        for kind in missing:
            Index.build(pair, dataset, places[kind], vectors=kind, precision=precision).close()
        folders += places.values()
    return folders


def _ranked(searcher: Searcher, dataset: Dataset, qrels: Qrels, k: int) -> list[Point]:
    """The settings over one index with the quality of each, those left out that others make pointless."""
    index, retriever, learnt = searcher.index, searcher.bundle.retriever, searcher.learnt
    row = dict(zip(index.passages.ids(), index.rows.tolist(), strict=True))
    if not any(passage in row for grades in qrels.values() for passage, grade in grades.items() if grade > 0):
        raise TandemError(f"The index {index.folder} holds no passage that is relevant; index the passages judged.")
    texts = [dataset.queries[query_id] for query_id in qrels]
    vectors = retriever.encode(retriever.tokenize(texts), "query")
    depths = [depth for depth in DEPTHS if depth <= max(k, len(index))]
    asked = [(mode, depth) for mode in MODES for depth in depths]
    found: dict[tuple[Mode, int], Candidates] = {}
    for mode, depth in track(asked, "find candidates", len(asked), "setting"):
        found[mode, depth] = find(index, texts, vectors, max(RANKED, depth), mode, learnt.fusion)
    scores = _Scores(searcher, dataset, list(qrels))
    scores.make([found[mode, depth].run.rows[:, :depth] for mode, depth in asked])
    points = []
    for mode in MODES:
        own: list[Point] = []
        for depth in depths:
            candidates = found[mode, depth]
            by_similarity = Run(list(qrels), candidates.run.rows, candidates.similarity)
            read = scores.of(candidates.run.rows, depth)
            for stopping in (0.0, *(DIAL if depth and learnt.stopping else ())):
                if depth == 0:
                    run, done = Run(list(qrels), candidates.run.rows, candidates.run.scores), read > -np.inf
                else:
                    run, done = _stopped(by_similarity, read, depth, learnt, stopping)
                setting = Setting(depth=depth, mode=mode, stopping=stopping)
                own.append(Point(searcher, setting, evaluate_run(run, qrels, row, METRICS), done.sum(axis=1)))
        points += [point for point in own if point.setting.stopping == 0 or not _pointless(point, own)]
    return points


def _stopped(
    candidates: Run, scores: NDArray[np.float32], depth: int, learnt: Learnt, stopping: float
) -> tuple[Run, NDArray[np.bool_]]:
    """The ranking of the top `depth`, read until the dial says to stop, and which of them were read."""
    wanted = candidates.rows >= 0
    wanted[:, depth:] = False
    done = wanted
    if learnt.stopping is not None:
        final = final_scores(candidates, scores, learnt.blend)
        done = read_until_settled(wanted, candidates.scores, lambda _: final, learnt.stopping, stopping)
    return blended(candidates, np.where(done, scores, np.float32(-np.inf)), learnt.blend), done


def _pointless(point: Point, others: Sequence[Point]) -> bool:
    """Whether another reads no more, of its slowest questions and of all, and ranks no worse; of equals all but the
    first are pointless."""

    def costs(point: Point) -> tuple[float, float, float]:
        return float(np.percentile(point.reads, 95)), float(point.reads.mean()), -point.mean("mrr@10")

    own = costs(point)
    place = others.index(point)
    return any(
        all(theirs <= mine for theirs, mine in zip(cost, own, strict=True)) and (cost != own or number < place)
        for number, cost in enumerate(map(costs, others))
    )


def _measure(points: Sequence[Point], questions: Sequence[str], k: int, limit: float) -> None:
    """Time each setting on each question, after one that does not count."""

    def search(point: Point, question: str) -> float:
        started = time.perf_counter()
        setting = point.setting
        point.searcher.search(question, k, setting.depth, setting.mode, setting.stopping)
        return time.perf_counter() - started

    random = np.random.default_rng(0)
    with bar("measure", len(points) * len(questions), "search") as progress:
        for point in points:
            search(point, questions[0])
        for question in questions:
            for number in random.permutation(len(points)).tolist():
                seconds = points[number].seconds
                if len(seconds) < ENOUGH or min(seconds) <= limit:
                    seconds.append(search(points[number], question))
                progress.update(1)


class _Scores:
    """The re-ranker's scores of questions and passages, each pair read once for all settings and indexes of a
    precision, and kept in the cache."""

    def __init__(self, searcher: Searcher, dataset: Dataset, query_ids: Sequence[str]) -> None:
        index, bundle = searcher.index, searcher.bundle
        self.index, self.reranker = index, bundle.reranker
        self.queries = bundle.reranker.tokenize([dataset.queries[query_id] for query_id in query_ids])
        self.query_ids = query_ids
        self.passage = dict(zip(index.rows.tolist(), index.passages.ids(), strict=True))
        key = _key(
            bundle.fingerprint,
            bundle.calibration,
            index.precision,
            has_bfloat16(device_of(bundle.reranker)),
            most_in_weights(),
            dataset.fingerprint,
            index.about["data"]["fingerprint"],
            index.passages.generation,
            index.passages.commit,
            code_version("data", "encoders"),
        )
        self.path = cache_folder() / "scores" / f"{key}.npz"
        self.known: dict[tuple[str, str], float] = {}
        if self.path.exists():
            with np.load(self.path, allow_pickle=False) as kept:
                names = zip(kept["queries"].tolist(), kept["passages"].tolist(), strict=True)
                self.known = dict(zip(names, kept["scores"].tolist(), strict=True))

    def make(self, rankings: Sequence[NDArray[np.int32]]) -> None:
        """Score all candidates, rows (Q, k) of each ranking, that are not known yet."""
        wanted = {
            (number, row)
            for ranking in rankings
            for number, row in zip(*self._pairs(ranking), strict=True)
            if self._name(number, row) not in self.known
        }
        pairs = np.array(sorted(wanted), dtype=np.int64).reshape(-1, 2)
        with bar("re-rank", len(pairs), "pair") as progress:
            for start in range(0, len(pairs), BLOCK):
                block = pairs[start : start + BLOCK]
                scores = self.reranker.score(self.queries, self.index.tokens, block).tolist()
                self.known |= {self._name(*pair): score for pair, score in zip(block.tolist(), scores, strict=True)}
                queries, passages = zip(*self.known, strict=True)
                values = np.array(list(self.known.values()), dtype=np.float32)
                save_arrays(self.path, queries=np.array(queries), passages=np.array(passages), scores=values)
                progress.update(len(block))

    def of(self, rows: NDArray[np.int32], depth: int) -> NDArray[np.float32]:
        """The scores of the first `depth` candidates, float32 of the shape of `rows`, -inf elsewhere."""
        scores = np.full(rows.shape, -np.inf, dtype=np.float32)
        numbers, places = np.nonzero(rows[:, :depth] >= 0)
        names = map(self._name, numbers.tolist(), rows[numbers, places].tolist())
        scores[numbers, places] = [self.known[name] for name in names]
        return scores

    def _name(self, number: int, row: int) -> tuple[str, str]:
        return self.query_ids[number], self.passage[row]

    @staticmethod
    def _pairs(rows: NDArray[np.int32]) -> tuple[list[int], list[int]]:
        numbers, places = np.nonzero(rows >= 0)
        return numbers.tolist(), rows[numbers, places].tolist()


def _key(*parts: object) -> str:
    """What identifies something in the cache that these parts and the libraries of `MAKERS` make."""
    versions = [version(library) for library in MAKERS]
    return hashlib.sha256(repr((parts, versions)).encode()).hexdigest()[:16]
