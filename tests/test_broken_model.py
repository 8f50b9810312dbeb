"""A model that gives what is no number is named, with the text that it gives it for."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_cli import fails

from tandemqa.data.dataset import load_dataset
from tandemqa.encoders.bundle import Bundle, save_bundle
from tandemqa.encoders.quantised import has_int8
from tandemqa.errors import TandemError
from tandemqa.index.dense import in_half
from tandemqa.index.index import Index
from tandemqa.index.vectors import passage_index
from tandemqa.search.searcher import Searcher

# Each stands in one question; the second in one passage, too.
ASKED, TOLD = "snowflake", "sugar"


def broken(folder: Path, encoder: Callable[[Bundle], Any], word: str) -> Bundle:
    """The bundle, with a model that gives what is not finite for every text with a word."""
    bundle = Bundle.load(folder)
    tokenizer = bundle.retriever.tokenizer
    with torch.no_grad():
        embeddings = encoder(bundle).get_input_embeddings()
        embeddings.weight[tokenizer.convert_tokens_to_ids(tokenizer.tokenize(word))] = torch.nan
    return bundle


def retriever(bundle: Bundle) -> Any:
    return bundle.retriever.query_tower


def reranker(bundle: Bundle) -> Any:
    return bundle.reranker.encoder


@pytest.fixture(scope="module")
def index(tiny_bundle: Path, tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Index:
    return Index.build(tiny_bundle, tiny_dataset, tmp_path_factory.mktemp("broken") / "index")


@pytest.fixture
def corpus(tiny_dataset: Path, tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    return Path(shutil.copy(tiny_dataset / "corpus.jsonl", tmp_path / "data")).parent


def test_a_passage_is_named_and_nothing_is_built(tiny_bundle: Path, corpus: Path, tmp_path: Path) -> None:
    bundle = broken(tiny_bundle, retriever, TOLD)
    named = f"The retriever {tiny_bundle}/retriever gives the passage 'insulin insulin lets cells take sugar from the"
    with pytest.raises(TandemError, match=named):
        Index.build(bundle, corpus, tmp_path / "index")
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_question_is_named_and_others_are_answered(index: Index, tiny_bundle: Path) -> None:
    searcher = Searcher(index, broken(tiny_bundle, retriever, ASKED))
    with pytest.raises(
        TandemError, match=r"retriever gives the query 'why has a snowflake six arms' a vector that is"
    ):
        searcher.search_many(["why are owls so quiet", "why has a snowflake six arms"])
    assert len(searcher.search("why are owls so quiet")) == 5


@pytest.mark.parametrize("mode", ["dense", "bm25", "hybrid"])
def test_a_pair_is_named(index: Index, tiny_bundle: Path, mode: Any) -> None:
    searcher = Searcher(index, broken(tiny_bundle, reranker, TOLD))
    named = "re-ranker .*/reranker gives the question 'owls and blood' with the passage 'insulin insulin lets cells"
    with pytest.raises(TandemError, match=named):
        searcher.search("owls and blood", depth=40, mode=mode)
    assert len(searcher.search("why are owls so quiet", depth=1, k=1)) == 1


@pytest.mark.parametrize(("encoder", "model"), [(retriever, "retriever"), (reranker, "re-ranker")])
def test_each_command_says_so_in_one_line(
    index: Index, tiny_bundle: Path, tiny_dataset: Path, tmp_path: Path, encoder: Callable[[Bundle], Any], model: str
) -> None:
    bundle = broken(tiny_bundle, encoder, TOLD)
    folder = save_bundle(tmp_path / "bundle", bundle.retriever, bundle.reranker, {}).folder
    named = f"The {model} {folder}/{model.replace('-', '')} gives the "
    line = fails("evaluate", folder, tiny_dataset, "-k", 40, "--run-dir", tmp_path / "runs")
    assert named in line and "sugar" in line and "that is not finite; train it again, or use another" in line
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    if model == "retriever":
        assert named in fails("index", folder, tiny_dataset, "--out", tmp_path / "index")
        assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.skipif(not has_int8(), reason="this processor has no AVX2")
@pytest.mark.parametrize("encoder", [retriever, reranker])
def test_nothing_is_calibrated_on_it(tiny_bundle: Path, encoder: Callable[[Bundle], Any], tmp_path: Path) -> None:
    bundle = broken(Path(shutil.copytree(tiny_bundle, tmp_path / "bundle")), encoder, TOLD)
    with pytest.raises(TandemError, match="not finite"):
        bundle.calibrate([], ["Insulin lets cells take sugar from the blood."])
    assert not (tmp_path / "bundle" / "int8.safetensors").exists()


def test_a_vector_beyond_half_precision_is_no_vector(
    tiny_bundle: Path, tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Bundle.load(tiny_bundle)
    monkeypatch.setenv("TANDEMQA_CACHE", str(tmp_path / "cache"))

    def far(texts: Any, side: str, **_: Any) -> Any:
        vectors = np.ones((len(texts), bundle.retriever.size), dtype=np.float32)
        vectors[2, 5] = 65_520 if side == "passage" else 1
        return vectors

    monkeypatch.setattr(bundle.retriever, "encode", far)
    for use in (
        lambda: Index.build(bundle, tiny_dataset, tmp_path / "index"),
        lambda: passage_index(bundle.retriever, load_dataset(tiny_dataset)),
    ):
        with pytest.raises(TandemError, match=r"passage 'Tides The pull of the moon.*not finite in half precision"):
            use()
    assert not (tmp_path / "index").exists() and not list(tmp_path.rglob("vectors/*/*.npy"))
    assert in_half(np.full((2, 3000), 60_000, dtype=np.float32)).max() == 60_000
