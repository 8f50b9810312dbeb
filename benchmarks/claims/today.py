"""What people do today with sentence-transformers 6, in a given time: mined hard negatives, a bi-encoder with
`MultipleNegativesRankingLoss`, then a cross-encoder with `BinaryCrossEntropyLoss`."""

import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset as Columns
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.cross_encoder import CrossEncoderTrainer, CrossEncoderTrainingArguments
from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss
from sentence_transformers.sentence_transformer import (
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.training_args import BatchSamplers
from sentence_transformers.util import mine_hard_negatives
from transformers import TrainerCallback

from tandemqa import Bundle, Dataset
from tandemqa.encoders.backbone import default_device, has_bfloat16, resolve_model
from tandemqa.encoders.dual import DualEncoder
from tandemqa.evaluation.pair import make_bundle
from tandemqa.recipe.config import Recipe
from tandemqa.recipe.questions import training_questions

# Mined as the library's documentation recommends (NV-Retriever's margin); rates are those of our own training.
NEGATIVES, RANGE, MARGIN = 4, 50, 0.05
BATCH = 32
RETRIEVER_RATE, RERANKER_RATE = 5e-5, 1e-4
# Of the time that mining leaves, what the retriever gets; of a step's measured time, what is planned for it.
RETRIEVER_SHARE, PLANNED = 1 / 3, 1.05
TRIED = 6


# When hard negatives are mined: before the retriever's training, after it, or both times. Without them it learns from
# the other questions' positives in its batch alone.
Mining = Literal["before", "after", "twice"]
MINING: dict[str, Mining] = {"st": "before", "st-mined-after": "after", "st-mined-twice": "twice"}


def train_today(
    dataset: Dataset, recipe: Recipe, folder: Path, budget: float, mining: Mining
) -> tuple[Bundle, dict[str, float]]:
    """A pair trained in `budget` seconds, mining included and loading excluded, and the seconds of each part. Of the
    recipe it takes the models, the lengths, the questions and the seed.

    Mixed precision where the processor has bfloat16. How many steps fit is measured beforehand, on copies, so that
    the learning rate falls to its end; that measurement does not count. The last step may run over.
    """
    qrels, passages = training_questions(dataset, recipe), dataset.passages
    pairs = [
        (dataset.queries[query_id], passages[passages.row[passage]].full)
        for query_id, grades in qrels.items()
        for passage, grade in grades.items()
        if grade > 0
    ]
    corpus = [passage.full for passage in passages]
    DualEncoder.load(recipe.retriever).save(folder / "start")
    torch.manual_seed(recipe.seed)
    retriever = SentenceTransformer(str(folder / "start"), device=str(default_device()))
    reranker = CrossEncoder(
        resolve_model(recipe.reranker.model),
        num_labels=1,
        max_length=recipe.reranker.pair_length,
        device=str(default_device()),
    )
    seconds: dict[str, float] = {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        started = time.monotonic()
        value = work()
        seconds[name] = round(time.monotonic() - started, 1)
        return value

    examples, left = _columns(pairs), budget
    if mining != "after":
        examples = timed("mining", lambda: _mined(pairs, corpus, retriever))
        # A second mining will take about as long.
        left -= seconds["mining"] * (2 if mining == "twice" else 1)
    timed("retriever", _retriever_fit(retriever, examples, folder, recipe.seed, RETRIEVER_SHARE * left))
    negatives = examples if mining == "before" else timed("mining again", lambda: _mined(pairs, corpus, retriever))
    fit_reranker = _reranker_fit(reranker, negatives, folder, recipe.seed, budget - sum(seconds.values()))
    timed("reranker", fit_reranker)
    retriever.save_pretrained(str(folder / "retriever"))
    reranker.save_pretrained(str(folder / "reranker"))
    return make_bundle(str(folder / "retriever"), str(folder / "reranker"), folder / "bundle"), seconds


def _columns(pairs: list[tuple[str, str]]) -> Columns:
    return Columns.from_dict(
        {"query": [query for query, _ in pairs], "positive": [positive for _, positive in pairs]}
    )


def _mined(pairs: list[tuple[str, str]], corpus: list[str], retriever: SentenceTransformer) -> Columns:
    """Triplets of question, positive and a hard negative whose score is a margin below the positive's."""
    with torch.autocast(default_device().type, torch.bfloat16, enabled=has_bfloat16(default_device())):
        return mine_hard_negatives(
            _columns(pairs),
            retriever,
            corpus=corpus,
            range_max=RANGE,
            relative_margin=MARGIN,
            num_negatives=NEGATIVES,
            sampling_strategy="top",
            output_format="triplet",
            verbose=False,
        )


def _labelled(triplets: Columns) -> Columns:
    """Each question with its positives and its negatives, labelled 1 and 0, each pair once."""
    labels: dict[tuple[str, str], int] = {}
    for triplet in triplets:
        labels[triplet["query"], triplet["negative"]] = 0
        labels[triplet["query"], triplet["positive"]] = 1
    queries, passages = zip(*labels, strict=True)
    return Columns.from_dict({"query": queries, "passage": passages, "label": [float(v) for v in labels.values()]})


def _retriever_fit(
    retriever: SentenceTransformer, examples: Columns, folder: Path, seed: int, budget: float
) -> Callable[[], None]:
    def trainer(model: SentenceTransformer, steps: int, callback: TrainerCallback) -> SentenceTransformerTrainer:
        told = _arguments(
            SentenceTransformerTrainingArguments, folder, seed, RETRIEVER_RATE, steps,
            batch_sampler=BatchSamplers.NO_DUPLICATES,
        )  # fmt: skip
        loss = MultipleNegativesRankingLoss(model)
        return SentenceTransformerTrainer(model, told, examples, loss=loss, callbacks=[callback])

    return _fit(retriever, trainer, budget)


def _reranker_fit(
    reranker: CrossEncoder, triplets: Columns, folder: Path, seed: int, budget: float
) -> Callable[[], None]:
    labelled = _labelled(triplets)

    def trainer(model: CrossEncoder, steps: int, callback: TrainerCallback) -> CrossEncoderTrainer:
        told = _arguments(CrossEncoderTrainingArguments, folder, seed, RERANKER_RATE, steps)
        loss = BinaryCrossEntropyLoss(model, pos_weight=torch.tensor(float(NEGATIVES)))
        return CrossEncoderTrainer(model, told, labelled, loss=loss, callbacks=[callback])

    return _fit(reranker, trainer, budget)


def _fit(model: Any, trainer: Callable[[Any, int, TrainerCallback], Any], budget: float) -> Callable[[], None]:
    """A training that fills the budget of seconds, its steps counted by the time that a few take on a copy."""
    clock = Clock()
    trainer(copy.deepcopy(model), TRIED, clock).train()
    steps = max(1, int(budget / (PLANNED * clock.seconds_a_step)))

    def fit() -> None:
        trainer(model, steps, Clock(budget)).train()

    return fit


class Clock(TrainerCallback):
    """Measures the steps of a training, all but the first, and stops it when its time is over."""

    def __init__(self, budget: float = float("inf")) -> None:
        self.budget = budget
        self.ends: list[float] = []

    @property
    def seconds_a_step(self) -> float:
        return (self.ends[-1] - self.ends[0]) / (len(self.ends) - 1)

    def on_train_begin(self, *arguments: Any, **others: Any) -> None:
        self.started = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self.ends.append(time.monotonic())
        if self.ends[-1] - self.started > self.budget:
            control.should_training_stop = True


def _arguments(kind: type, folder: Path, seed: int, rate: float, steps: int, **others: Any) -> Any:
    return kind(
        output_dir=str(folder / "trainer"),
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        learning_rate=rate,
        warmup_steps=0.1,
        bf16=has_bfloat16(default_device()),
        use_cpu=default_device().type == "cpu",
        seed=seed,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        **others,
    )
