"""The bundle: whole or not there, and read by sentence-transformers to the same vectors and scores."""

import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder as TheirCrossEncoder
from sentence_transformers import SentenceTransformer

from tandemqa.encoders.bundle import Bundle, save_bundle
from tandemqa.encoders.cross import CrossEncoder, RerankerConfig
from tandemqa.encoders.dual import DualEncoder, RetrieverConfig
from tandemqa.errors import TandemError

# From a letter to far more tokens than any limit; in this order, neighbours pad each other.
TEXTS = [
    "a",
    "Owls fly without a sound.",
    "The moon raises the sea twice a day; the sun adds a smaller share. " * 3,
    "",
    "Sand, soda and lime!",
    "A function that calls itself needs a case in which it does not. " * 40,
    "東京 (Tokyo) was called Edo until 1868; naïve visitors to a café…",
    "why do prices rise",
]


def retriever(model: Path, **settings: object) -> DualEncoder:
    """A retriever whose towers, if it has two, differ."""
    encoder = DualEncoder.load(RetrieverConfig(model=str(model), **settings))  # type: ignore[arg-type]
    if encoder.passage_tower is not encoder.query_tower:
        torch.manual_seed(3)
        with torch.no_grad():
            for parameter in encoder.passage_tower.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
    return encoder


def reranker(model: Path, **settings: object) -> CrossEncoder:
    """A re-ranker whose linear layer is far from its start."""
    encoder = CrossEncoder.load(RerankerConfig(model=str(model), **settings))  # type: ignore[arg-type]
    torch.manual_seed(4)
    torch.nn.init.normal_(encoder.head.weight)
    torch.nn.init.constant_(encoder.head.bias, 0.5)
    return encoder


# sentence-transformers reads what we write


@pytest.mark.parametrize("towers", ["shared", "untied"])
@pytest.mark.parametrize("similarity", ["dot", "cosine"])
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_the_retriever_gives_the_vectors_of_sentence_transformers(
    tiny_model: Path, tmp_path: Path, pooling: str, similarity: str, towers: str
) -> None:
    ours = retriever(tiny_model, pooling=pooling, similarity=similarity, towers=towers)
    bundle = save_bundle(tmp_path / "bundle", ours, reranker(tiny_model), {})
    theirs = SentenceTransformer(str(bundle.folder / "retriever"), device="cpu")
    assert max(len(ids) for ids in ours.tokenize(TEXTS)) == 512, "some are cut by every tower"
    queries = TEXTS
    passages = ours.encode(ours.tokenize(TEXTS), "passage", precision="fp32")
    np.testing.assert_allclose(passages, theirs.encode_document(TEXTS), atol=1e-4)
    vectors = ours.encode(ours.tokenize(queries), "query", precision="fp32")
    np.testing.assert_allclose(vectors, theirs.encode_query(queries), atol=1e-4)
    scores = theirs.similarity(theirs.encode_query(queries), theirs.encode_document(TEXTS)).numpy()
    np.testing.assert_allclose(vectors @ passages.T, scores, rtol=1e-4, atol=1e-4)
    norms = np.linalg.norm(passages, axis=1)
    assert np.allclose(norms, 1, atol=1e-5) == (similarity == "cosine")
    if towers == "untied":
        assert np.abs(ours.encode(ours.tokenize(queries), "passage", precision="fp32") - vectors).max() > 0.01
    else:
        np.testing.assert_allclose(vectors, theirs.encode(queries), atol=1e-4)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("pair_length", [24, 33, 160, 512])
def test_the_reranker_gives_the_scores_of_sentence_transformers(
    tiny_model: Path, tmp_path: Path, pooling: str, pair_length: int
) -> None:
    ours = reranker(tiny_model, pooling=pooling, pair_length=pair_length)
    bundle = save_bundle(tmp_path / "bundle", retriever(tiny_model), ours, {})
    theirs = TheirCrossEncoder(str(bundle.folder / "reranker"), device="cpu")
    pairs = [(query, passage) for query in range(len(TEXTS)) for passage in range(len(TEXTS))]
    ids = ours.tokenize(TEXTS)
    assert max(len(ids[q]) + len(ids[p]) for q, p in pairs) > pair_length
    scores = ours.score(ids, ids, np.array(pairs), precision="fp32")
    expected = theirs.predict([(TEXTS[q], TEXTS[p]) for q, p in pairs])
    np.testing.assert_allclose(scores, expected, atol=1e-4)
    assert np.ptp(scores) > 0.5


def test_the_vectors_do_not_depend_on_the_batch(tiny_model: Path) -> None:
    ours = retriever(tiny_model)
    ids = ours.tokenize(TEXTS)
    together = ours.encode(ids, "passage", precision="fp32", token_budget=100_000)
    alone = ours.encode(ids, "passage", precision="fp32", token_budget=1)
    np.testing.assert_allclose(together, alone, atol=1e-5)


@pytest.mark.parametrize("towers", ["shared", "untied"])
def test_only_safetensors_hold_weights(tiny_model: Path, tmp_path: Path, towers: str) -> None:
    bundle = save_bundle(tmp_path / "bundle", retriever(tiny_model, towers=towers), reranker(tiny_model), {})
    names = [path for path in bundle.folder.rglob("*") if path.is_file()]
    weights = [path for path in names if path.suffix == ".safetensors"]
    assert len(weights) == (3 if towers == "shared" else 4)
    for path in set(names) - set(weights):
        assert path.suffix in (".json", ".txt", ".jinja"), path
        path.read_text(encoding="utf-8")


# Our own reading


@pytest.mark.parametrize("towers", ["shared", "untied"])
def test_a_bundle_that_was_moved_gives_the_same_vectors_and_scores(
    tiny_model: Path, tmp_path: Path, towers: str
) -> None:
    saved = save_bundle(
        tmp_path / "bundle",
        retriever(tiny_model, towers=towers, similarity="dot", pooling="cls", query_length=20),
        reranker(tiny_model, pooling="mean", pair_length=50),
        {"recipe": {"seed": 5}},
    )
    saved.folder.rename(tmp_path / "moved")
    read = Bundle.load(tmp_path / "moved")
    assert read.about == saved.about and read.about["recipe"] == {"seed": 5}
    ids = saved.retriever.tokenize(TEXTS)
    for tower in ("query", "passage"):
        np.testing.assert_array_equal(
            read.retriever.encode(ids, tower, precision="fp32"),  # type: ignore[arg-type]
            saved.retriever.encode(ids, tower, precision="fp32"),  # type: ignore[arg-type]
        )
    pairs = np.array([(0, 1), (2, 5), (7, 3)])
    np.testing.assert_array_equal(
        read.reranker.score(ids, ids, pairs, precision="fp32"),
        saved.reranker.score(ids, ids, pairs, precision="fp32"),
    )


def test_the_fingerprint_tells_weights_apart(tiny_model: Path, tmp_path: Path) -> None:
    model = retriever(tiny_model)
    first = save_bundle(tmp_path / "first", model, reranker(tiny_model), {})
    again = save_bundle(tmp_path / "again", model, reranker(tiny_model), {"recipe": {"seed": 2}})
    with torch.no_grad():
        next(model.query_tower.parameters())[0, 0] += 1e-3
    other = save_bundle(tmp_path / "other", model, reranker(tiny_model), {})
    assert first.fingerprint == again.fingerprint != other.fingerprint


# What is wrong with it


def test_a_missing_file_is_named(tiny_bundle: Path, tmp_path: Path) -> None:
    for name in json.loads((tiny_bundle / "tandem.json").read_text())["files"]:
        copy = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle", dirs_exist_ok=True))
        (copy / name).unlink()
        with pytest.raises(TandemError, match=f"{name} is missing; copy it again"):
            Bundle.load(copy)


def test_a_truncated_file_is_named(tiny_bundle: Path, tmp_path: Path) -> None:
    for name, size in json.loads((tiny_bundle / "tandem.json").read_text())["files"].items():
        copy = Path(shutil.copytree(tiny_bundle, tmp_path / name.replace("/", "-")))
        os.truncate(copy / name, size // 2)
        with pytest.raises(TandemError, match=f"{name} has {size // 2} bytes"):
            Bundle.load(copy)


@pytest.mark.parametrize(
    "name",
    [
        "retriever/model.safetensors",
        "reranker/model.safetensors",
        "reranker/2_Dense/model.safetensors",
        "retriever/config.json",
        "retriever/tokenizer.json",
    ],
)
def test_a_file_of_the_right_size_and_wrong_content_is_one_error(
    tiny_bundle: Path, tmp_path: Path, name: str
) -> None:
    copy = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    (copy / name).write_bytes(b"\x07" * (copy / name).stat().st_size)
    with pytest.raises(TandemError):
        Bundle.load(copy)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"tandem\.json is not valid JSON"),
        ("[]", r"tandem\.json lists no files"),
        ('{"format": 1, "files": {}}', "does not describe both models"),
        (
            '{"format": 1, "files": {}, "retriever": {"poling": "cls"}, "reranker": {}}',
            "does not describe both models",
        ),
    ],
)
def test_a_manifest_that_is_not_ours_is_refused(
    tiny_bundle: Path, tmp_path: Path, content: str, message: str
) -> None:
    copy = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    (copy / "tandem.json").write_text(content)
    with pytest.raises(TandemError, match=message):
        Bundle.load(copy)


def test_a_folder_that_is_no_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TandemError, match="nowhere does not exist"):
        Bundle.load(tmp_path / "nowhere")
    with pytest.raises(TandemError, match="is not a bundle"):
        Bundle.load(tmp_path)


@pytest.mark.parametrize(
    ("failure", "raised", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), TandemError, "The disk is full"),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
    ],
    ids=["full disk", "interrupt"],
)
@pytest.mark.parametrize("before", [False, True], ids=["first", "over an old one"])
def test_nothing_is_written_when_saving_fails_midway(
    tiny_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    before: bool,
    failure: BaseException,
    raised: type[BaseException],
    message: str | None,
) -> None:
    bundle = Bundle.load(tiny_bundle)
    if before:
        shutil.copytree(tiny_bundle, tmp_path / "bundle")

    def fail(self: CrossEncoder, folder: Path) -> None:
        assert (folder.parent / "retriever" / "model.safetensors").exists()  # midway indeed
        raise failure

    with monkeypatch.context() as patch:
        patch.setattr(CrossEncoder, "save", fail)
        with pytest.raises(raised, match=message):
            save_bundle(tmp_path / "bundle", bundle.retriever, bundle.reranker, {"recipe": "new"})
    assert [path.name for path in tmp_path.iterdir()] == (["bundle"] if before else [])
    if before:
        assert Bundle.load(tmp_path / "bundle").about == bundle.about
