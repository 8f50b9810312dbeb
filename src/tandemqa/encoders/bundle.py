"""The bundle: a retriever and a re-ranker in one folder, with what is known of them."""

import datetime
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

import tandemqa
from tandemqa.encoders import calibration
from tandemqa.encoders.backbone import Precision
from tandemqa.encoders.cross import CrossEncoder, RerankerConfig
from tandemqa.encoders.dual import DualEncoder, RetrieverConfig
from tandemqa.encoders.layout import MANIFEST as MANIFEST
from tandemqa.encoders.quantised import ranges_fingerprint
from tandemqa.errors import TandemError
from tandemqa.files import fingerprint, read_json, whole_folder, write_json

FORMAT = 1


@dataclass
class Bundle:
    """`retriever/`, `reranker/` and `tandem.json` (versions, recipe, data fingerprint, metrics, file sizes).

    `about` is the content of `tandem.json`; its `fingerprint` identifies weights and settings.
    """

    folder: Path
    retriever: DualEncoder
    reranker: CrossEncoder
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        return str(self.about["fingerprint"])

    @classmethod
    def load(cls, path: str | Path) -> "Bundle":
        """Read a bundle, or the bundle of a training run; what is missing or truncated is named."""
        folder, about = check_bundle(path)
        try:
            retriever = RetrieverConfig(**about["retriever"])
            reranker = RerankerConfig(**about["reranker"])
        except (KeyError, TypeError, ValidationError) as error:
            raise TandemError(f"{folder / MANIFEST} does not describe both models; copy the bundle again.") from error
        bundle = cls(
            folder,
            DualEncoder.load(retriever.model_copy(update={"model": str(folder / "retriever")})),
            CrossEncoder.load(reranker.model_copy(update={"model": str(folder / "reranker")})),
            about,
        )
        calibration.load_ranges(folder, bundle.retriever, bundle.reranker)
        return bundle

    def at(self, precision: Precision) -> "Bundle":
        """The same pair, weights shared, that computes in `precision`; for "int8" it must be calibrated."""
        if precision == "int8":
            calibration.check_models(self.retriever, self.reranker)
            if not self.calibrated:
                raise TandemError(
                    f"The bundle {self.folder} is not calibrated for int8: it holds no int8.safetensors; "
                    "build an index with --precision int8, or call Bundle.calibrate."
                )
        if self.retriever.precision == self.reranker.precision == precision:
            return self
        return replace(self, retriever=self.retriever.at(precision), reranker=self.reranker.at(precision))

    @property
    def calibrated(self) -> bool:
        """Whether both models can compute in int8."""
        return self.reranker.ranges is not None

    @property
    def calibration(self) -> str | None:
        """What identifies the ranges of the retriever's passages where it computes in int8; else None."""
        return ranges_fingerprint(self.retriever.ranges["passage"]) if self.retriever.precision == "int8" else None

    def calibrate(self, questions: Sequence[str], passages: Sequence[str]) -> None:
        """Measure what int8 needs to know of both models, on a few hundred texts of the kind that they will read, and
        keep it in the bundle's folder (`int8.safetensors`). `questions` may be empty."""
        calibration.calibrate(self.retriever, self.reranker, questions, passages)
        calibration.save_ranges(self.folder, self.retriever, self.reranker)

    def remember(self, **parts: Any) -> None:
        """Write what was learnt of the pair into its manifest, in the place of parts with the same names.

        The fingerprint, by which an index knows its bundle, is that of the models, and stays.
        """
        self.about = read_json(self.folder / MANIFEST) | parts
        write_json(self.folder / MANIFEST, self.about)


def save_bundle(folder: Path, retriever: DualEncoder, reranker: CrossEncoder, about: dict[str, Any]) -> Bundle:
    """Write a bundle whole or not at all; `about` adds recipe, data and metrics to `tandem.json`."""
    import torch
    import transformers

    with whole_folder(folder) as partial:
        retriever.save(partial / "retriever")
        reranker.save(partial / "reranker")
        files = sorted(path for path in partial.rglob("*") if path.is_file())
        complete = {
            "format": FORMAT,
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "versions": {
                "tandemqa": tandemqa.__version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            "fingerprint": fingerprint(*files),
            "retriever": retriever.config.model_dump(),
            "reranker": reranker.config.model_dump(),
            **about,
            "files": {str(path.relative_to(partial)): path.stat().st_size for path in files},
        }
        write_json(partial / MANIFEST, complete)
    return Bundle(folder, retriever, reranker, complete)


def check_bundle(path: str | Path) -> tuple[Path, dict[str, Any]]:
    """The bundle folder at `path` (itself, or `bundle/` inside a run) and its manifest; every file is checked."""
    given = Path(path)
    if not given.exists():
        raise TandemError(f"{given} does not exist; name the folder that `tandemqa train --out` wrote.")
    folder = given if (given / MANIFEST).exists() else given / "bundle"
    if not (folder / MANIFEST).exists():
        raise TandemError(
            f"{given} is not a bundle: it holds no {MANIFEST}; name a folder written by `tandemqa train`."
        )
    about = read_json(folder / MANIFEST)
    if not isinstance(about, dict) or not isinstance(about.get("files"), dict):
        raise TandemError(f"{folder / MANIFEST} lists no files; copy the bundle again.")
    if about.get("format") != FORMAT:
        raise TandemError(f"{folder / MANIFEST} has format {about.get('format')}, not {FORMAT}; train again.")
    for name, size in about["files"].items():
        file = folder / name
        if not file.exists():
            raise TandemError(f"The bundle {folder} is incomplete: {name} is missing; copy it again.")
        if file.stat().st_size != size:
            raise TandemError(
                f"The bundle {folder} is damaged: {name} has {file.stat().st_size} bytes, not {size}; copy it again."
            )
    return folder, about
