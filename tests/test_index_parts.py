"""The parts of an index, each against an oracle: vectors, words, passages, conditions."""

import errno
import sqlite3
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import bm25s
import numpy as np
import pytest
import Stemmer
import torch

from tandemqa.data.dataset import Passage
from tandemqa.data.lines import metadata_of
from tandemqa.errors import TandemError
from tandemqa.index import recall
from tandemqa.index.dense import DenseIndex, Kind, Storage
from tandemqa.index.lexical import LexicalIndex, search_parts
from tandemqa.index.metadata import Condition, searchable
from tandemqa.index.passages import PassageStore, Record, fold, put, remove, store_passages, transaction

# Passages


AWKWARD = [
    Passage("a", "", "plain"),
    Passage("'; DROP TABLE passages; --", "quotes \" and ' both", "two\nlines\tand a tab"),
    Passage("nul", "a\x00b", "\x00"),
    Passage("😀", "\u202e right to left", "日本語 𝒳 e\u0301"),
    Passage(" spaces ", "", "x" * 100_000),
]


def stored(path: Path, passages: Iterable[Passage], metadata: Iterable[dict[str, Any]] | None = None) -> PassageStore:
    pairs = ((p, {}) for p in passages) if metadata is None else zip(passages, metadata, strict=True)
    store_passages(path, enumerate((Record(*pair) for pair in pairs), start=1), "corpus.jsonl")
    return PassageStore(path)


@pytest.mark.parametrize("name", ["plain.sqlite", "a?mode=rw#b%20c.sqlite", "päs säge.sqlite"])
def test_passages_come_back_as_they_went_in(tmp_path: Path, name: str) -> None:
    store = stored(tmp_path / name, AWKWARD)
    assert store.rows(range(5)) == AWKWARD and store.next_row == 5
    store.close()
    assert PassageStore(tmp_path / name).rows([3]) == AWKWARD[3:4]


def test_passages_keep_the_order_and_the_repeats_of_their_rows(tmp_path: Path) -> None:
    store = stored(tmp_path / "p.sqlite", AWKWARD)
    assert [p.id for p in store.rows(np.array([3, 0, 3], dtype=np.int32))] == ["😀", "a", "😀"]  # type: ignore[arg-type]
    assert store.row("😀") == 3 and store.row("b") is None
    for row in (-1, 5):
        with pytest.raises(IndexError, match=f"row {row} is no passage"):
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

    assert stored(tmp_path / "p.sqlite", stream()).next_row == 500
    assert most <= 3


def test_passages_are_read_only_and_shared_by_threads(tmp_path: Path) -> None:
    store = stored(tmp_path / "p.sqlite", AWKWARD)
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        store._database.execute("DELETE FROM passages")
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


@pytest.fixture
def no_right_to_write(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Readers cannot keep SQLite's books; writers, whose connections are no URI, can. What readers asked for."""
    connect, asked = sqlite3.connect, []

    def refuse(path: str | Path, **options: Any) -> sqlite3.Connection:
        if "uri" in options:
            asked.append(str(path))
            if "immutable" not in str(path):
                error = sqlite3.OperationalError("unable to open database file")
                error.sqlite_errorcode = sqlite3.SQLITE_CANTOPEN
                raise error
        return connect(path, **options)

    monkeypatch.setattr(sqlite3, "connect", refuse)
    return asked


def test_passages_are_read_where_nothing_may_be_written(tmp_path: Path, no_right_to_write: list[str]) -> None:
    stored(tmp_path / "p.sqlite", AWKWARD).close()
    assert PassageStore(tmp_path / "p.sqlite").rows([0]) == AWKWARD[:1] and len(no_right_to_write) == 4


@pytest.mark.usefixtures("no_right_to_write")
@pytest.mark.parametrize(
    "read",
    [
        lambda store: store.rows([3000]),
        lambda store: store.rows([0]),  # gone by then
        lambda store: store.row("0"),
        lambda store: store.live(),
        lambda store: list(store.ids()),
        lambda store: store.fulfilling(["n>=1"]),
    ],
)
def test_passages_that_another_user_changes_are_not_garbage(tmp_path: Path, read: Callable[[Any], Any]) -> None:
    passages = [Passage(str(row), "", f"text {row} " * 20) for row in range(4000)]
    store = stored(tmp_path / "p.sqlite", passages, ({"n": row} for row in range(4000)))
    read(store)
    with transaction(tmp_path / "p.sqlite") as database:
        remove(database, [str(row) for row in range(3900) if row != 3000])
    fold(tmp_path / "p.sqlite")
    with pytest.raises(TandemError, match=r"p\.sqlite were changed while they were read .*; open the index again"):
        read(store)
    assert PassageStore(tmp_path / "p.sqlite").rows([3000]) == passages[3000:3001]


@pytest.mark.usefixtures("no_right_to_write")
def test_passages_that_are_still_as_they_were_opened_can_be_read(tmp_path: Path) -> None:
    store = stored(tmp_path / "p.sqlite", AWKWARD)
    held = sqlite3.connect(tmp_path / "p.sqlite")
    held.execute("SELECT * FROM state").fetchall()  # so that what is written stays in the log
    with transaction(tmp_path / "p.sqlite") as database:
        remove(database, ["a"])
    assert store.rows([0]) == AWKWARD[:1] and store.row("a") == 0
    held.close()


def test_a_passage_store_that_is_missing_is_named_and_not_made(tmp_path: Path) -> None:
    with pytest.raises(TandemError, match=r"p\.sqlite are missing or damaged"):
        PassageStore(tmp_path / "p.sqlite")
    assert list(tmp_path.iterdir()) == []


def test_passages_on_a_disk_that_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    connect = sqlite3.connect

    def connect_to_small_disk(path: Path, **options: Any) -> sqlite3.Connection:
        connection = connect(path, **options)
        connection.execute("PRAGMA max_page_count = 16")  # SQLite itself then says "database or disk is full"
        return connection

    monkeypatch.setattr(sqlite3, "connect", connect_to_small_disk)
    with pytest.raises(OSError) as raised:
        stored(tmp_path / "p.sqlite", [Passage(str(row), "", "x" * 1000) for row in range(1000)])
    assert raised.value.errno == errno.ENOSPC


@pytest.mark.parametrize(
    ("table", "read"),
    [
        ("fields", lambda store: store.fulfilling(["n>=1"])),
        ("fields", lambda store: store.fields),
        ("passages", lambda store: list(store.ids())),
        ("passages", lambda store: store.rows([150])),
        ("sqlite_autoindex_passages_1", lambda store: store.row("150")),
        ("tombstones", lambda store: store.live()),
    ],
)
def test_a_damaged_page_is_named_whatever_reads_it(
    tmp_path: Path, table: str, read: Callable[[PassageStore], object]
) -> None:
    path = tmp_path / "p.sqlite"
    passages = [Passage(str(row), "", "t" * 200) for row in range(300)]
    stored(path, passages, ({"n": row} for row in range(300))).close()
    with sqlite3.connect(path) as database:
        (page,) = database.execute("SELECT rootpage FROM sqlite_master WHERE name = ?", (table,)).fetchone()
        (size,) = database.execute("PRAGMA page_size").fetchone()
    database.close()
    store = PassageStore(path)  # reads the tombstones, as yet whole
    with path.open("r+b") as file:
        file.seek((page - 1) * size)
        file.write(b"\xff" * size)
    if table == "tombstones":
        store._database.execute("ROLLBACK")
        store._database.execute("PRAGMA cache_size = 0")
    with pytest.raises(TandemError, match=r"p\.sqlite are missing or damaged \(.*malformed.*\); build"):
        read(store)


def test_a_change_in_the_log_of_passages_that_may_not_be_written_is_named(
    tmp_path: Path, no_right_to_write: list[str]
) -> None:
    stored(tmp_path / "p.sqlite", AWKWARD).close()
    (tmp_path / "p.sqlite-wal").write_bytes(b"a change")
    with pytest.raises(TandemError, match="a change is still in the log beside them; open the index once with"):
        PassageStore(tmp_path / "p.sqlite")
    assert all("immutable" not in path for path in no_right_to_write[-1:])


def test_a_committed_change_does_not_fail_because_its_log_cannot_be_put_away(tmp_path: Path) -> None:
    path = tmp_path / "p.sqlite"
    stored(path, AWKWARD).close()
    with transaction(path) as database:
        remove(database, [AWKWARD[0].id])
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("PRAGMA locking_mode = EXCLUSIVE")
        other.execute("BEGIN EXCLUSIVE")
        other.execute("UPDATE state SET next_row = next_row")
        fold(path)
        other.execute("COMMIT")
        with pytest.raises(TandemError, match=r"Another program keeps the passages .* locked"), transaction(path):
            pass


def test_rows_end_where_they_would_no_longer_be_int32(tmp_path: Path) -> None:
    path = tmp_path / "p.sqlite"
    stored(path, AWKWARD).close()
    with transaction(path) as database:
        database.execute("UPDATE state SET next_row = ?", (2**31 - 2,))
    new = [Record(Passage(name, "", "t"), {}) for name in ("a", "b", "c")]
    with pytest.raises(TandemError, match="given all of its 2³¹ rows"), transaction(path) as database:
        put(database, new)
    with transaction(path) as database:
        put(database, new[:2])
    store = PassageStore(path)
    assert store.row("b") == 2**31 - 1 and store.row("c") is None


# What passages carry, and conditions on it


FIELDS: list[dict[str, Any]] = [
    {"year": 1999, "lang": "en", "tags": ["old", "short"]},
    {"year": 2001, "lang": "de", "score": 0.5, "free": True},
    {"year": 2001.5, "lang": "en", "date": "2001-05-31", "nested": {"not": "searchable"}},
    {"year": "2001", "tags": ["short"], "free": False, "big": 2**70},
    {},
    {"lang": "日本", "date": "1999-12-01", "none": None, "a b": "with = and > inside"},
]


@pytest.mark.parametrize(
    ("condition", "rows"),
    [
        ("year=2001", [1, 3]),
        ("year>=2001", [1, 2, 3]),
        ("year>2001", [2]),
        ("year<2001", [0]),
        (" year <= 2001.5 ", [0, 1, 2, 3]),
        ("year=2001.50", [2]),
        ("lang=en", [0, 2]),
        ("lang=日本", [5]),
        ("tags=short", [0, 3]),
        ("tags=old", [0]),
        ("free=true", [1]),
        ("free=false", [3]),
        ("score>0.4", [1]),
        ("big>1e20", [3]),
        ("date>=2000-01-01", [2]),
        ("date<2000-01-01", [5]),
        ("a b=with = and > inside", [5]),
        ("lang=xx", []),
        ("year>=" + "9" * 400, []),
        ("year<" + "9" * 400, [0, 1, 2, 3]),
        ("year>-" + "9" * 5000, [0, 1, 2, 3]),
        ("year<=1e999", [0, 1, 2, 3]),
        ("lang>=inf", [5]),
        ("year>=9223372036854775807", []),
    ],
)
def test_a_condition_is_true_of_the_passages_it_says(tmp_path: Path, condition: str, rows: list[int]) -> None:
    store = stored(tmp_path / "p.sqlite", [Passage(str(row), "", "t") for row in range(6)], FIELDS)
    assert np.flatnonzero(store.fulfilling([condition])).tolist() == rows


def test_several_conditions_must_all_hold(tmp_path: Path) -> None:
    store = stored(tmp_path / "p.sqlite", [Passage(str(row), "", "t") for row in range(6)], FIELDS)
    assert np.flatnonzero(store.fulfilling(["year>=1999", "lang=en", "tags=old"])).tolist() == [0]
    assert store.fulfilling([]).all()
    assert store.fields == ["a b", "big", "date", "free", "lang", "score", "tags", "year"]
    assert store.metadata([2, 4]) == [FIELDS[2], {}]


@pytest.mark.parametrize(
    "condition", ["year", "=2001", "year=", "", "year>", "year ! 3", "year=>", ">=3", "a=\udcff"]
)
def test_a_condition_that_cannot_be_read_is_named(condition: str) -> None:
    with pytest.raises(TandemError, match=r"cannot be read; write it like year>=2001 or lang=en"):
        Condition.parse(condition)


def test_a_field_that_nothing_has_is_named_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(TandemError, match="No passage has a field 'yaer' to search by; choose one of a b, big, "):
        stored(tmp_path / "p.sqlite", [*AWKWARD, Passage("n", "", "t")], FIELDS).fulfilling(["yaer=1"])
    with pytest.raises(TandemError, match="no passage has any"):
        stored(tmp_path / "q.sqlite", AWKWARD).fulfilling(["year=1"])


def test_fields_stand_at_the_top_or_in_metadata() -> None:
    record = {"_id": "p", "title": "", "text": "t", "year": 1, "lang": "en", "metadata": {"year": 2, "x": [1]}}
    assert metadata_of("f", 1, record) == {"year": 2, "lang": "en", "x": [1]}
    assert metadata_of("f", 1, {"_id": "p", "text": "t", "metadata": None}) == {}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lang\ud800": "en"}, r"line 1: field lang\\ud800 holds half of a surrogate pair"),
        ({"a": {"b": ["\ud800"]}}, "line 1: field a holds half of a surrogate pair"),
        ({"a": {"b": [float("nan")]}}, "line 1: field a cannot be kept as JSON .*; change its value"),
        ({"metadata": {"a": [[float("inf")]]}}, "line 1: field a cannot be kept as JSON"),
        ({"metadata": {"\ud800": 1}}, "holds half of a surrogate pair"),
        ({"a": object()}, "line 1: field a cannot be kept as JSON"),
    ],
)
def test_metadata_that_is_not_json_is_named_however_deep(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(TandemError, match=message) as raised:
        metadata_of("f", 1, {"_id": "p", "text": "t", **fields})
    str(raised.value).encode("utf-8")


def test_a_number_too_large_to_compare_is_an_identifier(tmp_path: Path) -> None:
    fields = [{"big": 10**399, "list": [1, -(10**399)]}]
    store = stored(tmp_path / "p.sqlite", [Passage("p", "", "t")], fields)
    assert store.metadata([0]) == fields
    assert store.fulfilling([f"big={10**399}"]).all() and store.fulfilling(["list>=1"]).all()
    assert not store.fulfilling([f"big={10**399 + 1}"]).any() and not store.fulfilling(["list<0"]).any()


@pytest.mark.parametrize("field", ["order", "sha", "number"])
def test_a_whole_number_beyond_64_bits_equals_no_other(tmp_path: Path, field: str) -> None:
    fields = [
        {"order": "12345678901234567890", "sha": "12e999", "number": 12345678901234567890},
        {"order": "12345678901234567891", "sha": "77e4512", "number": 12345678901234567891},
    ]
    store = stored(tmp_path / "p.sqlite", [Passage(str(row), "", "t") for row in range(2)], fields)
    for row in range(2):
        assert np.flatnonzero(store.fulfilling([f"{field}={fields[row][field]}"])).tolist() == [row]
    assert store.fulfilling(["number>=1e19"]).all() and not store.fulfilling(["sha>=5"]).any()


# Vectors


def test_dense_search_is_exact_over_half_precision(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    vectors = random.normal(size=(3000, 24)).astype(np.float32)
    queries = random.normal(size=(1500, 24)).astype(np.float32)
    DenseIndex.build(vectors).save(tmp_path / "v.faiss")
    index = DenseIndex.load(tmp_path / "v.faiss")
    rows, scores = index.search(queries, 10)
    kept = index.vectors(np.arange(3000))
    np.testing.assert_allclose(kept, vectors, rtol=2**-11, atol=2**-24)  # half a unit in the last place
    products = queries.astype(np.float64) @ kept.astype(np.float64).T
    best = -np.sort(-products, axis=1)[:, :10]
    assert rows.dtype == np.int32 and scores.dtype == np.float32
    np.testing.assert_allclose(scores, best, atol=1e-4)
    np.testing.assert_allclose(np.take_along_axis(products, rows.astype(np.int64), axis=1), best, atol=1e-4)


def test_one_query_finds_in_threads_what_it_finds_in_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    vectors = random.integers(-3, 4, size=(300, 8)).astype(np.float32)  # with ties, exact in half precision
    queries = random.integers(-3, 4, size=(20, 8)).astype(np.float32)
    index = DenseIndex.build(vectors)
    products = queries.astype(np.float64) @ vectors.astype(np.float64).T
    monkeypatch.setattr("tandemqa.index.dense.WORTH_SHARING", 1)
    torch.set_num_threads(3)
    try:
        for allowed in (None, random.random(300) < 0.5, np.arange(300) == 7, np.arange(300) > 297):
            open_ones = products if allowed is None else np.where(allowed, products, -np.inf)
            best = -np.sort(-open_ones, axis=1)[:, :10]
            for number in range(len(queries)):
                rows, scores = index.search(queries[number : number + 1], 10, allowed)
                np.testing.assert_allclose(scores[0], best[number], rtol=1e-6)
                present = rows[0] >= 0
                assert len(set(rows[0][present].tolist())) == present.sum() == np.isfinite(best[number]).sum()
                np.testing.assert_allclose(open_ones[number, rows[0][present]], best[number][present], rtol=1e-6)
    finally:
        torch.set_num_threads(1)


def test_dense_search_gives_no_more_than_there_is() -> None:
    rows, _ = DenseIndex.build(np.eye(4, dtype=np.float32)).search(np.eye(4, dtype=np.float32)[:2], 10)
    assert rows.shape == (2, 4) and sorted(rows[0].tolist()) == [0, 1, 2, 3]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_vector_that_is_not_finite_is_named(value: float) -> None:
    vectors = np.ones((5, 4), dtype=np.float32)
    vectors[3, 1] = value
    with pytest.raises(TandemError, match="passage row 3"):
        DenseIndex.build(vectors)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_vectors_on_a_disk_that_is_really_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = DenseIndex.build(np.ones((1000, 8), dtype=np.float32))
    monkeypatch.setattr("secrets.token_hex", lambda size: "mark")
    (tmp_path / ".vectors.faiss.mark.partial").symlink_to("/dev/full")
    with pytest.raises(TandemError, match=r"The disk is full: .*vectors\.faiss was not written"):
        index.save(tmp_path / "vectors.faiss")
    assert list(tmp_path.iterdir()) == []


def clusters(count: int, size: int = 16) -> np.ndarray:
    """Unit vectors around 50 centres, as texts on 50 topics might give them."""
    random = np.random.default_rng(1)
    centres = random.normal(size=(50, size))
    vectors = centres[random.integers(50, size=count)] + 0.5 * random.normal(size=(count, size))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("storage", ["fp16", "int8"])
@pytest.mark.parametrize("kind", ["exact", "ivf", "hnsw"])
def test_every_structure_reaches_its_recall_and_keeps_to_what_is_allowed(
    tmp_path: Path, kind: Kind, storage: Storage
) -> None:
    vectors, queries = clusters(6000), clusters(6100)[6000:]
    blocks = [vectors[:2500].astype(np.float16), vectors[2500:].astype(np.float16)]
    index = DenseIndex.of_blocks(blocks, kind, storage)
    measured = recall.tune(index, blocks, queries, k=10)
    assert kind == "exact" or index.breadth < index.widest
    index.save(tmp_path / "v.faiss")
    loaded = DenseIndex.load(tmp_path / "v.faiss")
    assert (len(loaded), loaded.kind, loaded.breadth) == (6000, kind, index.breadth)

    products = queries.astype(np.float64) @ np.concatenate(blocks).astype(np.float64).T
    tenth = -np.sort(-products, axis=1)[:, 9:10]
    rows, _ = loaded.search(queries, 10)
    shares = (np.take_along_axis(products, rows.astype(np.int64), axis=1) >= tenth - 1e-5).mean()
    assert measured.queries == 100 and measured.value == pytest.approx(shares, abs=1e-9)
    assert measured.value >= (1.0 if (kind, storage) == ("exact", "fp16") else 0.93)

    for share in (0.5, 0.05, 0.002):
        allowed = np.random.default_rng(2).random(6000) < share
        rows, scores = loaded.search(queries, 10, allowed)
        assert allowed[rows].all() and np.isfinite(scores).all()
        masked = np.where(allowed, products, -np.inf)
        tenth = -np.sort(-masked, axis=1)[:, 9:10]
        found = (np.take_along_axis(masked, rows.astype(np.int64), axis=1) >= tenth - 1e-5).mean()
        assert found >= (1.0 if (kind, storage) == ("exact", "fp16") else 0.9), share
    allowed = np.zeros(6000, dtype=np.bool_)
    assert (loaded.search(queries, 3, allowed)[0] == -1).all()
    allowed[[7, 5999]] = True
    rows, scores = loaded.search(queries, 3, allowed)
    assert all(sorted(found) == [-1, 7, 5999] for found in rows.tolist())
    assert np.isneginf(scores[rows == -1]).all()


def test_int8_is_off_by_a_step_of_the_range_of_each_number_at_most() -> None:
    vectors = clusters(5000)
    kept = DenseIndex.of_blocks([vectors], "exact", "int8").vectors(np.arange(5000))
    step = (vectors.max(axis=0) - vectors.min(axis=0)) / 255
    assert (np.abs(kept - vectors) <= step + 1e-6).all()


def test_recall_of_passages_leaves_each_out_of_its_own_neighbours() -> None:
    vectors = clusters(300)
    index = DenseIndex.of_blocks([vectors], "exact", "fp16")
    # An index that finds nothing but the passage itself has found none of its neighbours.
    index.search = lambda queries, k: (  # type: ignore[method-assign, assignment]
        np.argmax(queries @ vectors.T, axis=1)[:, None].astype(np.int32),
        np.zeros((len(queries), 1), dtype=np.float32),
    )
    assert recall.tune(index, [vectors], None) == recall.Recall(0.0, 50, 200, "passages")


def test_a_search_is_not_widened_for_what_rounding_has_lost() -> None:
    random = np.random.default_rng(0)
    # So close to one another that bytes cannot tell them apart, but for one number of great range.
    vectors = (1 + 1e-3 * random.normal(size=(2000, 8))).astype(np.float32)
    vectors[::2] *= 100
    index = DenseIndex.of_blocks([vectors], "ivf", "int8")
    measured = recall.tune(index, [vectors], vectors[1::2][:100])
    assert measured.value < recall.TARGET and index.breadth < index.widest


def test_recall_is_measured_on_as_little_as_one_passage() -> None:
    vectors = np.ones((1, 4), dtype=np.float16)
    for kind in ("exact", "ivf", "hnsw"):
        assert recall.tune(DenseIndex.of_blocks([vectors], kind, "int8"), [vectors], None).value == 1.0


# Words


def test_words_find_nothing_where_none_is_shared(tmp_path: Path) -> None:
    LexicalIndex.build(["cats purr", "dogs bark", "the cat sat"]).save(tmp_path / "bm25")
    rows, scores = LexicalIndex.load(tmp_path / "bm25").search(["a cat", "quantum", ""], 5)
    assert sorted(rows[0].tolist()) == [-1, 0, 2] and rows[1:].tolist() == [[-1] * 3] * 2
    assert np.isneginf(scores[1:]).all() and (scores[0][rows[0] >= 0] > 0).all()


@pytest.mark.parametrize("texts", [["?!"], ["", "the"], ["a"]])
def test_passages_without_a_word_are_found_by_none(texts: list[str], tmp_path: Path) -> None:
    LexicalIndex.build(texts).save(tmp_path / "bm25")
    assert (LexicalIndex.load(tmp_path / "bm25").search(["the cat", "?!"], 2)[0] == -1).all()


def test_a_part_of_stop_words_alone_divides_by_nothing(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parts = [LexicalIndex.build(texts) for texts in (["the", "of a"], ["cats purr", "the dogs"])]
        rows, scores = search_parts(parts, ["the cat"], 4, [None, None])
    assert rows.tolist() == [[2, -1, -1, -1]] and scores[0, 0] > 0


def test_parts_score_as_one_index_of_all_does(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    vocabulary = [f"word{number}" for number in range(60)]
    texts = [" ".join(random.choice(vocabulary, size=random.integers(1, 60))) for _ in range(400)]
    # Parts of very different size and length of text.
    order = sorted(range(400), key=lambda row: len(texts[row]))
    texts = [texts[row] for row in order]
    ends = [1, 2, 30, 400]
    parts = []
    for start, end in zip([0, *ends], ends, strict=False):
        LexicalIndex.build(texts[start:end]).save(tmp_path / str(start))
        parts.append(LexicalIndex.load(tmp_path / str(start)))
    queries = ["word1 word2 word59", "word3 word3", "word7", "nothing", "word5 nothing"]

    oracle = bm25s.BM25(k1=1.2, b=0.75)
    oracle.index(bm25s.tokenize(texts, stopwords="en", stemmer=Stemmer.Stemmer("english"), show_progress=False))
    allowed = random.random(400) < 0.5
    rows, scores = search_parts(parts, queries, 400, [None] * 4)
    some, _ = search_parts(parts, queries, 400, np.split(allowed, ends[:-1]))
    for number, query in enumerate(queries):
        (words,) = bm25s.tokenize(
            [query], stopwords="en", stemmer=Stemmer.Stemmer("english"), return_ids=False, show_progress=False
        )
        known = [word for word in words if word in oracle.vocab_dict]
        expected = oracle.get_scores(known) if known else np.zeros(400)
        found = rows[number][rows[number] >= 0]
        assert sorted(found.tolist()) == np.flatnonzero(expected > 0).tolist()
        np.testing.assert_allclose(scores[number][: len(found)], expected[found], rtol=1e-4)
        assert some[number][some[number] >= 0].tolist() == [row for row in found.tolist() if allowed[row]]
        top, _ = search_parts(parts, queries, 3, [None] * 4)
        np.testing.assert_array_equal(top[number], rows[number][:3])


def test_a_string_that_reads_as_a_number_is_found_by_its_string_and_by_ranges() -> None:
    assert list(searchable({"year": "2020", "code": "07", "name": "x1"})) == [
        ("year", "2020"),
        ("year", 2020),
        ("code", "07"),
        ("code", 7),
        ("name", "x1"),
    ]
