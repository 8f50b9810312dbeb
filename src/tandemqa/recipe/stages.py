"""The stages of the chain, each a function of the materials and of the folders that it reads; it writes its own.

A training stage finds its checkpoint in its folder, and leaves the weights of the models that it trained there.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np

from tandemqa import processes
from tandemqa.data.runs import Run
from tandemqa.encoders.bundle import Bundle
from tandemqa.errors import TandemError
from tandemqa.evaluation.report import write_runs
from tandemqa.evaluation.stages import rank_stages
from tandemqa.files import save_array, save_arrays, write_json
from tandemqa.index.dense import DenseIndex
from tandemqa.index.vectors import passage_index
from tandemqa.lists.build import DrawConfig, TrainingLists, build_lists
from tandemqa.lists.denoise import Scores
from tandemqa.recipe.materials import Materials
from tandemqa.recipe.sample import HARD, RERANKED_BY, RETRIEVER, Sample, draw_sample, measure_on, sampled_questions
from tandemqa.recipe.stage import reading
from tandemqa.search.rank import retrieve
from tandemqa.training.checkpoint import save_weights
from tandemqa.training.contrastive import Contrastive
from tandemqa.training.listwise import Listwise
from tandemqa.training.loop import NotFiniteError, Refresh, fit
from tandemqa.training.validation import Validation

EVALUATION = "evaluation.json"


def warm_retriever(materials: Materials, folder: Path, seed: int) -> None:
    """Train the retriever by contrast alone: its weights, and the lists that it saw."""
    config = materials.recipe.warm_retriever
    lists = _made_once(folder / "lists.npz", lambda: _warm_retriever_lists(materials, seed))
    objective = Contrastive(
        materials.retriever,
        materials.retriever_texts,
        lists,
        [
            [materials.dataset.passages.row[p] for p, grade in grades.items() if grade > 0]
            for grades in materials.qrels.values()
        ],
        materials.same_text,
        config.temperature,
        config.micro_tokens,
        config.precision,
        config.grad_keep,
    )
    with _by_id(materials):
        fit(objective, config, seed, folder, folder.name)
    _save_models(materials, folder, retriever=True)


def _warm_retriever_lists(materials: Materials, seed: int) -> TrainingLists:
    """Each question with its positive, and negatives of its own if the recipe wants them."""
    config, row = materials.recipe.warm_retriever, materials.dataset.passages.row
    labelled = list(materials.qrels)
    if config.negatives == "none":
        pairs = [
            (number, row[p]) for number, q in enumerate(labelled) for p, g in materials.qrels[q].items() if g > 0
        ]
        numbers, positives = np.array(pairs, dtype=np.int32).T
        return TrainingLists(numbers, positives[:, None])
    if config.negatives == "bm25":
        candidates = materials.bm25(labelled, config.depth)
    else:
        drawn = np.random.default_rng(seed).integers(
            len(materials.dataset.passages),
            size=(len(labelled), 2 * config.negatives_per_question + 8),
            dtype=np.int32,
        )
        candidates = Run(labelled, drawn, np.zeros(drawn.shape, dtype=np.float32))
    draw = DrawConfig(size=1 + config.negatives_per_question, depth=config.depth)
    return build_lists(candidates, materials.qrels, row, materials.same_text, draw, seed, keep_single=True).lists


def mine(materials: Materials, folder: Path) -> None:
    """The first passages for every question, by the retriever, BM25 or both: `candidates.npz`."""
    source, depth = materials.recipe.mine.source, materials.recipe.mine.depth
    index = None if source == "bm25" else passage_index(materials.retriever, materials.dataset)
    _save_run(folder / "candidates.npz", materials.candidates(index, depth))


def warm_reranker(materials: Materials, folder: Path, mined: Path, seed: int) -> None:
    """Train the re-ranker alone, positives against random candidates of those `mined`."""
    config = materials.recipe.warm_reranker
    row = materials.dataset.passages.row
    draw = materials.recipe.warm_lists
    lists = _made_once(
        folder / "lists.npz",
        lambda: build_lists(_load_run(mined), materials.qrels, row, materials.same_text, draw, seed).lists,
    )
    objective = materials.listwise(lists, materials.recipe.loss.reranker_alone(), config)
    with _by_id(materials):
        fit(objective, config, seed, folder, folder.name)
    _save_models(materials, folder, reranker=True)


def score(materials: Materials, folder: Path, mined: Path) -> None:
    """The re-ranker's scores of the candidates (`scores.npy`) and of the positives (`positives.npy`)."""
    scores = materials.scores(_load_run(mined).cut(materials.recipe.lists.depth), folder.name)
    for file_name, values in (("positives.npy", scores.positives), ("scores.npy", scores.candidates)):
        save_array(folder / file_name, values)


def lists(materials: Materials, folder: Path, mined: Path, scored: Path | None, seed: int) -> None:
    """Training lists of the candidates, by the scores if the recipe wants any, and the verdict on each candidate."""
    scores = None
    if scored is not None:
        with reading(scored):
            files = (scored / name for name in ("scores.npy", "positives.npy"))
            scores = Scores(*(np.load(file, allow_pickle=False) for file in files))
    drawn, about = materials.draw(_load_run(mined).cut(materials.recipe.lists.depth), scores, seed)
    drawn.lists.save(folder / "lists.npz")
    save_array(folder / "verdicts.npy", drawn.verdicts)
    write_json(folder / "lists.json", about | {"counts": drawn.counts})


def joint(materials: Materials, folder: Path, listed: Path, seed: int) -> None:
    """Train both models together on the lists; in its midst they may be drawn anew (`refresh_steps`)."""
    config = materials.recipe.joint
    with reading(listed):
        lists = TrainingLists.load(listed / "lists.npz")
    refresh = None
    if materials.recipe.refresh_steps is not None:
        refresh = Refresh(materials.recipe.refresh_steps, partial(_refreshed, materials, seed=seed))
    validation = None
    if config.validate_steps is not None and config.epochs > 0:
        validation = _validation(materials, folder, config.validate_steps, seed)
    loss = materials.recipe.loss
    with _by_id(materials):
        fit(materials.listwise(lists, loss, config), config, seed, folder, folder.name, refresh, validation)
    _save_models(materials, folder, retriever=loss.retriever_learns, reranker=loss.reranker_learns)


def evaluate(materials: Materials, folder: Path) -> None:
    """Rank the questions of a split by every stage of search; what is learnt there of how to search."""
    config = materials.recipe.evaluation
    assert config.split is not None
    pair = Bundle(folder, materials.retriever, materials.reranker, {"started_from": materials.started_from})
    rankings = rank_stages(pair, materials.dataset, config.split, config.depth)
    learnt = rankings.learn()
    write_runs(rankings.final(learnt), folder, materials.dataset.passages.ids)
    write_json(folder / EVALUATION, learnt.model_dump() | {"metrics": rankings.report(learnt).as_json()})


def _refreshed(materials: Materials, folder: Path, seed: int) -> Listwise:
    """Lists from the models in the midst of their training; found in `folder` after an interruption."""

    def made() -> TrainingLists:
        index = None
        if materials.recipe.mine.source != "bm25":
            index = DenseIndex.build(
                materials.retriever.encode(materials.retriever_texts.passages, "passage", show="encode passages")
            )
        candidates = materials.candidates(index, materials.recipe.mine.depth).cut(materials.recipe.lists.depth)
        scores = materials.scores(candidates, "score") if materials.recipe.reranker_scores else None
        drawn, about = materials.draw(candidates, scores, seed)
        write_json(folder / "lists.json", about | {"counts": drawn.counts})
        return drawn.lists

    return materials.listwise(_made_once(folder / "lists.npz", made), materials.recipe.loss, materials.recipe.joint)


def _validation(materials: Materials, folder: Path, every_steps: int, seed: int) -> Validation:
    """The measurements of the joint training, on a sample that is drawn with the models as they are before it."""
    config, path = materials.recipe.joint, folder / "sample.npz"
    if processes.is_main() and not path.exists():
        query_ids = sampled_questions(materials.dataset, config.validation_questions, seed)
        hard = [materials.bm25(query_ids, HARD)]
        if materials.recipe.mine.source != "bm25":
            queries = materials.retriever.tokenize([materials.dataset.queries[query_id] for query_id in query_ids])
            index = passage_index(materials.retriever, materials.dataset)
            hard.append(retrieve(materials.retriever, index, query_ids, queries, HARD))
        draw_sample(materials.dataset, hard, config.validation_passages, seed).save(path)
    processes.wait()
    sample = Sample.load(path)
    return Validation(
        every_steps,
        config.patience,
        lambda: measure_on(sample, materials.dataset, materials.retriever, materials.reranker),
        RERANKED_BY if materials.recipe.loss.reranker_learns else RETRIEVER,
    )


@contextmanager
def _by_id(materials: Materials) -> Iterator[None]:
    """In this block, what is not finite in a training is a `TandemError` that names question and passages."""
    try:
        yield
    except NotFiniteError as error:
        passages = materials.dataset.passages.ids
        raise TandemError(
            error.sentence(lambda row: repr(materials.query_ids[row]), lambda row: repr(passages[row]))
        ) from error


def _save_models(materials: Materials, folder: Path, retriever: bool = False, reranker: bool = False) -> None:
    for model, wanted in ((materials.retriever, retriever), (materials.reranker, reranker)):
        if wanted and processes.is_main():
            name = "retriever" if model is materials.retriever else "reranker"
            save_weights(folder / f"{name}.safetensors", model)


def _made_once(path: Path, make: Callable[[], TrainingLists]) -> TrainingLists:
    """The lists in `path`, made by the main process unless an interrupted run left them there."""
    if processes.is_main() and not path.exists():
        make().save(path)
    processes.wait()
    return TrainingLists.load(path)


def _save_run(path: Path, run: Run) -> None:
    save_arrays(path, query_ids=np.array(run.query_ids), rows=run.rows, scores=run.scores)


def _load_run(stage: Path) -> Run:
    with reading(stage), np.load(stage / "candidates.npz", allow_pickle=False) as arrays:
        return Run(arrays["query_ids"].tolist(), arrays["rows"], arrays["scores"])
