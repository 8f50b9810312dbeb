"""The index: what it holds, and that it is whole or not there."""

import errno
import json
import os
import shutil
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tandemqa.data.dataset import Passage, load_dataset
from tandemqa.encoders.bundle import Bundle, save_bundle
from tandemqa.errors import TandemError
from tandemqa.index.dense import DenseIndex
from tandemqa.index.index import Index
from tandemqa.index.lexical import LexicalIndex
from tandemqa.index.passages import PassageStore


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


# What an index holds


def test_row_i_is_passage_i_in_each_part(bundle: Bundle, built: Path, tiny_dataset: Path) -> None:
    index = Index.open(built)
    passages = list(load_dataset(tiny_dataset).passages)
    assert len(index) == len(index.vectors) == index.words.size == len(index.tokens) == len(passages)
    assert index.passages.rows(range(len(passages))) == passages
    for row, expected in enumerate(bundle.reranker.tokenize([passage.full for passage in passages])):
        assert index.tokens[row].tolist() == expected.tolist()
    vectors = bundle.retriever.encode(bundle.retriever.tokenize([p.full for p in passages]), "passage")
    for row, vector in enumerate(vectors):
        np.testing.assert_allclose(index.vectors.index.reconstruct(row), vector, atol=1e-2)
    assert index.words.search(["Sicilian Defence"], 1)[0].tolist() == [[7]]


def test_its_manifest_tells_data_models_and_sizes(bundle: Bundle, built: Path, tiny_dataset: Path) -> None:
    about = json.loads((built / "index.json").read_text())
    assert about["format"] == 1 and about["passages"] == 40
    assert about["data"]["fingerprint"] == load_dataset(tiny_dataset).fingerprint
    assert about["bundle"]["fingerprint"] == bundle.fingerprint
    assert (built / about["bundle"]["path"]).resolve() == bundle.folder.resolve()
    on_disk = {str(p.relative_to(built)): p.stat().st_size for p in built.rglob("*") if p.is_file()}
    del on_disk["index.json"]
    assert about["files"] == on_disk


def test_it_stands_without_the_cache(
    bundle: Bundle, tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TANDEMQA_CACHE", str(tmp_path / "cache"))
    index = Index.build(bundle, tiny_dataset, tmp_path / "index")
    expected = [index.tokens[row].tolist() for row in range(40)]
    shutil.rmtree(tmp_path / "cache")
    again = Index.open(tmp_path / "index")
    assert [again.tokens[row].tolist() for row in range(40)] == expected


def test_its_tokens_are_copied_where_they_cannot_be_linked(
    bundle: Bundle, tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, "another disk")

    monkeypatch.setattr(os, "link", refuse)
    index = Index.build(bundle, tiny_dataset, tmp_path / "index")
    assert (tmp_path / "index/tokens/ids.bin").stat().st_nlink == 1
    assert len(index.tokens) == 40


# What it replaces


def test_a_new_index_replaces_an_old_one(bundle: Bundle, tiny_dataset: Path, index_copy: Path) -> None:
    (index_copy / "index.json").unlink()  # even one that is damaged
    assert len(Index.build(bundle, tiny_dataset, index_copy)) == 40
    assert [path.name for path in index_copy.parent.iterdir()] == ["index"]


def test_an_empty_folder_is_free(bundle: Bundle, tiny_dataset: Path, tmp_path: Path) -> None:
    assert len(Index.build(bundle, tiny_dataset, tmp_path)) == 40


@pytest.mark.parametrize("name", ["thesis.tex", ".hidden"])
def test_a_folder_with_anything_else_is_never_replaced(
    bundle: Bundle, tiny_dataset: Path, index_copy: Path, name: str
) -> None:
    own = index_copy / name
    own.write_text("years of work")
    with pytest.raises(TandemError, match="is not an index; choose another place"):
        Index.build(bundle, tiny_dataset, index_copy)
    assert own.read_text() == "years of work" and len(Index.open(index_copy)) == 40


def test_a_file_is_never_replaced(bundle: Bundle, tiny_dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("years of work")
    with pytest.raises(TandemError, match="file exists and is not an index"):
        Index.build(bundle, tiny_dataset, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "years of work"


# What is wrong with it


def test_a_missing_file_is_named(built: Path, tmp_path: Path) -> None:
    for name in json.loads((built / "index.json").read_text())["files"]:
        copy = shutil.copytree(built, tmp_path / "index", dirs_exist_ok=True)
        (copy / name).unlink()
        with pytest.raises(TandemError, match=f"{name} is missing; build it again"):
            Index.open(copy)


def test_a_truncated_file_is_named(built: Path, tmp_path: Path) -> None:
    for name, size in json.loads((built / "index.json").read_text())["files"].items():
        copy = Path(shutil.copytree(built, tmp_path / name.replace("/", "-")))
        os.truncate(copy / name, size - 1)
        with pytest.raises(TandemError, match=f"{name} has {size - 1} bytes instead of {size}"):
            Index.open(copy)


@pytest.mark.parametrize("name", ["vectors.faiss", "passages.sqlite"])
def test_a_file_of_the_right_size_and_wrong_content_is_named(index_copy: Path, name: str) -> None:
    (index_copy / name).write_bytes(b"\x07" * (index_copy / name).stat().st_size)
    with pytest.raises(TandemError, match=f"{name} (is|are) missing or damaged"):
        Index.open(index_copy)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "index.json is not valid JSON"),
        ("[]", "does not describe an index"),
        ("{}", "does not describe an index"),
        (
            '{"format": 2, "passages": 40, "bundle": {}, "files": {}}',
            "has format 2, this version .* reads 1",
        ),
    ],
)
def test_a_manifest_that_is_not_ours_is_refused(index_copy: Path, content: str, message: str) -> None:
    (index_copy / "index.json").write_text(content)
    with pytest.raises(TandemError, match=message):
        Index.open(index_copy)


def test_files_of_two_indexes_do_not_mix(index_copy: Path) -> None:
    about = json.loads((index_copy / "index.json").read_text())
    about["passages"] = 41
    (index_copy / "index.json").write_text(json.dumps(about))
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
        "tandemqa.index.dense.DenseIndex.save",
        "tandemqa.index.lexical.LexicalIndex.save",
        "tandemqa.index.passages.PassageStore.build",
        "tandemqa.index.index._adopt",
        "tandemqa.index.index.write_json",
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
def test_a_failure_in_any_writer_leaves_nothing_behind(
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
    assert list(tmp_path.iterdir()) == []
    assert len(Index.build(bundle, tiny_dataset, tmp_path / "index")) == 40


def test_a_failure_leaves_the_index_that_stood_there(
    bundle: Bundle, tiny_dataset: Path, index_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(PassageStore, "build", fail)
    with pytest.raises(TandemError, match="The disk is full"):
        Index.build(bundle, tiny_dataset, index_copy)
    monkeypatch.undo()
    assert len(Index.open(index_copy)) == 40


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_vectors_on_a_disk_that_is_really_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = DenseIndex.build(np.ones((1000, 8), dtype=np.float32))
    monkeypatch.setattr("secrets.token_hex", lambda size: "mark")
    (tmp_path / ".vectors.faiss.mark.partial").symlink_to("/dev/full")
    with pytest.raises(TandemError, match=r"The disk is full: .*vectors\.faiss was not written"):
        index.save(tmp_path / "vectors.faiss")
    assert list(tmp_path.iterdir()) == []


def test_passages_on_a_disk_that_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    connect = sqlite3.connect

    def connect_to_small_disk(path: Path) -> sqlite3.Connection:
        connection = connect(path)
        connection.execute("PRAGMA max_page_count = 8")  # SQLite itself then says "database or disk is full"
        return connection

    monkeypatch.setattr(sqlite3, "connect", connect_to_small_disk)
    with pytest.raises(OSError) as raised:
        PassageStore.build(tmp_path / "p.sqlite", [Passage(str(row), "", "x" * 1000) for row in range(1000)])
    assert raised.value.errno == errno.ENOSPC


# The parts


AWKWARD = [
    Passage("a", "", "plain"),
    Passage("'; DROP TABLE passages; --", "quotes \" and ' both", "two\nlines\tand a tab"),
    Passage("nul", "a\x00b", "\x00"),
    Passage("😀", "\u202e right to left", "日本語 𝒳 e\u0301"),
    Passage(" spaces ", "", "x" * 100_000),
]


@pytest.mark.parametrize("name", ["plain.sqlite", "a?mode=rw#b%20c.sqlite", "päs säge.sqlite"])
def test_passages_come_back_as_they_went_in(tmp_path: Path, name: str) -> None:
    assert PassageStore.build(tmp_path / name, iter(AWKWARD)).rows(range(5)) == AWKWARD
    assert len(PassageStore(tmp_path / name)) == 5
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_passages_keep_the_order_and_the_repeats_of_their_rows(tmp_path: Path) -> None:
    store = PassageStore.build(tmp_path / "p.sqlite", AWKWARD)
    assert [p.id for p in store.rows(np.array([3, 0, 3], dtype=np.int32))] == ["😀", "a", "😀"]
    for row in (-1, 5):
        with pytest.raises(IndexError, match=f"row {row} of 5"):
            store.rows([0, row])


def test_passages_are_stored_as_they_stream(tmp_path: Path) -> None:
    alive = 0
    most = 0

    class Counted(str):
        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    def stream() -> Iterator[Passage]:
        nonlocal alive, most
        for row in range(500):
            alive += 1
            most = max(most, alive)
            yield Passage(str(row), "", Counted("text"))

    assert len(PassageStore.build(tmp_path / "p.sqlite", stream())) == 500
    assert most <= 3


def test_passages_are_read_only_and_shared_by_threads(tmp_path: Path) -> None:
    store = PassageStore.build(tmp_path / "p.sqlite", AWKWARD)
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        store._connection.execute("DELETE FROM passages")
    wrong: list[object] = []

    def read(row: int) -> None:
        for _ in range(200):
            if store.rows([row]) != [AWKWARD[row]]:
                wrong.append(row)

    threads = [threading.Thread(target=read, args=(row,)) for row in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_passage_store_that_is_missing_is_named_and_not_made(tmp_path: Path) -> None:
    with pytest.raises(TandemError, match=r"p\.sqlite are missing or damaged"):
        PassageStore(tmp_path / "p.sqlite")
    assert list(tmp_path.iterdir()) == []


def test_dense_search_is_exact_over_half_precision(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    vectors = random.normal(size=(3000, 24)).astype(np.float32)
    queries = random.normal(size=(1500, 24)).astype(np.float32)
    DenseIndex.build(vectors).save(tmp_path / "v.faiss")
    rows, scores = DenseIndex.load(tmp_path / "v.faiss").search(queries, 10)
    stored = DenseIndex.load(tmp_path / "v.faiss").index.reconstruct_n(0, 3000)
    np.testing.assert_allclose(stored, vectors, rtol=2**-11, atol=2**-24)  # half a unit in the last place
    products = queries.astype(np.float64) @ stored.astype(np.float64).T
    best = -np.sort(-products, axis=1)[:, :10]
    assert rows.dtype == np.int32 and scores.dtype == np.float32
    np.testing.assert_allclose(scores, best, atol=1e-4)
    np.testing.assert_allclose(np.take_along_axis(products, rows.astype(np.int64), axis=1), best, atol=1e-4)


def test_dense_search_gives_no_more_than_there_is() -> None:
    rows, _ = DenseIndex.build(np.eye(4, dtype=np.float32)).search(np.eye(4, dtype=np.float32)[:2], 10)
    assert rows.shape == (2, 4) and sorted(rows[0].tolist()) == [0, 1, 2, 3]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_vector_that_is_not_finite_is_named(value: float) -> None:
    vectors = np.ones((5, 4), dtype=np.float32)
    vectors[3, 1] = value
    with pytest.raises(TandemError, match="passage row 3"):
        DenseIndex.build(vectors)


def test_words_find_nothing_where_none_is_shared(tmp_path: Path) -> None:
    LexicalIndex.build(["cats purr", "dogs bark", "the cat sat"]).save(tmp_path / "bm25")
    rows, scores = LexicalIndex.load(tmp_path / "bm25").search(["a cat", "quantum", ""], 5)
    assert sorted(rows[0].tolist()) == [-1, 0, 2] and rows[1:].tolist() == [[-1] * 3] * 2
    assert np.isneginf(scores[1:]).all() and (scores[0][rows[0] >= 0] > 0).all()
