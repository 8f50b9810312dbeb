"""An index that changes: passages added, replaced, deleted, compacted; readers, writers and kills meanwhile."""

import errno
import fcntl
import json
import os
import resource
import shutil
import signal
import sqlite3
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import bm25s
import numpy as np
import pytest
import Stemmer
from test_search import ODD
from writers import start_builder, start_writer

from tandemqa.data.dataset import Dataset, Passage, load_dataset
from tandemqa.encoders import backbone
from tandemqa.encoders.bundle import Bundle, save_bundle
from tandemqa.errors import TandemError
from tandemqa.files import fingerprint
from tandemqa.index import lock
from tandemqa.index.index import Index, describe_index
from tandemqa.index.lock import only_writer
from tandemqa.index.passages import transaction
from tandemqa.index.update import MOST_SEGMENTS, Added, add_passages, compact, delete_passages
from tandemqa.search.searcher import Answer, Searcher

NEW = [
    {"_id": "n1", "title": "Sundial", "text": "The shadow of a rod tells the hour.", "year": 1500},
    {"_id": "n2", "text": "A quartz clock counts the swings of a crystal.", "metadata": {"year": 1927, "lang": "en"}},
    {"_id": "p3", "title": "Sourdough", "text": "Rye needs acid to become bread.", "year": 2020},
]


@pytest.fixture(autouse=True)
def full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16 a vector moves with the batch that it is in."""
    monkeypatch.setattr(backbone, "has_bfloat16", lambda device: False)


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.load(tiny_bundle)


@pytest.fixture(scope="module")
def dataset(tiny_dataset: Path) -> Dataset:
    return load_dataset(tiny_dataset)


@pytest.fixture(scope="module")
def built(bundle: Bundle, dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backbone, "has_bfloat16", lambda device: False)
        patch.setenv("TANDEMQA_CACHE", str(tmp_path_factory.mktemp("cache")))
        return Index.build(bundle, dataset, tmp_path_factory.mktemp("index") / "index").folder


@pytest.fixture
def index(built: Path, bundle: Bundle, tmp_path: Path) -> Index:
    shutil.copytree(built, tmp_path / "index")
    path = tmp_path / "index" / "index.json"
    about = json.loads(path.read_text())
    about["bundle"]["path"] = str(bundle.folder)
    path.write_text(json.dumps(about))
    return Index.open(tmp_path / "index")


def content(index: Index) -> dict[str, str]:
    return {passage.id: passage.full for passage in index.passages.rows(index.rows.tolist())}


def check(index: Index, bundle: Bundle, expected: dict[str, str]) -> None:
    """Every part of the index holds the passages expected and no others, each under its row."""
    rows = index.rows.tolist()
    assert len(index) == len(rows) and content(index) == expected
    texts = index.passages.texts(rows)
    vectors = bundle.retriever.encode(bundle.retriever.tokenize(texts), "passage")
    found, scores = index.search_vectors(vectors, len(rows) + 2)
    assert (found[:, len(rows) :] == -1).all()
    assert all(sorted(ranking[: len(rows)].tolist()) == rows for ranking in found)
    for number, row in enumerate(rows):
        np.testing.assert_allclose(
            scores[number], -np.sort(-np.append(vectors @ vectors[number], [-np.inf] * 2)), atol=2e-2
        )
        assert index.tokens[row].tolist() == bundle.reranker.tokenize([texts[number]])[0].tolist()
    for row in set(range(index.passages.next_row)) - set(rows):
        with pytest.raises(IndexError):
            index.passages.rows([row])
    words, _ = index.search_words([text[:200] for text in texts], 1)
    assert set(words[:, 0].tolist()) <= {-1, *rows}


def after(dataset: Dataset, *changes: Passage) -> dict[str, str]:
    return {p.id: p.full for p in [*dataset.passages, *changes]}


N1 = Passage("n1", "Sundial", "The shadow of a rod tells the hour.")
N2 = Passage("n2", "", "A quartz clock counts the swings of a crystal.")
P3 = Passage("p3", "Sourdough", "Rye needs acid to become bread.")


# Changes


def test_what_is_added_is_found_at_once_and_takes_the_place_of_its_id(
    index: Index, bundle: Bundle, dataset: Dataset
) -> None:
    changed = index.add(NEW)
    check(changed, bundle, after(dataset, N1, N2, P3))
    row = changed.passages.row("n1")
    assert changed.search_words(["shadow of a rod"], 1)[0].tolist() == [[row]]
    assert changed.passages.metadata([row or 0]) == [{"year": 1500}]
    assert changed.passages.row("p3") == 42 and changed.passages.row("p4") == 4  # others keep their rows
    hits = Searcher(changed, bundle).search("what tells the hour", k=42)
    assert {hit.id for hit in hits} == set(content(changed))


def test_what_is_deleted_is_not_found_any_more(index: Index, bundle: Bundle, dataset: Dataset) -> None:
    changed = index.delete(["p7", "p0", "p7", "nobody"])
    expected = after(dataset)
    del expected["p7"], expected["p0"]
    check(changed, bundle, expected)
    assert 7 not in changed.search_words(["Sicilian Defence"], 40)[0]
    assert delete_passages(index.folder, ["p0"]) == 0


@pytest.mark.parametrize("vectors", ["exact", "ivf", "hnsw"])
def test_compaction_changes_nothing_that_is_seen(
    bundle: Bundle, dataset: Dataset, tmp_path: Path, vectors: Any
) -> None:
    index = Index.build(bundle, dataset, tmp_path / "index", vectors, "fp16")
    before = index.add(NEW).delete(["p7", "n2"]).add([NEW[1]])
    expected = {**after(dataset, N1, N2, P3)}
    del expected["p7"]
    check(before, bundle, expected)
    changed = before.compact()
    check(changed, bundle, expected)
    assert len(before.segments) == 3 and len(changed.segments) == 1
    assert changed.rows.tolist() == before.rows.tolist()
    queries = bundle.retriever.encode(bundle.retriever.tokenize(["owls", "bread"]), "query")
    for old, new in zip(before.search_vectors(queries, 20), changed.search_vectors(queries, 20), strict=True):
        np.testing.assert_array_equal(old, new)
    oracle = bm25s.BM25(k1=1.2, b=0.75)
    oracle.index(bm25s.tokenize(list(content(changed).values()), stemmer=Stemmer.Stemmer("english")))
    scores = oracle.get_scores(["bread"])
    rows, found = changed.search_words(["bread"], 3)
    np.testing.assert_allclose(found[0][rows[0] >= 0], -np.sort(-scores)[: (rows[0] >= 0).sum()], rtol=1e-4)
    assert describe_index(changed.folder)["deleted until compacted"] == 0
    assert changed.compact().passages.generation == changed.passages.generation  # there was nothing to do


def test_the_recall_of_copies_says_that_they_are_copies(bundle: Bundle, dataset: Dataset, tmp_path: Path) -> None:
    for storage, copied in (("int8", "copies rounded to bytes"), ("fp16", "vectors as encoded")):
        index = Index.build(bundle, dataset, tmp_path / storage, "ivf", storage).add(NEW)
        assert [s["recall"]["exact search over"] for s in described(index)] == ["vectors as encoded"] * 2
        assert [s["recall"]["exact search over"] for s in described(index.compact())] == [copied]
    path = index.folder / "index.json"
    path.write_text(path.read_text().replace('"storage": "fp16"', '"storage": "int8"'))
    index.add([{"_id": "n3", "text": "t"}]).compact().close()
    path.write_text(path.read_text().replace('"storage": "int8"', '"storage": "fp16"'))
    (whole,) = described(index.add([{"_id": "n4", "text": "t"}]).compact())
    # The first was made of halves, this one of its bytes, though it is in half precision again.
    assert whole["vectors"]["storage"] == "fp16"
    assert whole["recall"]["exact search over"] == "copies rounded to bytes"


def described(index: Index) -> list[dict[str, Any]]:
    return list(describe_index(index.folder)["segments"].values())


def test_more_is_added_in_parts_than_fits_into_one(
    index: Index, bundle: Bundle, dataset: Dataset, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tandemqa.index.update.BATCH", 4)
    monkeypatch.setattr("tandemqa.index.segment.SHARD", 3)
    monkeypatch.setattr("tandemqa.index.segment.PART", 2)
    passages = [Passage(f"m{number}", "", f"passage number {number} of many") for number in range(10)]
    with (tmp_path / "more.jsonl").open("w") as file:
        for passage in passages:
            file.write(json.dumps({"_id": passage.id, "text": passage.text}) + "\n")
    assert add_passages(index.folder, tmp_path / "more.jsonl") == Added(10, 0)
    changed = Index.open(index.folder)
    assert [len(segment) for segment in changed.segments] == [40, 4, 4, 2]
    check(changed, bundle, after(dataset, *passages))
    check(changed.compact(), bundle, after(dataset, *passages))


def test_conditions_hold_in_both_searches(index: Index, bundle: Bundle) -> None:
    changed = index.add(NEW)
    queries = bundle.retriever.encode(bundle.retriever.tokenize(["clock"]), "query")
    for where, ids in (
        (["year>=1900"], {"n2", "p3"}),
        (["year>=1900", "lang=en"], {"n2"}),
        (["year<1900"], {"n1"}),
        (["year=1"], set()),
    ):
        rows = changed.search_vectors(queries, 5, where)[0][0]
        assert {passage.id for passage in changed.passages.rows(rows[rows >= 0].tolist())} == ids
        rows = changed.search_words(["clock rod bread"], 5, where)[0][0]
        assert {passage.id for passage in changed.passages.rows(rows[rows >= 0].tolist())} == ids
        assert {hit.id for hit in Searcher(changed, bundle).search("clock", where=where)} == ids
    again = changed.delete(["n2"])
    assert (again.search_vectors(queries, 5, ["lang=en"])[0] == -1).all()
    assert again.compact().passages.fields == ["year"]


def test_a_string_is_one_id_and_deleting_nothing_is_no_new_generation(index: Index) -> None:
    changed = index.add([{"_id": name, "text": "t"} for name in ("p", "1", "7")]).delete("p17")
    assert set(index.passages.ids()) - set(changed.passages.ids()) == {"p17"} and len(changed) == 42
    for nothing in ("p17", ["nobody"], []):
        assert changed.delete(nothing).passages.generation == changed.passages.generation


def test_no_passage_is_added_beyond_the_last_row(index: Index) -> None:
    with transaction(index.folder / "passages.sqlite") as database:
        database.execute("UPDATE state SET next_row = ?", (2**31,))
    with pytest.raises(TandemError, match="given all of its 2³¹ rows"):
        index.add(NEW)
    assert not set(index.passages.ids()) & {"n1", "n2"} and len(list((index.folder / "segments").iterdir())) == 1


def test_one_object_is_one_passage(index: Index) -> None:
    assert set(index.add(NEW[0]).passages.ids()) - set(index.passages.ids()) == {"n1"}


def test_an_earlier_index_tells_nothing_of_a_backup_that_was_put_back(index: Index) -> None:
    path, backup = index.folder / "passages.sqlite", index.folder.parent / "backup.sqlite"
    shutil.copy(path, backup)
    index.close()
    one = index.delete("p1")
    assert one.search_words(["the"], 1)[0].shape == (1, 1)  # what it may find is remembered
    one.close()
    for log in index.folder.glob("passages.sqlite-*"):
        log.unlink()
    backup.replace(path)
    delete_passages(index.folder, "p2")
    assert one.passages.generation == Index.open(index.folder).passages.generation
    other = Index.open(index.folder, one)
    assert other.passages.state != one.passages.state and "p1" in set(other.passages.ids())
    first = other.passages.row("p1")
    assert first is not None and any(mask is None or mask[first] for mask in other._allowed([]))


def test_a_file_of_another_program_among_the_segments_stops_no_writer(index: Index) -> None:
    (index.folder / "segments" / ".DS_Store").touch()
    assert delete_passages(index.folder, "p1") == 1


def test_an_index_is_searched_from_another_folder(
    index: Index, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(index.folder.parent)
    near = Index.open(index.folder.name)
    searcher = Searcher(near, bundle)
    monkeypatch.chdir("/")
    assert len(searcher.search("owls", k=3)) == 3 and (near.search_words(["owls"], 1)[0] >= 0).all()


# Many small changes


@pytest.fixture
def few_handles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """256 file handles for this process; and no waiting for the disk, which so many changes would do long."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("few_handles")
def test_any_number_of_small_additions_leaves_few_segments(index: Index, bundle: Bundle, dataset: Dataset) -> None:
    index.close()
    expected = after(dataset)
    most = 0
    for number in range(110):
        passage = Passage(f"m{number % 90}", "", f"passage number {number} of many")  # some take another's place
        add_passages(index.folder, [{"_id": passage.id, "text": passage.text, "n": number}], bundle)
        expected[passage.id] = passage.full
        if number % 50 == 20:
            delete_passages(index.folder, [passage.id])
            del expected[passage.id]
        if number % 10 == 0:
            opened = Index.open(index.folder)
            most = max(most, len(opened.segments))
            opened.close()
    changed = Index.open(index.folder)
    assert most <= MOST_SEGMENTS
    check(changed, bundle, expected)
    assert changed.search_words(["number 109"], 1, ["n>=109"])[0] == changed.passages.row("m19")
    folders = {path.name for path in (index.folder / "segments").iterdir()}
    assert folders == {segment.folder.name for segment in changed.segments}
    changed.close()
    check(changed.compact(), bundle, expected)


@pytest.mark.usefixtures("few_handles")
def test_an_index_of_many_segments_can_be_searched_and_compacted(
    index: Index, bundle: Bundle, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tandemqa.index.update.MOST_SEGMENTS", 1000)
    monkeypatch.setattr("tandemqa.index.update.BATCH", 1)
    passages = [Passage(f"m{number}", "", f"passage number {number}") for number in range(70)]
    changed = index.add([{"_id": passage.id, "text": passage.text} for passage in passages])
    index.close()
    assert len(changed.segments) == 71
    check(changed, bundle, after(dataset, *passages))
    check(changed.compact(), bundle, after(dataset, *passages))


def test_a_large_segment_is_not_copied_for_small_additions(
    index: Index, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tandemqa.index.update.MOST_SEGMENTS", 6)
    large = index.segments[0].folder.name
    for number in range(12):
        index = index.add([{"_id": f"m{number}", "text": "t"}], bundle)
        assert index.segments[0].folder.name == large and len(index.segments) <= 6
    index = index.add([{"_id": f"n{number}", "text": "t"} for number in range(40)], bundle)
    monkeypatch.setattr("tandemqa.index.update.MOST_SEGMENTS", 3)
    changed = index.add([{"_id": "last", "text": "t"}], bundle)
    assert [len(segment) for segment in changed.segments] == [92, 1]


# Readers meanwhile


def test_a_reader_sees_its_own_generation_to_the_end(index: Index, bundle: Bundle, dataset: Dataset) -> None:
    expected = after(dataset)
    changed = index.add(NEW)
    changed.delete([f"p{number}" for number in range(30)]).compact()
    check(index, bundle, expected)  # words and texts are read only now
    check(changed, bundle, after(dataset, N1, N2, P3))
    assert len(Index.open(index.folder)) == 12


def test_a_reader_sees_its_own_generation_when_another_index_is_built_in_its_place(
    index: Index, bundle: Bundle, dataset: Dataset, tmp_path: Path
) -> None:
    changed = index.add(NEW)
    expected = after(dataset, N1, N2, P3)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "corpus.jsonl").write_text('{"_id": "only", "text": "The only passage."}\n')
    built = Index.build(bundle, tmp_path / "data", index.folder)
    check(changed, bundle, expected)  # words and texts are read only now
    check(index, bundle, after(dataset))
    check(built, bundle, {"only": "The only passage."})
    assert content(changed.refreshed()) == content(built)
    for old in (index, changed):
        old.close()
    built.delete(["nobody"]).close()
    assert [path.name for path in (index.folder / "segments").iterdir()] == [built.segments[0].folder.name]
    assert {path.name for path in index.folder.parent.iterdir()} == {"data", "index"}


def test_an_index_can_be_opened_while_others_are_built_in_its_place(
    index: Index, bundle: Bundle, dataset: Dataset, tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "corpus.jsonl").write_text('{"_id": "only", "text": "The only passage."}\n')
    contents = {
        fingerprint(tmp_path / "data" / "corpus.jsonl"): {"only": "The only passage."},
        index.about["data"]["fingerprint"]: after(dataset),
    }

    def build() -> None:
        for folder in (tmp_path / "data", dataset.folder) * 4:
            Index.build(bundle, folder, index.folder).close()

    opened = []
    with ThreadPoolExecutor(1) as pool:
        building = pool.submit(build)
        while not building.done():
            found = Index.open(index.folder)
            opened.append(found.about["data"]["fingerprint"])
            assert content(found) == contents[opened[-1]]
            assert (found.search_words(["passage"], 1)[0] >= 0).all() == (len(found) == 1)
            found.close()
        building.result()
    assert set(opened) == set(contents)


def test_what_no_reader_needs_is_removed_by_the_next_writer(index: Index, bundle: Bundle) -> None:
    folder = index.folder / "segments"
    changed = index.add(NEW)
    compacted = changed.compact()
    assert len(list(folder.iterdir())) == 3
    index.close()
    changed.close()
    (folder / "orphan").mkdir()
    (folder / ".orphan.1234.partial").mkdir()
    compacted.delete(["nobody"])
    assert [path.name for path in folder.iterdir()] == [compacted.segments[0].folder.name]
    check(Index.open(index.folder), bundle, content(compacted))


def test_a_reader_learns_whether_there_is_a_newer_generation(index: Index, bundle: Bundle) -> None:
    assert index.refreshed() is index
    index.add(NEW[:1])
    newer = index.refreshed()
    assert newer is not index and (len(index), len(newer)) == (40, 41) and newer.refreshed() is newer


def ids(searcher: Searcher, question: str = "what tells the hour") -> set[str]:
    return {hit.id for hit in searcher.search(question, k=100, depth=1)}


def test_a_search_sees_what_was_committed_before_it_began(
    index: Index, bundle: Bundle, dataset: Dataset, tmp_path: Path
) -> None:
    searchers = [Searcher(index, bundle), Searcher(index.folder, bundle)]
    old = {passage.id for passage in dataset.passages}
    for change, expected in (
        (lambda: add_passages(index.folder, NEW, bundle), old | {"n1", "n2"}),
        (lambda: delete_passages(index.folder, ["p7"]), (old | {"n1", "n2"}) - {"p7"}),
        (lambda: compact(index.folder), (old | {"n1", "n2"}) - {"p7"}),
        (lambda: Index.build(bundle, dataset, index.folder), old),
    ):
        change()
        assert [ids(searcher) for searcher in searchers] == [expected] * 2
        assert {hit.id for hit in searchers[0].search("bread", k=100, mode="hybrid")} == expected
    assert content(index) == after(dataset)  # what was handed in shows its own generation to the end
    assert len(searchers[0].index) == 40
    searchers[0].index.close()
    assert ids(searchers[0]) == old
    about = json.loads((index.folder / "index.json").read_text())
    about["bundle"]["fingerprint"] = "another"
    (index.folder / "index.json").write_text(json.dumps(about))
    with pytest.raises(TandemError, match="was built again with other models, or in another"):
        searchers[0].search("bread")


def test_an_idle_searcher_keeps_no_log_and_its_next_search_lets_go_of_old_segments(
    index: Index, bundle: Bundle
) -> None:
    folder = index.folder
    log = folder / "passages.sqlite-wal"
    index.close()
    searcher = Searcher(folder, bundle)
    held = sqlite3.connect(folder / "passages.sqlite")
    held.execute("SELECT * FROM state").fetchall()  # so that the log is not removed, as it is by the last to close
    for _ in range(2):
        add_passages(folder, NEW, bundle)
        assert log.stat().st_size == 0
        ids(searcher)
        compact(folder)
        assert log.stat().st_size == 0
        ids(searcher)
    delete_passages(folder, ["nobody"])
    assert [path.name for path in (folder / "segments").iterdir()] == Index.open(folder).passages.segments
    held.close()


def test_searches_of_many_threads_each_see_one_generation(
    index: Index, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer replaces two passages together, again and again; a search finds both as they were last, or newer."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    searcher = Searcher(index, bundle)
    index.close()
    committed, done = [0], threading.Event()

    def versions(answer: Answer) -> set[str]:
        return {hit.text for hit in answer if hit.id in ("a", "b")}

    def write(number: int) -> None:
        add_passages(searcher.index.folder, [{"_id": name, "text": f"version {number}"} for name in "ab"], bundle)
        committed[0] = number

    def search() -> list[int]:
        seen = []
        while not done.is_set():
            before = committed[0]
            mode = ("dense", "hybrid", "bm25")[len(seen) % 3]
            found = versions(searcher.search("version", k=100, depth=1, mode=mode))
            assert len(found) == 1
            seen.append(int(found.pop().split()[1]))
            assert seen[-1] >= before
        return seen

    write(1)
    with ThreadPoolExecutor(3) as pool:
        searches = [pool.submit(search) for _ in range(3)]
        for number in range(2, 12):
            write(number)
            if number % 4 == 0:
                compact(searcher.index.folder)
        done.set()
        seen = [each.result() for each in searches]
    assert all(numbers == sorted(numbers) for numbers in seen)
    assert len({number for numbers in seen for number in numbers}) > 3


def test_an_index_can_be_opened_at_any_moment_of_a_writer(
    index: Index, bundle: Bundle, tiny_bundle: Path, tmp_path: Path
) -> None:
    index.close()
    done = tmp_path / "log"
    done.touch()
    child = start_writer(index.folder, tiny_bundle, done, 1)
    generations = set()
    question = bundle.retriever.encode(bundle.retriever.tokenize(["version"]), "query")
    deadline = time.monotonic() + 200
    while len(generations) < 8 and time.monotonic() < deadline:
        found = Index.open(index.folder)
        generations.add(found.passages.generation)
        texts = content(found)  # of just the passages that are in the segments, or this raises
        rows = found.search_vectors(question, len(found))[0][0]
        assert len(texts) == len(found) and sorted(rows.tolist()) == found.rows.tolist()
        assert set(found.search_words(["version"], 3)[0][0].tolist()) <= {-1, *rows.tolist()}
        found.close()
    assert child.is_alive() and len(generations) == 8
    child.kill()
    child.join()


# What can be wrong


def test_an_id_that_comes_twice_is_named_and_nothing_is_added(index: Index, tmp_path: Path) -> None:
    (tmp_path / "new.jsonl").write_text(
        '{"_id": "a", "text": "x"}\n{"_id": "b", "text": "y"}\n{"_id": "a", "text": "z"}'
    )
    with pytest.raises(TandemError, match=r"new\.jsonl, line 3: field _id repeats 'a'"):
        index.add(tmp_path / "new.jsonl")
    with pytest.raises(TandemError, match=r"The passages to add, line 2: field _id repeats 'a'"):
        index.add([{"_id": "a", "text": "x"}, {"_id": "a", "text": "y"}])
    with pytest.raises(TandemError, match="There are no passages to add"):
        index.add([])
    with pytest.raises(TandemError, match=r"line 1: field _id is empty"):
        index.add([{"_id": "", "text": "x"}])
    assert Index.open(index.folder).passages.generation == index.passages.generation


def test_what_is_no_file_or_no_text_gets_one_sentence(index: Index, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(TandemError, match=r"pipe is not a file, and passages are read twice; write them into a file"):
        index.add(tmp_path / "pipe")
    with pytest.raises(TandemError, match=r"The id 'p\\udcff' is not UTF-8"):
        index.delete(["p1", "p\udcff"])
    with pytest.raises(TandemError, match="The id 3 is not a string"):
        index.delete([3])  # type: ignore[list-item]
    with pytest.raises(TandemError, match="The passages to add, line 2: 'abc' is no object"):
        index.add([NEW[0], "abc"])  # type: ignore[list-item]
    assert Index.open(index.folder).passages.generation == index.passages.generation


def test_an_index_without_passages_says_so_and_takes_new_ones(index: Index, bundle: Bundle) -> None:
    empty = index.delete([f"p{number}" for number in range(40)])
    for emptied in (empty, empty.compact()):
        assert len(emptied) == 0
        queries = np.ones((2, bundle.retriever.size), dtype=np.float32)
        assert (emptied.search_vectors(queries, 3)[0] == -1).all()
        assert (emptied.search_words(["owls", "bees"], 3)[0] == -1).all()
        with pytest.raises(TandemError, match="is empty: all its passages were deleted; add some"):
            Searcher(emptied, bundle).search("owls")
    check(emptied.add(NEW[:1]), bundle, {"n1": N1.full})


def test_a_second_writer_gets_one_sentence(index: Index) -> None:
    with only_writer(index.folder, index.folder):
        for change in (lambda: index.add(NEW), lambda: index.delete(["p1"]), index.compact):
            with pytest.raises(TandemError, match=r"Another command is writing to the index .*; give this one again"):
                change()
    assert len(index.add(NEW)) == 42


def test_the_lock_of_an_index_that_has_been_replaced_is_not_one(
    index: Index, bundle: Bundle, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock, built = fcntl.flock, []

    def late(descriptor: int, operation: int) -> None:
        if not built:
            built.append(True)
            Index.build(bundle, dataset, index.folder)
        flock(descriptor, operation)

    monkeypatch.setattr(lock.fcntl, "flock", late)
    with (
        only_writer(index.folder, index.folder),
        pytest.raises(TandemError, match="Another command is writing"),
        only_writer(index.folder, index.folder),
    ):
        pass
    assert built


def test_an_index_that_is_being_changed_is_not_replaced_by_another_build(
    index: Index, bundle: Bundle, dataset: Dataset
) -> None:
    with (
        only_writer(index.folder, index.folder),
        pytest.raises(TandemError, match=f"Another command is writing to the index {index.folder}"),
    ):
        Index.build(bundle, dataset, index.folder)
    assert [path.name for path in index.folder.parent.iterdir()] == ["index"]
    check(Index.open(index.folder), bundle, after(dataset))


def test_of_several_writers_at_once_each_adds_all_or_says_that_another_is_writing(
    index: Index, bundle: Bundle, dataset: Dataset
) -> None:
    start = threading.Barrier(4)

    def add(number: int) -> list[Passage]:
        passages = [Passage(f"w{number}-{step}", "", f"passage {step} of writer {number}") for step in range(3)]
        start.wait()
        try:
            index.add([{"_id": passage.id, "text": passage.text} for passage in passages], bundle).close()
        except TandemError as error:
            assert "Another command is writing to the index" in str(error)
            return []
        return passages

    with ThreadPoolExecutor(4) as pool:
        added = [passage for passages in pool.map(add, range(4)) for passage in passages]
    assert len(added) >= 3
    check(Index.open(index.folder), bundle, after(dataset, *added))


def test_no_passage_is_too_odd(index: Index, bundle: Bundle, dataset: Dataset) -> None:
    odd = [Passage(f"{text[:40]}{number}", text[:60], text) for number, text in enumerate(ODD.values())]
    changed = index.add([dict(zip(("_id", "title", "text"), passage, strict=True)) for passage in odd])
    check(changed, bundle, after(dataset, *odd))
    for passage in odd:
        row = changed.passages.row(passage.id)
        assert row is not None and changed.passages.rows([row]) == [passage]
        found = {hit.id: hit for hit in Searcher(changed, bundle).search(passage.text, k=100, depth=5)}
        assert len(found) == 52 and found[passage.id].text == passage.text
    check(changed.compact(), bundle, after(dataset, *odd))
    check(changed.delete([passage.id for passage in odd]), bundle, after(dataset))


def test_another_model_may_not_add(index: Index, bundle: Bundle, tmp_path: Path) -> None:
    changed = Bundle.load(bundle.folder)
    changed.reranker.head.bias.data += 1
    other = save_bundle(tmp_path / "other", changed.retriever, changed.reranker, {})
    with pytest.raises(TandemError, match="built by another model"):
        index.add(NEW, other)


def test_a_broken_model_adds_nothing(index: Index, monkeypatch: pytest.MonkeyPatch, bundle: Bundle) -> None:
    size = bundle.retriever.size
    monkeypatch.setattr(bundle.retriever, "encode", lambda texts, *_, **__: np.full((len(texts), size), np.nan))
    with pytest.raises(TandemError, match=r"passage 'Sundial The shadow of a rod .* is not finite in half precision"):
        index.add(NEW, bundle)
    assert Index.open(index.folder).passages.generation == index.passages.generation
    assert len(list((index.folder / "segments").iterdir())) == 1


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_folder_that_may_not_be_written_is_named(
    index: Index, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    open_file = os.open

    def refuse(path: Any, flags: int, *mode: int) -> int:
        if flags & os.O_RDWR:
            raise OSError(number, os.strerror(number), str(path))
        return open_file(path, flags, *mode)

    monkeypatch.setattr(os, "open", refuse)
    for change in (lambda: index.add(NEW), lambda: index.delete(["p1"]), index.compact):
        with pytest.raises(TandemError, match=f"No permission to write {index.folder}"):
            change()


def test_a_full_disk_leaves_the_generation_before(
    index: Index, bundle: Bundle, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect = sqlite3.connect

    def connect_to_full_disk(path: Any, **options: Any) -> sqlite3.Connection:
        connection = connect(path, **options)
        (pages,) = connection.execute("PRAGMA page_count").fetchone()
        connection.execute(f"PRAGMA max_page_count = {pages}")
        return connection

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    long = [{"_id": f"l{number}", "text": "word " * 10_000} for number in range(3)]
    with monkeypatch.context() as patch:
        patch.setattr(sqlite3, "connect", connect_to_full_disk)
        with pytest.raises(TandemError, match="The disk is full"):
            index.add(long)
    with monkeypatch.context() as patch:
        patch.setattr("tandemqa.index.segment.save_array", fail)
        with pytest.raises(TandemError, match="The disk is full"):
            index.add(long)
    check(Index.open(index.folder), bundle, after(dataset))
    assert len(index.add(long)) == 43


# Kills


def replay(lines: Iterator[list[Any]], before: dict[str, str]) -> list[dict[str, str]]:
    """What the index may hold after the changes of a log: with the last one, if it has no end, or without it."""
    states = [before]
    for line in lines:
        if line[0] == "begin":
            changed = dict(states[-1])
            for name in line[1]:
                changed.pop(name, None)
                if line[2] is not None:
                    changed[name] = line[2]
            states.append(changed)
        else:
            states = states[-1:]
    return states


def test_a_writer_that_is_killed_loses_nothing_that_was_committed(
    index: Index, bundle: Bundle, dataset: Dataset, tiny_bundle: Path, tmp_path: Path
) -> None:
    index.close()
    random = np.random.default_rng(0)
    states = [after(dataset)]
    commits = 0
    for seed in range(6):
        done = tmp_path / f"{seed}.log"
        done.touch()
        child = start_writer(index.folder, tiny_bundle, done, seed)
        deadline = time.monotonic() + 60
        while '"end"' not in done.read_text() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(random.uniform(0.05, 0.8))
        assert child.pid is not None and child.is_alive()
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        lines = [json.loads(line) for line in done.read_text().splitlines()]
        commits += sum(line[0] == "end" for line in lines)
        assert len(states) == 1
        states = replay(iter(lines), states[0])
        found = Index.open(index.folder)
        states = [content(found)] if content(found) in states else pytest.fail(f"kill {seed} lost something")
        check(found, bundle, states[0])
        found.close()
    assert commits >= 6


def test_a_build_that_is_killed_again_and_again_ends_as_one_left_alone(
    bundle: Bundle, dataset: Dataset, tiny_bundle: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    random = np.random.default_rng(0)

    def begin(name: str) -> BaseProcess:
        return start_builder(tiny_bundle, tiny_dataset, tmp_path / name)

    started = time.monotonic()
    begin("whole").join()
    whole = time.monotonic() - started
    shutil.rmtree(tmp_path / "whole")
    kills = 0
    for moment in (0.02, *random.uniform(0.1, 0.5, 6) * whole, None):
        child = begin("index")
        child.join(moment)
        if child.exitcode is not None:
            assert child.exitcode == 0
            break
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        kills += 1
    assert kills
    check(Index.open(tmp_path / "index"), bundle, after(dataset))
    assert {path.name for path in tmp_path.iterdir()} == {"index"}
