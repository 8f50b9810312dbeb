"""What the stages of a recipe work with: questions and passages as tokens, the two models, and lists made of them."""

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tandemqa.data.dataset import Dataset
from tandemqa.data.runs import Run
from tandemqa.data.tokens import passage_tokens
from tandemqa.encoders.bundle import MANIFEST
from tandemqa.encoders.cross import CrossEncoder
from tandemqa.encoders.dual import DualEncoder
from tandemqa.files import read_json
from tandemqa.index.dense import DenseIndex
from tandemqa.index.lexical import LexicalIndex
from tandemqa.lists.build import Drawn, TrainingLists, build_lists, text_groups
from tandemqa.lists.denoise import Scores, denoised_lists
from tandemqa.recipe.config import Recipe
from tandemqa.recipe.questions import training_questions, unlabelled_questions
from tandemqa.search.rank import fuse, lexical, reranker_scores, retrieve
from tandemqa.training.batch import Texts
from tandemqa.training.config import TrainingConfig
from tandemqa.training.joint import LossConfig
from tandemqa.training.listwise import Listwise


class Materials:
    """A dataset's training questions, and the two models of a recipe as far as they have been trained.

    qrels: query id -> passage id -> grade, of the labelled questions; query_ids: those, then `unlabelled`.
    started_from: the retriever before any training.
    """

    def __init__(self, dataset: Dataset, recipe: Recipe) -> None:
        self.dataset = dataset
        self.recipe = recipe
        torch.manual_seed(recipe.seed)  # a fresh scoring head is drawn at random
        self.retriever = DualEncoder.load(recipe.retriever)
        self.reranker = CrossEncoder.load(recipe.reranker)
        self.started_from = _started_from(recipe)
        self.qrels = training_questions(dataset, recipe)
        self.unlabelled = unlabelled_questions(dataset, recipe, self.qrels)
        self.query_ids = [*self.qrels, *self.unlabelled]

    @cached_property
    def retriever_texts(self) -> Texts:
        queries = self.retriever.tokenize([self.dataset.queries[query_id] for query_id in self.query_ids])
        return Texts(queries, passage_tokens(self.dataset, self.retriever.tokenizer))

    @cached_property
    def reranker_texts(self) -> Texts:
        queries = self.reranker.tokenize([self.dataset.queries[query_id] for query_id in self.query_ids])
        return Texts(queries, passage_tokens(self.dataset, self.reranker.tokenizer))

    @cached_property
    def same_text(self) -> npt.NDArray[np.int64]:
        special = len(self.retriever.frame(np.empty(0, dtype=np.int32), "passage"))
        return text_groups(self.retriever_texts.passages, self.retriever.limit("passage") - special)

    def candidates(self, index: DenseIndex | None, depth: int) -> Run:
        """The first `depth` passages for every question, as the recipe mines them; no index if by BM25 alone."""
        dense = None
        if index is not None:
            dense = retrieve(self.retriever, index, self.query_ids, self.retriever_texts.queries, depth)
        if self.recipe.mine.source == "dense":
            assert dense is not None
            return dense
        words = self.bm25(self.query_ids, depth)
        return words if dense is None else fuse(dense, words, depth)

    def bm25(self, query_ids: list[str], depth: int) -> Run:
        """BM25's first `depth` passages for each of these questions."""
        index = LexicalIndex.build(passage.full for passage in self.dataset.passages)
        return lexical(index, query_ids, [self.dataset.queries[query_id] for query_id in query_ids], depth)

    def scores(self, candidates: Run, show: str) -> Scores:
        """The re-ranker's scores of the candidates and of the positives."""
        texts, row = self.reranker_texts, self.dataset.passages.row
        positives = [
            (number, row[passage])
            for number, grades in enumerate(self.qrels.values())
            for passage, grade in grades.items()
            if grade > 0
        ]
        return Scores(
            reranker_scores(self.reranker, candidates, texts.queries, texts.passages, show=show),
            self.reranker.score(texts.queries, texts.passages, np.array(positives, dtype=np.int64)),
        )

    def draw(self, candidates: Run, scores: Scores | None, seed: int) -> tuple[Drawn, dict[str, Any]]:
        """Training lists, and what is to be known of how they were made."""
        passages = self.dataset.passages
        if scores is None:
            return build_lists(candidates, self.qrels, passages.row, self.same_text, self.recipe.lists, seed), {}
        return denoised_lists(
            candidates,
            scores,
            self.qrels,
            self.unlabelled,
            passages.ids,
            passages.row,
            self.same_text,
            self.recipe.lists,
            seed,
        )

    def listwise(self, lists: TrainingLists, loss: LossConfig, config: TrainingConfig) -> Listwise:
        return Listwise(
            self.retriever,
            self.reranker,
            self.retriever_texts,
            self.reranker_texts,
            lists,
            loss,
            config.micro_tokens,
            config.precision,
            config.grad_keep,
        )


def _started_from(recipe: Recipe) -> str:
    """The retriever before any training: a recipe that goes on from a bundle starts where that bundle started."""
    model = Path(recipe.retriever.model)
    manifest = model.parent / MANIFEST
    if model.is_dir() and manifest.exists() and "started_from" in (about := read_json(manifest)):
        return str(about["started_from"])
    return str(model.resolve()) if model.exists() else recipe.retriever.model
