"""What was learnt on dev questions of how to search with a pair of models; kept in the bundle."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tandemqa.encoders.backbone import Precision
from tandemqa.encoders.bundle import MANIFEST, Bundle
from tandemqa.errors import TandemError
from tandemqa.index.dense import Kind
from tandemqa.search.candidates import Mode


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)


class Confidence(_Part):
    """How sure a final score makes that the first hit answers its question."""

    slope: float = Field(ge=0, description="confidence = 1 / (1 + exp(-(slope · score + offset))).")
    offset: float
    threshold: float = Field(ge=0, le=1, description="Below this confidence no good answer was found.")


class StoppingPoint(_Part):
    """What one value of the dial did on the dev questions."""

    stopping: float
    share: float = Field(description="Share of the candidates that the re-ranker read.")
    mrr: float = Field(description="MRR@10 of the ranking.")
    change: float = Field(description="Its relative change against reading all.")


class Stopping(_Part):
    """The chance that reading on matters, a logistic function of how the reading stands; see `search.stopping`."""

    best: float = Field(description="Slope on the best final score read.")
    own: float = Field(description="Slope on the similarity of that candidate, whatever its weight in the score.")
    lead: float = Field(description="Slope on its lead over the second.")
    ahead: float = Field(description="Slope on the largest similarity of what is left.")
    read: float = Field(description="Slope on the logarithm of how many are read.")
    offset: float
    step: int = Field(
        4, ge=1, description="Candidates read between two looks; bundles that do not say learnt with 4."
    )
    curve: list[StoppingPoint]


class Setting(_Part):
    """How to search where the caller does not say."""

    depth: int = Field(50, ge=0, description="Candidates that the re-ranker reads; 0 leaves them as they were found.")
    mode: Mode = "dense"
    stopping: float = Field(0.0, ge=0, le=1)


class Tuned(Setting):
    """The setting that `tune` chose, and what it was measured at: one question at a time, end to end."""

    vectors: Kind = Field(description="Structure of the index that it was measured over.")
    precision: Precision = Field(description="What the models of that index compute in.")
    passages: int
    split: str
    questions: int
    mrr: float = Field(description="MRR@10.")
    ndcg: float = Field(description="nDCG@10.")
    limit_ms: float = Field(description="What p95_ms may be at most; all in milliseconds.")
    p50_ms: float
    p95_ms: float
    k: int = Field(description="Hits asked for.")
    threads: int


class Learnt(_Part):
    """The settings of search that a bundle carries. Without dev questions, each at what needs no learning."""

    blend: float = Field(0.0, description="Weight of the retriever's score beside the re-ranker's.")
    fusion: float | None = Field(
        None, ge=0, le=1, description="Share of the retriever in a hybrid's weighted sum; none fuses by rank."
    )
    confidence: Confidence | None = None
    stopping: Stopping | None = None
    tuned: Tuned | None = None

    @property
    def setting(self) -> Setting:
        """How to search where the caller does not say."""
        return self.tuned or Setting()

    @classmethod
    def of(cls, bundle: Bundle) -> "Learnt":
        """What a bundle carries; nonsense in its manifest is a `TandemError`."""
        about: dict[str, Any] = {name: bundle.about[name] for name in cls.model_fields if name in bundle.about}
        try:
            return cls(**about)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"])
            raise TandemError(
                f"{bundle.folder / MANIFEST}: {field} is not valid ({first['msg']}); copy the bundle again."
            ) from error


def doubt(bundle: Bundle) -> str | None:
    """Why the bundle's re-ranker may rank worse than its retriever, and what to do; None where it was measured and
    does not, or `tune` chose how to search."""
    if bundle.about.get("tuned") is not None:
        return None
    metrics = bundle.about.get("metrics")
    if metrics is None:
        return (
            f"The re-ranker of {bundle.folder} was never measured on dev questions and may rank worse than the "
            "retriever alone (depth 0). Learn how to search with the two, and index again: tandemqa bundle "
            f"--retriever {bundle.folder} --reranker {bundle.folder} --out BUNDLE --data DATA"
        )
    reranked, retrieved = (metrics["stages"][stage]["mrr@10"]["mean"] for stage in ("re-ranked", "retriever after"))
    if reranked >= retrieved:
        return None
    return (
        f"On the dev questions re-ranking made the ranking of {bundle.folder} worse (MRR@10 {reranked:.3f}, that of "
        f"the retriever {retrieved:.3f}). Search with depth 0, or let `tandemqa tune` choose."
    )
