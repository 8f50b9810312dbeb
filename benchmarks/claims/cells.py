"""The cells: recipes that differ from the reference in one thing each, and what they are held against."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

Kind = Literal["trained", "first stage", "sentence-transformers"]

# The reference, cell `dynamic`: the recipe `quick` with the paper's loss. No retriever's loss of its own, as there.
# Texts are cut at half of its lengths, which halves the time of a cell.
RECIPE = "quick"
LENGTHS = ("retriever.passage_length=64", "reranker.pair_length=80")
REFERENCE = (*LENGTHS, "loss.retriever_weight=0", "lists.depth=30", "evaluation.split=null")
STEPS = 100
DEPTH = 20  # candidates that are re-ranked
METRIC = "mrr@10"  # what verdicts go by

STATIC = ("loss.reranker_weight=0", "loss.kl_reranker_gradient=false")
NONE = ("loss.kl_weight=0", "loss.retriever_weight=1")
SUPERVISED = ("loss.retriever_weight=1",)
# A quarter of the warm-up's lists; {strong} is a re-ranker warmed on all questions.
WEAK = ("warm_reranker.epochs=0.25",)
STRONG = ("reranker.model={strong}/reranker", "warm_reranker.epochs=0")
# The retriever's warm-up eight times as long: a minute and a half of the budget.
WARMER = ("warm_retriever.epochs=8",)
# And four passes over the re-ranker's lists, so that the teacher knows more than its student.
TAUGHT = (*WARMER, "warm_reranker.epochs=4")
# As many lists as in four passes, but of other negatives each time.
VARIED = (*WARMER, "warm_lists.per_query=4")
OTHER = ("reranker.model={other}",)
UNLABELLED = ("data.unlabelled={unlabelled}", "lists.depth=15")
# Lists of all sizes from the same candidates, in fewer steps than the reference makes, for those of 64 are long.
LISTS = ("lists.depth=100",)
LIST_STEPS = 0.32


@dataclass(frozen=True)
class Cell:
    """A training run, or what needs none.

    settings: what differs from the reference, as `--set` takes it; `{name}` is the bundle of the cell `name` with the
    same seed, `{other}` the other backbone, `{half}` half the steps, `{unlabelled}` the questions without labels.
    steps: of the joint training, in those of the reference. after: cells that must be there before it, beside those
    that the settings name. main: whether it comes first. seeded: whether a seed makes a difference.
    """

    name: str
    what: str
    settings: tuple[str, ...] = ()
    steps: float = 1.0
    kind: Kind = "trained"
    after: tuple[str, ...] = ()
    main: bool = False
    seeded: bool = True


CELLS = {
    cell.name: cell
    for cell in (
        Cell("dynamic", "the reference: both models learn from each other, as in the paper", main=True),
        Cell("static", "the re-ranker stays as it was warmed up", STATIC, main=True),
        Cell("none", "no distillation: each model alone, with its own loss, on the same lists", NONE, main=True),
        Cell("supervised", "dynamic, and the retriever's own loss too", SUPERVISED, main=True),
        Cell("pointwise", "the re-ranker's loss is pointwise, in the warm-up too", ("loss.reranker_loss=pointwise",),
             main=True),
        Cell("share-0.5", "half of the lists denoised, the paper's hybrid", ("lists.denoised_share=0.5",),
             main=True),
        Cell("share-1", "all lists denoised", ("lists.denoised_share=1",), main=True),
        *(Cell(f"lists-{size}", f"lists of {size}", (*LISTS, f"lists.size={size}"), LIST_STEPS, main=True)
          for size in (4, 8, 16, 32, 64)),
        *(Cell(f"time-{size}", f"lists of {size}, as many passages in all as `lists-16`",
               (*LISTS, f"lists.size={size}"), LIST_STEPS * 16 / size, main=True)
          for size in (4, 8, 32, 64)),
        Cell("warm", "the warm-ups alone", steps=0, main=True),
        Cell("st", "sentence-transformers: negatives mined once, retriever, then cross-encoder, in the time of "
             "`dynamic`", kind="sentence-transformers", after=("dynamic",), main=True),
        Cell("st-mined-twice", "the same, negatives mined again for the cross-encoder, by the trained retriever",
             kind="sentence-transformers", after=("dynamic",), main=True),
        Cell("st-mined-after", "the same, the retriever trained without, and negatives mined by it for the "
             "cross-encoder", kind="sentence-transformers", after=("dynamic",), main=True),
        Cell("base", "the backbone, untouched", kind="first stage", main=True, seeded=False),
        Cell("bm25", "BM25", kind="first stage", main=True, seeded=False),
        Cell("hybrid", "the backbone and BM25, fused by rank", kind="first stage", main=True, seeded=False),
        # The two models
        Cell("static-trained", "the re-ranker is trained alone first (`none`), then stays",
             (*STATIC, "reranker.model={none}/reranker", "warm_reranker.epochs=0")),
        Cell("no-kl-gradient", "the divergence does not reach the re-ranker", ("loss.kl_reranker_gradient=false",)),
        Cell("reverse-kl", "KL(re-ranker ‖ retriever)", ("loss.kl_direction=reranker_retriever",)),
        Cell("mean-kl", "the divergence is a mean over the list", ("loss.kl_reduction=mean",)),
        Cell("reference-code", "the three choices of the reference code",
             ("loss.kl_direction=reranker_retriever", "loss.kl_reduction=mean", "loss.kl_reranker_gradient=false")),
        Cell("other-teacher", "the re-ranker is the other backbone", OTHER),
        Cell("other-teacher-none", "the re-ranker is the other backbone; no distillation", (*OTHER, *NONE)),
        # The re-ranker's strength; `dynamic`, `static` and `none` stand between
        Cell("weak-dynamic", "re-ranker warmed on a quarter of the questions", WEAK),
        Cell("weak-static", "the same, and it stays so", (*WEAK, *STATIC)),
        Cell("weak-none", "the same, no distillation", (*WEAK, *NONE)),
        Cell("strong", "no joint training; re-ranker warmed on all questions of the set",
             ("retriever.model={warm}/retriever", "warm_retriever.epochs=0", "data.questions=null"), steps=0),
        Cell("strong-dynamic", "re-ranker warmed on all questions of the set", STRONG),
        Cell("strong-static", "the same, and it stays so", (*STRONG, *STATIC)),
        Cell("strong-none", "the same, no distillation", (*STRONG, *NONE)),
        # Warm start, fresh negatives, rounds, pseudo-labels
        Cell("cold", "no warm-ups", ("warm_retriever.epochs=0", "warm_reranker.epochs=0")),
        Cell("cold-longer", "no warm-ups, their time given to the joint training",
             ("warm_retriever.epochs=0", "warm_reranker.epochs=0"), steps=1.45),
        Cell("refresh", "negatives mined again after half of the steps", ("refresh_steps={half}",)),
        Cell("rounds", "two rounds of half the steps", ("rounds=2",), steps=0.5),
        Cell("pseudo-labels", "unlabelled questions join by pseudo-labels", UNLABELLED),
        Cell("no-pseudo-labels", "the same candidates, no pseudo-labels", (*UNLABELLED, "lists.high=1")),
        # Remedies
        Cell("supervised-static", "static, and the retriever's own loss", (*SUPERVISED, *STATIC)),
        Cell("supervised-share-0.5", "hybrid lists, and the retriever's own loss",
             (*SUPERVISED, "lists.denoised_share=0.5")),
        Cell("warmer", "no joint training; the retriever's warm-up is eight times as long", WARMER, steps=0),
        Cell("warmer-dynamic", "the warm-up eight times as long", WARMER),
        Cell("warmer-static", "the warm-up eight times as long, static", (*WARMER, *STATIC)),
        Cell("warmer-none", "the warm-up eight times as long, no distillation", (*WARMER, *NONE)),
        Cell("warmer-supervised", "the warm-up eight times as long, and the retriever's own loss",
             (*WARMER, *SUPERVISED)),
        Cell("warmer-half", "the same in half the steps, which is about the time of `dynamic`",
             (*WARMER, *SUPERVISED), steps=0.5),
        Cell("taught", "no joint training; the retriever's warm-up eight times as long, the re-ranker's four times",
             TAUGHT, steps=0),
        Cell("taught-dynamic", "both warm-ups as in `taught`", TAUGHT),
        Cell("taught-static", "both warm-ups as in `taught`, static", (*TAUGHT, *STATIC)),
        Cell("taught-none", "both warm-ups as in `taught`, no distillation", (*TAUGHT, *NONE)),
        Cell("taught-supervised", "both warm-ups as in `taught`, and the retriever's own loss",
             (*TAUGHT, *SUPERVISED)),
        Cell("varied-none", "as `taught-none`, but for other negatives in each of the re-ranker's four passes",
             (*VARIED, *NONE)),
        Cell("varied-supervised", "as `taught-supervised`, but for other negatives in each of the four passes",
             (*VARIED, *SUPERVISED)),
        Cell("temperature-0.02", "retriever's temperature 0.02", ("loss.retriever_temperature=0.02",)),
        Cell("temperature-0.1", "retriever's temperature 0.1", ("loss.retriever_temperature=0.1",)),
        Cell("none-temperature-0.02", "no distillation, temperature 0.02",
             (*NONE, "loss.retriever_temperature=0.02")),
        Cell("none-temperature-0.1", "no distillation, temperature 0.1", (*NONE, "loss.retriever_temperature=0.1")),
        Cell("fast", "three times the retriever's rate", ("joint.retriever_rate=9e-5",)),
        Cell("none-fast", "no distillation, three times the retriever's rate", (*NONE, "joint.retriever_rate=9e-5")),
        Cell("long", "twice the lists and twice the steps", ("lists.per_query=2",), steps=2),
        Cell("none-long", "no distillation, twice the lists and twice the steps", (*NONE, "lists.per_query=2"),
             steps=2),
    )
}  # fmt: skip


@dataclass(frozen=True)
class DataSet:
    """How much of a set is used: training questions, further ones without labels, dev questions measured on."""

    questions: int
    unlabelled: int
    dev: int
    note: str = ""


SETS = {
    "medquad": DataSet(1000, 1000, 600),
    "scifact": DataSet(500, 200, 98),
    "squad-small": DataSet(
        1000, 1000, 600, "The base model was itself trained on SQuAD, so these figures are contaminated."
    ),
}
# For --smoke: a part of a set, and texts cut short.
SMOKE = DataSet(20, 8, 12)
SMOKE_PASSAGES, SMOKE_STEPS = 200, 2
SMOKE_SETTINGS = ("retriever.passage_length=24", "reranker.pair_length=32")

BACKBONES = {"three": "the first three layers of all-MiniLM-L6-v2", "base": "all-MiniLM-L6-v2, six layers"}


class Job(NamedTuple):
    """A cell with a seed."""

    cell: Cell
    seed: int

    @property
    def name(self) -> str:
        return f"{self.cell.name}-{self.seed}"

    @property
    def needs(self) -> "list[Job]":
        """What must be there before."""
        others = [CELLS[name] for name in needed(self.cell)]
        return [Job(other, self.seed if other.seeded else 0) for other in others]


def started_from(cell: Cell) -> tuple[str, ...]:
    """The cells whose bundles this one starts from."""
    return tuple(name for name in CELLS if any(f"{{{name}}}" in setting for setting in cell.settings))


def needed(cell: Cell) -> tuple[str, ...]:
    """The cells that must be there before this one."""
    return (*started_from(cell), *cell.after)


def bundles() -> set[str]:
    """The cells whose bundles others start from."""
    return {name for cell in CELLS.values() for name in started_from(cell)}


def queue(names: Collection[str], seeds: Sequence[int]) -> list[Job]:
    """What to run, in order: a seed after the other, main cells first, each behind those that it needs."""
    jobs: dict[Job, None] = {}

    def add(job: Job) -> None:
        for other in job.needs:
            add(other)
        jobs.setdefault(job)

    for seed in seeds:
        for cell in _main_first(names):
            add(Job(cell, seed if cell.seeded else 0))
    return list(jobs)


def _main_first(names: Collection[str]) -> Iterator[Cell]:
    yield from sorted((CELLS[name] for name in CELLS if name in names), key=lambda cell: not cell.main)
