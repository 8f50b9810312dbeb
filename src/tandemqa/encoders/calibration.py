"""The ranges of both models' activations, which int8 needs: measured on the user's own texts, kept in the bundle."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from tandemqa.encoders.backbone import check_int8, device_of, hidden_states
from tandemqa.encoders.cross import CrossEncoder
from tandemqa.encoders.dual import DualEncoder, Tower
from tandemqa.encoders.inputs import Ids, InputFormat, TokenBatch, token_budget_batches
from tandemqa.encoders.quantised import PRODUCTS, Ranges, measure_ranges
from tandemqa.errors import TandemError
from tandemqa.files import whole_file
from tandemqa.progress import bar

if TYPE_CHECKING:
    from tqdm import tqdm

RANGES = "int8.safetensors"
# Texts of each kind that are read at most.
QUESTIONS, PASSAGES = 128, 256
# Words at a passage's beginning that stand for a question.
OPENING = 12
BUDGET = 2048
TOWERS: tuple[Tower, Tower] = ("query", "passage")


def calibrate(
    retriever: DualEncoder, reranker: CrossEncoder, questions: Sequence[str], passages: Sequence[str]
) -> None:
    """Give both models the ranges of their activations on some of the texts.

    The re-ranker reads each question with the passage nearest to it. Beginnings of passages are questions too.
    """
    check_models(retriever, reranker)
    passages = _some(passages, PASSAGES)
    openings = [" ".join(passage.split()[:OPENING]) for passage in passages]
    questions = _some(questions, QUESTIONS) + _some(openings, QUESTIONS)
    if not passages:
        raise TandemError("int8 is calibrated on passages, and there are none; give some.")
    with bar("calibrate", 2 * len(questions) + len(passages), "text") as progress:
        ids = {tower: retriever.tokenize(texts) for tower, texts in zip(TOWERS, (questions, passages), strict=True)}
        framed = {tower: [retriever.frame(text, tower) for text in ids[tower]] for tower in TOWERS}
        if retriever.query_tower is retriever.passage_tower:
            both = _ranges(retriever.query_tower, retriever.format, framed["query"] + framed["passage"], progress)
            retriever.ranges = dict.fromkeys(TOWERS, both)
        else:
            retriever.ranges = {
                tower: _ranges(retriever.tower(tower), retriever.format, framed[tower], progress) for tower in TOWERS
            }
        queries, documents = (retriever.encode(ids[tower], tower, precision="fp32") for tower in TOWERS)
        nearest = (queries @ documents.T).argmax(axis=1).tolist()
        query_ids, passage_ids = reranker.tokenize(questions), reranker.tokenize(passages)
        pairs = [reranker.frame(query, passage_ids[row]) for query, row in zip(query_ids, nearest, strict=True)]
        sequences, starts = [ids for ids, _ in pairs], [start for _, start in pairs]
        reranker.ranges = _ranges(reranker.encoder, reranker.format, sequences, progress, starts)


def check_models(retriever: DualEncoder, reranker: CrossEncoder) -> None:
    """Refuse a pair that int8 is not made for."""
    for encoder in (retriever.query_tower, retriever.passage_tower, reranker.encoder):
        check_int8(encoder)


def save_ranges(folder: Path, retriever: DualEncoder, reranker: CrossEncoder) -> None:
    """Write the ranges of both models beside them."""
    parts: dict[str, Ranges] = {"reranker": reranker.ranges or {}}
    parts.update({str(tower): ranges for tower, ranges in retriever.ranges.items()})
    with whole_file(folder / RANGES) as partial:
        save_file(
            {f"{part}.{name}": v.clone() for part, ranges in parts.items() for name, v in ranges.items()}, partial
        )


def load_ranges(folder: Path, retriever: DualEncoder, reranker: CrossEncoder) -> None:
    """Give both models the ranges that lie in a bundle, if any do."""
    if not (folder / RANGES).exists():
        return
    encoders = {tower: retriever.tower(tower) for tower in TOWERS} | {"reranker": reranker.encoder}
    parts: dict[str, Ranges] = {}
    try:
        saved = load_file(folder / RANGES)
        for part, encoder in encoders.items():
            layers = range(encoder.config.num_hidden_layers)  # type: ignore[union-attr, arg-type]
            names = [f"{layer}.{product}" for layer in layers for product in PRODUCTS]
            parts[part] = {name: saved[f"{part}.{name}"] for name in names}
    except (OSError, SafetensorError, KeyError) as error:
        raise TandemError(f"{folder / RANGES} is damaged; remove it, and it is measured again.") from error
    if retriever.query_tower is retriever.passage_tower:
        parts["passage"] = parts["query"]
    retriever.ranges = {tower: parts[tower] for tower in TOWERS}
    reranker.ranges = parts["reranker"]


def _ranges(
    encoder: nn.Module,
    form: InputFormat,
    sequences: list[Ids],
    progress: "tqdm[Any]",
    segment_starts: list[int] | None = None,
) -> Ranges:
    def batches() -> Iterator[TokenBatch]:
        lengths = np.fromiter(map(len, sequences), np.int64, len(sequences))
        for rows in token_budget_batches(lengths, BUDGET):
            starts = None if segment_starts is None else [segment_starts[row] for row in rows]
            yield form.pad([sequences[row] for row in rows], starts).to(device_of(encoder))
            progress.update(len(rows))

    encoder.eval()
    ranges = measure_ranges(encoder, batches(), hidden_states)
    if not all(bool(values.isfinite().all()) for values in ranges.values()):
        raise TandemError(f"The encoder {encoder.name_or_path} computes what is not finite; train the model again.")
    return ranges


def _some(texts: Sequence[str], count: int) -> list[str]:
    """At most `count` of the texts, from all over them."""
    chosen = np.linspace(0, len(texts) - 1, min(count, len(texts))).astype(np.int64)
    return [texts[number] for number in chosen.tolist()]
