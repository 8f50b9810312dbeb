"""The joint step against what one would do with sentence-transformers: the same models, trained on the same lists.

    python benchmarks/training.py DATA [--size 8] [--lists 256] [--rounds 3] [--tune] [--parity]

tandemqa trains both models together. With sentence-transformers they are trained one after the other: the re-ranker
with `CrossEncoderTrainer` and `ListNetLoss`, then its scores of all lists are computed, then the retriever learns
them with `SentenceTransformerTrainer` and `DistillKLDivLoss`; once with the trainers' default settings, and once with
bfloat16, larger parts and lists of similar length together (`BEST`). All take 8 lists a step, but for
`BEST` where --tune or --set give it another number. Lists hold a labelled passage and BM25 candidates, passages are
cut at 128 tokens, both start from texts, and loading models is not counted. Each measurement is a process of its own,
so that its peak memory is its own, and the contenders take turns. Prints a markdown table. It needs the extra `data`.

--tune: look for the fastest settings of the latter first, on a quarter of the lists.
--parity: both with the same losses, order of lists and optimiser, in float32 and without dropout; prints the largest
difference between the losses of a step, and fails if it is above 1e-3.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

# Heavy imports stand in the functions that run in processes of their own: a child's peak memory is never less than
# what its parent held when it was started.

SEED = 13
PASSAGE_LENGTH, PAIR_LENGTH = 128, 160
TEMPERATURE = 0.05
# A label so large that its softmax is all at the positive: then ListNet is the cross-entropy of the positive.
CERTAIN = 100.0
LISTS_A_STEP = 8


class Settings(NamedTuple):
    """How sentence-transformers trains: lists per step, pairs per forward pass of the re-ranker (None: the library's
    default), pairs per batch when scoring, and whether in bfloat16 and with lists of similar length together."""

    batch: int
    pairs: int | None
    scoring: int
    fast: bool


DEFAULTS = Settings(batch=LISTS_A_STEP, pairs=None, scoring=32, fast=False)
BEST = Settings(batch=LISTS_A_STEP, pairs=32, scoring=32, fast=True)
TRIED = (4, 8, 16, 32)
CONTENDERS = {
    "tandemqa, joint": None,
    "sentence-transformers, defaults": DEFAULTS,
    "sentence-transformers, best": BEST,
}


def main() -> None:
    same = f"All take {LISTS_A_STEP} lists a step, but for `best` where --tune or --set give it another number."
    parser = argparse.ArgumentParser(description=f"{__doc__.splitlines()[0]} {same}")
    parser.add_argument("data", type=Path, help="a folder in BEIR layout")
    parser.add_argument("--size", type=int, default=8, help="passages in a list")
    parser.add_argument("--lists", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--parity", action="store_true", help="compare losses instead of speed")
    parser.add_argument("--tune", action="store_true", help="look for the fastest settings of `best` first")
    parser.add_argument("--set", default="{}", help='settings of `best` as JSON, such as {"batch": 16}')
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        run_part(options)
        return
    with tempfile.TemporaryDirectory() as work:
        options.work = Path(work)
        part(options, "prepare")
        if options.parity:
            part(options, "parity")
            return
        if options.tune:
            options.set = tune(options)
        measured: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
        for number in range(options.rounds):
            for name in CONTENDERS:
                measured[name].append(json.loads(part(options, name).splitlines()[-1]))
                print(f"round {number + 1}: {name}: {measured[name][-1]}", file=sys.stderr, flush=True)
        print_table(options, measured)


def tune(options: argparse.Namespace) -> str:
    """The fastest of `TRIED` for each phase by itself, as `--set` takes it."""
    few = argparse.Namespace(**vars(options) | {"lists": max(16, options.lists // 4)})
    seconds = {}
    for number in TRIED:
        changed = json.dumps({"batch": number, "pairs": 4 * number, "scoring": 4 * number})
        seconds[number] = json.loads(part(few, "sentence-transformers, best", changed).splitlines()[-1])
        print(f"tried {changed}: {seconds[number]}", file=sys.stderr, flush=True)
    fastest = {
        phase: min(seconds, key=lambda number, phase=phase: seconds[number][phase])
        for phase in ("re-ranker", "its scores", "retriever")
    }
    chosen = {
        "batch": fastest["retriever"],
        "pairs": 4 * fastest["re-ranker"],
        "scoring": 4 * fastest["its scores"],
    }
    print(f"best: {chosen}", file=sys.stderr, flush=True)
    return json.dumps(chosen)


def part(options: argparse.Namespace, name: str, changed: str = "") -> str:
    """One measurement in a process of its own; what it prints."""
    arguments = [sys.executable, __file__, str(options.data), "--part", name, "--work", str(options.work)]
    arguments += ["--size", str(options.size), "--lists", str(options.lists), "--set", changed or options.set]
    ended = subprocess.run(arguments, stdout=subprocess.PIPE, text=True)
    if ended.returncode:
        raise SystemExit(f"{name} failed:\n{ended.stdout}")
    if name == "parity":
        print(ended.stdout, end="")
    return ended.stdout


def run_part(options: argparse.Namespace) -> None:
    if options.part == "prepare":
        prepare(options)
    elif options.part == "parity":
        parity(options.work, options.lists)
    else:
        settings = CONTENDERS[options.part]
        if settings is None:
            seconds = joint(options.work, options.lists)
        else:
            changed = json.loads(options.set) if settings is BEST else {}
            seconds = one_after_the_other(options.work, options.lists, settings._replace(**changed))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({**{name: round(value, 2) for name, value in seconds.items()}, "peak_mb": round(peak)}))


def print_table(options: argparse.Namespace, measured: dict[str, list[dict[str, float]]]) -> None:
    print(f"{options.lists} lists of {options.size}, medians of {options.rounds} rounds\n")
    print("| | lists/s | lowest to highest | peak memory | seconds: re-ranker, its scores, retriever |")
    print("|---|---|---|---|---|")
    for name, rounds in measured.items():
        phases = [[value for key, value in one.items() if key != "peak_mb"] for one in rounds]
        rates = [options.lists / sum(one) for one in phases]
        peak = max(one["peak_mb"] for one in rounds)
        spans = ", ".join(f"{statistics.median(values):.0f}" for values in zip(*phases, strict=True))
        each = spans if len(phases[0]) > 1 else f"{spans}, all at once"
        range_ = f"{min(rates):.2f} to {max(rates):.2f}"
        print(f"| {name} | {statistics.median(rates):.2f} | {range_} | {peak:,.0f} MB | {each} |")


def prepare(options: argparse.Namespace) -> None:
    """Write the lists as texts, and the two models, both in sentence-transformers' layout, the head drawn once."""
    import torch

    from tandemqa import load_dataset
    from tandemqa.encoders.cross import CrossEncoder, RerankerConfig
    from tandemqa.encoders.dual import DualEncoder, RetrieverConfig
    from tandemqa.evaluation.metrics import counted_queries
    from tandemqa.index.lexical import LexicalIndex
    from tandemqa.search.rank import lexical

    dataset = load_dataset(options.data)
    torch.manual_seed(SEED)
    retriever = DualEncoder.load(RetrieverConfig(passage_length=PASSAGE_LENGTH))
    retriever.save(options.work / "retriever")
    CrossEncoder.load(RerankerConfig(pooling="mean", pair_length=PAIR_LENGTH)).save(options.work / "reranker")
    qrels = dataset.judged("train")
    query_ids = counted_queries(qrels)
    order = torch.randperm(len(query_ids), generator=torch.Generator().manual_seed(SEED)).tolist()
    drawn = [query_ids[number] for number in order[: 2 * options.lists]]
    index = LexicalIndex.build(passage.full for passage in dataset.passages)
    candidates = lexical(index, drawn, [dataset.queries[query_id] for query_id in drawn], options.size + 20)
    lists = []
    for query_id, rows in zip(drawn, candidates.rows.tolist(), strict=True):
        positives = [dataset.passages.row[p] for p, grade in qrels[query_id].items() if grade > 0]
        negatives = [row for row in rows if row >= 0 and row not in positives][: options.size - 1]
        if len(negatives) == options.size - 1:
            passages = [short(retriever, dataset.passages[row].full) for row in (positives[0], *negatives)]
            lists.append({"query": dataset.queries[query_id], "passages": passages})
    if len(lists) < options.lists:
        raise SystemExit(f"The data gives only {len(lists)} lists of {options.size}; ask for fewer with --lists.")
    (options.work / "lists.json").write_text(json.dumps(lists[: options.lists]))


def short(retriever: Any, text: str) -> str:
    """The text up to the token that the retriever reads last."""
    encoded = retriever.tokenizer(text, truncation=True, max_length=PASSAGE_LENGTH, return_offsets_mapping=True)
    return text[: max(end for _, end in encoded["offset_mapping"])]


def read_lists(work: Path, count: int) -> list[dict[str, Any]]:
    lists: list[dict[str, Any]] = json.loads((work / "lists.json").read_text())
    return lists[:count]


# This project


def load_pair(work: Path, head_dropout: float) -> tuple[Any, Any]:
    from tandemqa.encoders.cross import CrossEncoder, RerankerConfig
    from tandemqa.encoders.dual import DualEncoder, RetrieverConfig

    return DualEncoder.load(RetrieverConfig(model=str(work / "retriever"), passage_length=PASSAGE_LENGTH)), (
        CrossEncoder.load(
            RerankerConfig(
                model=str(work / "reranker"), pooling="mean", pair_length=PAIR_LENGTH, head_dropout=head_dropout
            )
        )
    )


def train_ours(pair: tuple[Any, Any], lists: list[dict[str, Any]], config: Any, loss: Any) -> list[dict[str, float]]:
    """Tokenise and train as the loop does; the log of the steps."""
    import numpy as np

    from tandemqa.lists.build import TrainingLists
    from tandemqa.training.batch import Texts
    from tandemqa.training.listwise import Listwise
    from tandemqa.training.loop import fit

    row: dict[str, int] = {}
    rows = [[row.setdefault(text, len(row)) for text in one["passages"]] for one in lists]
    training = TrainingLists(np.arange(len(lists), dtype=np.int32), np.array(rows, dtype=np.int32))
    texts = [Texts(model.tokenize([one["query"] for one in lists]), model.tokenize(list(row))) for model in pair]
    objective = Listwise(*pair, *texts, training, loss, config.micro_tokens, config.precision)
    with tempfile.TemporaryDirectory() as folder:
        fit(objective, config, SEED, Path(folder), "joint")
        return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


def joint(work: Path, count: int) -> dict[str, float]:
    from tandemqa.training.config import TrainingConfig
    from tandemqa.training.joint import LossConfig

    pair, lists = load_pair(work, head_dropout=0.1), read_lists(work, count)
    started = time.perf_counter()
    train_ours(pair, lists, TrainingConfig(batch_lists=LISTS_A_STEP), LossConfig())
    return {"joint": time.perf_counter() - started}


# sentence-transformers


def one_after_the_other(work: Path, count: int, settings: Settings) -> dict[str, float]:
    import torch
    from sentence_transformers import CrossEncoder, SentenceTransformer

    lists = read_lists(work, count)
    seconds: dict[str, float] = {}
    started = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal started
        seconds[name] = time.perf_counter() - started

    reranker, retriever = CrossEncoder(str(work / "reranker")), SentenceTransformer(str(work / "retriever"))
    started = time.perf_counter()
    train_reranker(reranker, lists, settings, sampler(lists, settings))
    lap("re-ranker")
    started = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16, enabled=settings.fast):
        scores = teacher_scores(reranker, lists, settings)
    lap("its scores")
    started = time.perf_counter()
    train_retriever(retriever, lists, scores, settings, sampler(lists, settings))
    lap("retriever")
    return seconds


def teacher_scores(reranker: Any, lists: list[dict[str, Any]], settings: Settings) -> list[list[float]]:
    pairs = [(one["query"], passage) for one in lists for passage in one["passages"]]
    scores = reranker.predict(pairs, batch_size=settings.scoring)
    return [[float(score) for score in row] for row in scores.reshape(len(lists), -1)]


def sampler(lists: list[dict[str, Any]], settings: Settings) -> Callable[..., Any] | str:
    """The library's own order, or lists of similar length together (its trainers pass over `group_by_length`)."""
    if not settings.fast:
        return "batch_sampler"
    from sentence_transformers.base.sampler import DefaultBatchSampler
    from transformers.trainer_pt_utils import LengthGroupedSampler

    lengths = [sum(map(len, one["passages"])) for one in lists]
    order = LengthGroupedSampler(settings.batch, lengths=lengths)
    return lambda dataset, batch_size, drop_last, **others: DefaultBatchSampler(order, batch_size, drop_last)


def train_reranker(
    reranker: Any, lists: list[dict[str, Any]], settings: Settings, batches: Any, **arguments: Any
) -> list[float]:
    """Train with ListNet on labels that are all at the positive; the loss of each step."""
    from sentence_transformers.cross_encoder import CrossEncoderTrainer, CrossEncoderTrainingArguments
    from sentence_transformers.cross_encoder.losses import ListNetLoss

    labels = [[CERTAIN] + [0.0] * (len(one["passages"]) - 1) for one in lists]
    columns = {"query": [one["query"] for one in lists], "docs": [one["passages"] for one in lists], "labels": labels}
    loss = remembering(ListNetLoss)(reranker, mini_batch_size=settings.pairs)
    return trained(
        CrossEncoderTrainer, CrossEncoderTrainingArguments, reranker, columns, loss, settings, batches, arguments
    )


def train_retriever(
    retriever: Any,
    lists: list[dict[str, Any]],
    scores: list[list[float]],
    settings: Settings,
    batches: Any,
    **arguments: Any,
) -> list[float]:
    """Train with the divergence from the re-ranker's scores; the loss of each step."""
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer.losses import DistillKLDivLoss

    columns: dict[str, list[Any]] = {"query": [one["query"] for one in lists]}
    for place in range(len(lists[0]["passages"])):
        columns[f"passage{place}"] = [one["passages"][place] for one in lists]
    columns["label"] = scores
    loss = remembering(DistillKLDivLoss)(retriever, student_temperature=TEMPERATURE)
    return trained(
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
        retriever,
        columns,
        loss,
        settings,
        batches,
        arguments,
    )


def remembering(loss: type) -> type:
    """The loss, keeping its values: the trainer's log rounds them."""

    class Remembering(loss):  # type: ignore[misc, valid-type]
        def forward(self, *arguments: Any, **others: Any) -> Any:
            value = super().forward(*arguments, **others)
            self.__dict__.setdefault("values", []).append(float(value.detach()))
            return value

    return Remembering


def trained(
    trainer: type,
    arguments_of: type,
    model: Any,
    columns: dict[str, list[Any]],
    loss: Any,
    settings: Settings,
    batches: Any,
    arguments: dict[str, Any],
) -> list[float]:
    import torch
    from datasets import Dataset

    with tempfile.TemporaryDirectory() as folder:
        told = arguments_of(
            output_dir=folder,
            num_train_epochs=1,
            per_device_train_batch_size=settings.batch,
            bf16=settings.fast,
            use_cpu=not torch.cuda.is_available(),
            batch_sampler=batches,
            save_strategy="no",
            report_to="none",
            seed=SEED,
            **arguments,
        )
        trainer(model=model, args=told, train_dataset=Dataset.from_dict(columns), loss=loss).train()
    values: list[float] = loss.values
    return values


# The same losses


def parity(work: Path, count: int) -> None:
    """Retriever: KL from a re-ranker that stays as it is; re-ranker: cross-entropy of the positive."""
    from sentence_transformers import CrossEncoder, SentenceTransformer
    from sentence_transformers.base.sampler import DefaultBatchSampler

    from tandemqa.training.config import TrainingConfig
    from tandemqa.training.joint import LossConfig
    from tandemqa.training.loop import _steps

    lists, settings = read_lists(work, count), Settings(batch=LISTS_A_STEP, pairs=-1, scoring=32, fast=False)
    rate = 2e-5
    config = TrainingConfig(
        batch_lists=settings.batch,
        retriever_rate=rate,
        reranker_rate=rate,
        head_rate=rate,
        warmup_share=0,
        precision="fp32",
    )
    steps = -(-len(lists) // settings.batch)
    order = [rows.tolist() for rows in _steps(len(lists), settings.batch, steps, SEED)]
    same: dict[str, Any] = {
        "learning_rate": rate,
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.clip_norm,
    }

    class SameOrder(DefaultBatchSampler):
        def __init__(self, dataset: Any, **others: Any) -> None:
            pass

        def __iter__(self) -> Any:
            return iter(order)

        def __len__(self) -> int:
            return len(order)

    # Theirs is multiplied by the squared temperature.
    scale = TEMPERATURE**2
    distilled = LossConfig(
        kl_weight=scale, reranker_weight=0, kl_direction="reranker_retriever", kl_reranker_gradient=False,
        retriever_temperature=TEMPERATURE,
    )  # fmt: skip
    scores = teacher_scores(CrossEncoder(str(work / "reranker")), lists, settings)
    ours = {
        "retriever": [step["kl"] for step in train_ours(load_pair(work, 0.0), lists, config, distilled)],
        "re-ranker": [
            step["loss"] for step in train_ours(load_pair(work, 0.0), lists, config, LossConfig().reranker_alone())
        ],
    }
    retriever, reranker = SentenceTransformer(str(work / "retriever")), CrossEncoder(str(work / "reranker"))
    theirs = {
        "retriever": [v / scale for v in train_retriever(retriever, lists, scores, settings, SameOrder, **same)],
        "re-ranker": train_reranker(reranker, lists, settings, SameOrder, **same),
    }
    for model, values in ours.items():
        largest = max(abs(one - other) for one, other in zip(values, theirs[model], strict=True))
        first, last = f"{values[0]:.5f} and {theirs[model][0]:.5f}", f"{values[-1]:.5f} and {theirs[model][-1]:.5f}"
        print(
            f"{model}: {len(values)} steps, losses {first} at first, {last} at last, largest difference {largest:.1e}"
        )
        if not largest < 1e-3:
            raise SystemExit(f"The losses of the {model} differ.")


if __name__ == "__main__":
    main()
