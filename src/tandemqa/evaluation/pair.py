"""Two models, wherever they were trained, as a bundle; measured on dev questions if there are any."""

from pathlib import Path
from typing import Any

from tandemqa.data.dataset import Dataset, load_dataset
from tandemqa.encoders.bundle import MANIFEST, Bundle, save_bundle
from tandemqa.encoders.foreign import read_reranker, read_retriever
from tandemqa.errors import TandemError
from tandemqa.evaluation.stages import rank_stages


def make_bundle(
    retriever: str,
    reranker: str,
    out: str | Path,
    dataset: Dataset | str | Path | None = None,
    split: str = "dev",
    k: int = 50,
    query_prompt: str | None = None,
    passage_prompt: str | None = None,
) -> Bundle:
    """Write the bundle `out` of two models (see `encoders.foreign` for what can be read).

    Prompts, if given, take the place of the retriever's own. With a dataset, the pair ranks the questions of `split`,
    the re-ranker the retriever's top `k`; what is learnt of them (`search.learnt`) and the figures go into the
    bundle. A folder at `out` that is no bundle is a `TandemError`.
    """
    place = Path(out).resolve()
    if place.exists() and not (place / MANIFEST).exists():
        raise TandemError(f"{out} exists and is not a bundle; choose another place for --out.")
    if dataset is not None and not isinstance(dataset, Dataset):
        dataset = load_dataset(dataset)
    pair = Bundle(place, read_retriever(retriever, query_prompt, passage_prompt), read_reranker(reranker))
    about: dict[str, Any] = {"sources": {"retriever": retriever, "reranker": reranker}}
    if dataset is not None:
        rankings = rank_stages(pair, dataset, split, k)
        learnt = rankings.learn()
        about["data"] = {"path": str(dataset.folder.resolve()), "fingerprint": dataset.fingerprint}
        about |= learnt.model_dump() | {"metrics": rankings.report(learnt).as_json()}
    return save_bundle(place, pair.retriever, pair.reranker, about)
