"""The index: what it holds, and that it is whole or not there."""

import errno
import json
import os
import resource
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tandemqa.data.dataset import load_dataset
from tandemqa.encoders.bundle import Bundle, save_bundle
from tandemqa.errors import TandemError
from tandemqa.index.index import Index, describe_index
from tandemqa.index.lock import only_writer
from tandemqa.index.vectors import passage_index


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.load(tiny_bundle)


@pytest.fixture(scope="module")
def built(bundle: Bundle, tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Index.build(bundle, tiny_dataset, tmp_path_factory.mktemp("index") / "index").folder


@pytest.fixture
def index_copy(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "index"))


def other_bundle(bundle: Bundle, folder: Path) -> Bundle:
    """The same models after a training step of a kind: one weight differs."""
    changed = Bundle.load(bundle.folder)
    changed.reranker.head.bias.data += 1
    return save_bundle(folder, changed.retriever, changed.reranker, {})


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"vectors": "flat"}, "vectors is 'flat'; choose one of auto, exact, ivf, hnsw"),
        ({"storage": "fp32"}, "storage is 'fp32'; choose one of auto, fp16, int8"),
        ({"precision": "bf16"}, "precision is 'bf16'; choose one of auto, fp32, int8"),
    ],
)
def test_a_choice_that_there_is_not_is_named_before_anything_is_done(
    bundle: Bundle, tiny_dataset: Path, tmp_path: Path, choice: dict[str, Any], message: str
) -> None:
    with pytest.raises(TandemError, match=message):
        Index.build(bundle, tiny_dataset, tmp_path / "index", **choice)
    assert not list(tmp_path.iterdir())


# What an index holds


def test_row_i_is_passage_i_in_each_part(bundle: Bundle, built: Path, tiny_dataset: Path) -> None:
    index = Index.open(built)
    passages = list(load_dataset(tiny_dataset).passages)
    (segment,) = index.segments
    assert len(index) == len(segment) == len(segment.vectors) == len(index.tokens) == len(passages)
    assert index.passages.rows(range(len(passages))) == passages and list(index.passages.ids()) == [
        passage.id for passage in passages
    ]
    for row, expected in enumerate(bundle.reranker.tokenize([passage.full for passage in passages])):
        assert index.tokens[row].tolist() == expected.tolist()
    vectors = bundle.retriever.encode(bundle.retriever.tokenize([p.full for p in passages]), "passage")
    for row, vector in enumerate(vectors):
        np.testing.assert_allclose(segment.vectors.vectors(np.array([row]))[0], vector, atol=1e-2)
    assert index.search_words(["Sicilian Defence"], 1)[0].tolist() == [[7]]


def test_its_manifest_tells_data_models_and_sizes(bundle: Bundle, built: Path, tiny_dataset: Path) -> None:
    about = json.loads((built / "index.json").read_text())
    assert about["format"] == 2 and (about["vectors"], about["storage"]) == ("auto", "auto")
    assert about["data"]["fingerprint"] == load_dataset(tiny_dataset).passages.fingerprint
    assert about["bundle"]["fingerprint"] == bundle.fingerprint
    assert (built / about["bundle"]["path"]).resolve() == bundle.folder.resolve()
    described = describe_index(built)
    assert described["passages"] == 40 and described["generation"] == 0
    on_disk = {str(p.relative_to(built)): p.stat().st_size for p in built.rglob("*") if p.is_file()}
    (segment,) = described["segments"].values()
    assert segment["vectors"] == {"kind": "exact", "storage": "fp16", "size": bundle.retriever.size}
    assert segment["recall"] == {
        "recall@40": 1.0,
        "queries": 38,
        "sampled from": "questions",
        "exact search over": "vectors as encoded",
    }
    # What SQLite keeps beside its file comes and goes with its readers.
    beside = {"write.lock", "passages.sqlite-wal", "passages.sqlite-shm"}
    assert set(on_disk) - set(described["files"]) - beside == {
        f"segments/{n}/segment.json" for n in described["segments"]
    }
    assert described["files"].items() <= on_disk.items()


def test_it_stands_without_the_cache(
    bundle: Bundle, tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TANDEMQA_CACHE", str(tmp_path / "cache"))
    index = Index.build(bundle, tiny_dataset, tmp_path / "index")
    expected = [index.tokens[row].tolist() for row in range(40)]
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    again = Index.open(tmp_path / "index")
    assert [again.tokens[row].tolist() for row in range(40)] == expected


def test_a_corpus_alone_is_enough(bundle: Bundle, tiny_dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    shutil.copy(tiny_dataset / "corpus.jsonl", tmp_path / "data")
    index = Index.build(bundle, tmp_path / "data", tmp_path / "index")
    assert len(index) == 40 and index.segments[0].about["recall"]["sampled from"] == "passages"


def test_vectors_that_training_has_encoded_are_not_encoded_again(
    bundle: Bundle, tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TANDEMQA_CACHE", str(tmp_path / "cache"))
    expected = passage_index(bundle.retriever, load_dataset(tiny_dataset)).vectors(np.arange(40))
    encoded: list[str] = []
    encode = bundle.retriever.encode
    monkeypatch.setattr(bundle.retriever, "encode", lambda t, side, **o: encoded.append(side) or encode(t, side, **o))
    index = Index.build(bundle, tiny_dataset, tmp_path / "index")
    assert set(encoded) == {"query"}  # the questions that recall is measured with
    np.testing.assert_array_equal(index.segments[0].vectors.vectors(np.arange(40)), expected)


@pytest.mark.parametrize("vectors", ["exact", "ivf", "hnsw"])
@pytest.mark.parametrize("storage", ["fp16", "int8"])
def test_each_structure_finds_what_its_manifest_promises(
    bundle: Bundle, tiny_dataset: Path, tmp_path: Path, vectors: Any, storage: Any
) -> None:
    index = Index.build(bundle, tiny_dataset, tmp_path / "index", vectors, storage)
    about = index.segments[0].about
    assert (about["vectors"]["kind"], about["vectors"]["storage"]) == (vectors, storage)
    assert about["recall"]["recall@40"] >= (1.0 if storage == "fp16" else 0.9)
    queries = bundle.retriever.encode(bundle.retriever.tokenize(["owls", "why do prices rise"]), "query")
    rows, scores = index.search_vectors(queries, 50)
    assert rows.shape == scores.shape == (2, 50) and rows.dtype == np.int32 and scores.dtype == np.float32
    assert sorted(rows[0, :40].tolist()) == list(range(40)) and (rows[:, 40:] == -1).all()
    assert np.isneginf(scores[:, 40:]).all() and (np.diff(scores[:, :40]) <= 0).all()


@pytest.mark.parametrize("vectors", ["exact", "ivf", "hnsw"])
def test_a_corpus_of_more_shards_than_file_handles(
    bundle: Bundle, tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vectors: Any
) -> None:
    monkeypatch.setenv("TANDEMQA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("tandemqa.index.segment.SHARD", 1)
    monkeypatch.setattr("tandemqa.index.vectors.SHARD", 1)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    dataset = load_dataset(tiny_dataset)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/proc/self/fd").iterdir())) + 25, hard))
    try:
        encoded = passage_index(bundle.retriever, dataset)
        index = Index.build(bundle, dataset, tmp_path / "index", vectors, "fp16")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    rows = np.arange(40)
    np.testing.assert_array_equal(index.vectors_of(rows.astype(np.int32)), encoded.vectors(rows))
    expected = bundle.reranker.tokenize([passage.full for passage in dataset.passages])
    assert [index.tokens[row].tolist() for row in rows.tolist()] == [ids.tolist() for ids in expected]


# What it replaces


def test_a_new_index_replaces_an_old_one(bundle: Bundle, tiny_dataset: Path, index_copy: Path) -> None:
    (index_copy / "index.json").write_text("{")  # even one that is damaged
    assert len(Index.build(bundle, tiny_dataset, index_copy)) == 40
    assert [path.name for path in index_copy.parent.iterdir()] == ["index"]


def test_an_index_whose_replacement_was_killed_between_two_renames_is_put_back(
    bundle: Bundle, tiny_dataset: Path, index_copy: Path
) -> None:
    for again in (Index.open, lambda folder: Index.build(bundle, tiny_dataset, folder)):
        index_copy.rename(index_copy.with_name(".index.0a1b2c3d.old"))
        assert len(again(index_copy)) == 40
        assert [path.name for path in index_copy.parent.iterdir()] == ["index"]


def test_an_empty_folder_is_free(bundle: Bundle, tiny_dataset: Path, tmp_path: Path) -> None:
    assert len(Index.build(bundle, tiny_dataset, tmp_path)) == 40


@pytest.mark.parametrize("names", [["segments"], ["tokens"], ["bm25"], ["segments", "tokens", "bm25"]])
def test_a_folder_with_the_names_of_an_index_alone_is_never_replaced(
    bundle: Bundle, tiny_dataset: Path, tmp_path: Path, names: list[str]
) -> None:
    for name in names:
        (tmp_path / "own" / name).mkdir(parents=True)
        (tmp_path / "own" / name / "thesis.tex").write_text("years of work")
    with pytest.raises(TandemError, match="is not an index; choose another place"):
        Index.build(bundle, tiny_dataset, tmp_path / "own")
    assert {path.read_text() for path in (tmp_path / "own").rglob("*.tex")} == {"years of work"}
    assert {path.name for path in (tmp_path / "own").iterdir()} == set(names)


@pytest.mark.parametrize("name", ["thesis.tex", ".hidden"])
def test_a_folder_with_anything_else_is_never_replaced(
    bundle: Bundle, tiny_dataset: Path, index_copy: Path, name: str
) -> None:
    own = index_copy / name
    own.write_text("years of work")
    with pytest.raises(TandemError, match="is not an index; choose another place"):
        Index.build(bundle, tiny_dataset, index_copy)
    assert own.read_text() == "years of work" and len(Index.open(index_copy)) == 40


@pytest.mark.parametrize("name", ["file", "index.json"])
def test_a_file_is_never_replaced(bundle: Bundle, tiny_dataset: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("years of work")
    with pytest.raises(TandemError, match=f"{name} exists and is not an index"):
        Index.build(bundle, tiny_dataset, tmp_path / name)
    assert (tmp_path / name).read_text() == "years of work"


# What is wrong with it


def test_a_missing_file_is_named(built: Path, tmp_path: Path) -> None:
    for name in describe_index(built)["files"]:
        copy = shutil.copytree(built, tmp_path / name.replace("/", "-"))
        (copy / name).unlink()
        with pytest.raises(TandemError, match=r"(missing|holds no|lacks its segment)") as raised:
            Index.open(copy)
        assert Path(name).name in str(raised.value)


def test_a_truncated_file_is_named(built: Path, tmp_path: Path) -> None:
    for name, size in describe_index(built)["files"].items():
        if name != "index.json":
            copy = Path(shutil.copytree(built, tmp_path / name.replace("/", "-")))
            os.truncate(copy / name, size - 1)
            with pytest.raises(TandemError, match=rf"{Path(name).name}.* has {size - 1} bytes instead of {size}"):
                Index.open(copy)


@pytest.mark.parametrize("name", ["vectors.faiss", "rows.npy", "passages.sqlite", "data.csc.index.npy"])
def test_a_file_of_the_right_size_and_wrong_content_is_named(index_copy: Path, name: str) -> None:
    (path,) = index_copy.rglob(name)
    path.write_bytes(b"\x07" * path.stat().st_size)
    with pytest.raises(TandemError, match=r"damaged.*; build the index again") as raised:
        Index.open(index_copy).search_words(["owls"], 1)
    assert path.name in str(raised.value) or path.parent.name in str(raised.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "index.json is not valid JSON"),
        ("[]", "does not describe an index"),
        ("{}", "does not describe an index"),
        (
            '{"format": 1, "passages": 40, "bundle": {}, "files": {}}',
            "has format 1, this version .* reads 2",
        ),
    ],
)
def test_a_manifest_that_is_not_ours_is_refused(index_copy: Path, content: str, message: str) -> None:
    (index_copy / "index.json").write_text(content)
    with pytest.raises(TandemError, match=message):
        Index.open(index_copy)


def test_a_segment_whose_files_disagree_is_refused(index_copy: Path) -> None:
    (path,) = index_copy.rglob("segment.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"passages": 41}))
    with pytest.raises(TandemError, match="its files disagree"):
        Index.open(index_copy)


def test_a_folder_that_is_no_index_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(TandemError, match="nowhere does not exist"):
        Index.open(tmp_path / "nowhere")
    with pytest.raises(TandemError, match=r"bundle is not an index: it holds no index\.json"):
        Index.open(tiny_bundle)


# The models it belongs to


def test_a_bundle_of_another_model_is_refused_with_the_command_that_rebuilds(
    bundle: Bundle, built: Path, tmp_path: Path
) -> None:
    other = other_bundle(bundle, tmp_path / "other")
    for given in (other, other.folder, str(other.folder)):
        with pytest.raises(TandemError) as raised:
            Index.open(built).load_bundle(given)
        assert f"tandemqa index {other.folder} DATA --out {built}" in str(raised.value)
        assert "built by another model" in str(raised.value)


def test_a_bundle_that_was_trained_again_is_another_model(bundle: Bundle, tiny_dataset: Path, tmp_path: Path) -> None:
    shutil.copytree(bundle.folder, tmp_path / "bundle")
    index = Index.build(tmp_path / "bundle", tiny_dataset, tmp_path / "index")
    index.load_bundle()
    other_bundle(bundle, tmp_path / "bundle")
    with pytest.raises(TandemError, match="built by another model"):
        Index.open(tmp_path / "index").load_bundle()


def test_a_bundle_that_has_gone_is_asked_for_and_may_be_given(
    bundle: Bundle, tiny_dataset: Path, tmp_path: Path
) -> None:
    shutil.copytree(bundle.folder, tmp_path / "bundle")
    index = Index.build(tmp_path / "bundle", tiny_dataset, tmp_path / "index")
    (tmp_path / "bundle").rename(tmp_path / "moved")
    with pytest.raises(TandemError, match=f"no longer at {tmp_path}/bundle; give its new place with --bundle"):
        index.load_bundle()
    assert index.load_bundle(tmp_path / "moved").folder == tmp_path / "moved"


def test_index_and_bundle_may_move_together(bundle: Bundle, tiny_dataset: Path, tmp_path: Path) -> None:
    shutil.copytree(bundle.folder, tmp_path / "home" / "run" / "bundle")
    Index.build(tmp_path / "home" / "run", tiny_dataset, tmp_path / "home" / "index")
    (tmp_path / "home").rename(tmp_path / "elsewhere")
    found = Index.open(tmp_path / "elsewhere" / "index").load_bundle()
    assert found.folder == tmp_path / "elsewhere" / "run" / "bundle"


# Failures while it is written


@pytest.mark.parametrize(
    "writer",
    [
        "tandemqa.index.segment.save_array",
        "tandemqa.index.dense.DenseIndex.save",
        "tandemqa.index.lexical.LexicalIndex.save",
        "tandemqa.index.build.store_passages",
        "tandemqa.index.build.write_json",
        "tandemqa.index.build.put_in_place",
        "tandemqa.files._sync",
    ],
)
@pytest.mark.parametrize(
    ("failure", "raised", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), TandemError, "The disk is full"),
        (PermissionError(errno.EACCES, "Permission denied"), TandemError, "No permission to write"),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
    ],
    ids=["full disk", "no permission", "interrupt"],
)
def test_after_a_failure_in_any_writer_there_is_no_index_and_the_same_call_completes_it(
    bundle: Bundle,
    tiny_dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    writer: str,
    failure: BaseException,
    raised: type[BaseException],
    message: str | None,
) -> None:
    def fail(*_: object) -> None:
        raise failure

    with monkeypatch.context() as patch:
        patch.setattr(writer, fail)
        with pytest.raises(raised, match=message):
            Index.build(bundle, tiny_dataset, tmp_path / "index")
    assert {path.name for path in tmp_path.iterdir()} <= {".index.partial"}
    assert len(Index.build(bundle, tiny_dataset, tmp_path / "index")) == 40
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


def test_a_failure_leaves_the_index_that_stood_there(
    bundle: Bundle, tiny_dataset: Path, index_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tandemqa.index.build.store_passages", fail)
    with pytest.raises(TandemError, match="The disk is full"):
        Index.build(bundle, tiny_dataset, index_copy)
    monkeypatch.undo()
    assert len(Index.open(index_copy)) == 40 and [path.name for path in index_copy.parent.iterdir()] == ["index"]


def test_an_interrupted_build_encodes_only_what_is_missing(
    bundle: Bundle, tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tandemqa.index.segment.SHARD", 8)
    whole = Index.build(bundle, tiny_dataset, tmp_path / "whole")
    encode, encoded = bundle.retriever.encode, []

    def interrupted_at_the_third(texts: Any, side: Any, **options: Any) -> Any:
        if side == "passage":
            encoded.append(len(texts))
            if len(encoded) == 3:
                raise KeyboardInterrupt
        return encode(texts, side, **options)

    monkeypatch.setattr(bundle.retriever, "encode", interrupted_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        Index.build(bundle, tiny_dataset, tmp_path / "index")
    assert [path.name for path in tmp_path.iterdir() if path.name != "whole"] == [".index.partial"]
    again = Index.build(bundle, tiny_dataset, tmp_path / "index")
    assert encoded == [8] * 6  # of five shards, the third was begun twice
    np.testing.assert_array_equal(
        again.segments[0].vectors.vectors(np.arange(40)), whole.segments[0].vectors.vectors(np.arange(40))
    )


def test_what_is_left_of_a_build_of_something_else_is_not_used(
    bundle: Bundle, tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("tandemqa.index.segment.TokenStore.of_blocks", interrupt)
        with pytest.raises(KeyboardInterrupt):
            Index.build(bundle, tiny_dataset, tmp_path / "index")
    shutil.copytree(tiny_dataset, tmp_path / "data")
    with (tmp_path / "data" / "corpus.jsonl").open("a") as file:
        file.write('{"_id": "more", "text": "one passage more"}\n')
    index = Index.build(bundle, tmp_path / "data", tmp_path / "index")
    assert len(index) == 41 and index.passages.row("more") == 40


def test_a_broken_model_is_named(
    bundle: Bundle, tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(texts: Any, side: str, **_: Any) -> Any:
        vectors = np.ones((len(texts), bundle.retriever.size), dtype=np.float32)
        vectors[3] = np.nan if side == "passage" else 1
        return vectors

    monkeypatch.setattr(bundle.retriever, "encode", broken)
    monkeypatch.setenv("TANDEMQA_CACHE", str(tmp_path / "cache"))
    with pytest.raises(TandemError, match=r"passage 'Sourdough Wild yeast .* is not finite in half precision"):
        Index.build(bundle, tiny_dataset, tmp_path / "index")
    assert list(tmp_path.iterdir()) == []


def test_two_builds_at_once_are_one(bundle: Bundle, tiny_dataset: Path, tmp_path: Path) -> None:
    (tmp_path / ".index.partial").mkdir()
    with (
        only_writer(tmp_path / ".index.partial", tmp_path / "index"),
        pytest.raises(TandemError, match=f"Another command is writing to the index {tmp_path}/index"),
    ):
        Index.build(bundle, tiny_dataset, tmp_path / "index")
    assert (tmp_path / ".index.partial" / "write.lock").exists()  # what the other one does is left alone


def test_a_line_that_is_wrong_is_named_before_anything_is_encoded(
    bundle: Bundle, tiny_dataset: Path, tmp_path: Path
) -> None:
    for line, message in (
        ('{"_id": "p0", "text": "again"}', "line 41: field _id repeats 'p0'"),
        ('{"_id": "p9", "metadata": [1], "text": "t"}', "line 41: field metadata is not an object"),
        ('{"_id": "p99", "year": NaN, "text": "t"}', "line 41: field year cannot be kept as JSON"),
        ('{"_id": "p99", "lang": "\\ud800", "text": "t"}', "line 41: field lang holds half of a surrogate pair"),
        ('{"_id": "p99", "title": "only"}', "line 41: field text is missing"),
    ):
        data = Path(shutil.copytree(tiny_dataset, tmp_path / "data"))
        with (data / "corpus.jsonl").open("a") as file:
            file.write(line + "\n")
        with pytest.raises(TandemError, match=message):
            Index.build(bundle, data, tmp_path / "index")
        shutil.rmtree(data)
    assert list(tmp_path.iterdir()) == []
