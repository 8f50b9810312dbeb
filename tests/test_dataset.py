"""Reading a folder in BEIR layout: what is in it comes out, and whatever is wrong is named."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from tandemqa.data.dataset import Dataset, Passage, Passages, load_dataset
from tandemqa.errors import TandemError

REAL = Path(__file__).parents[2] / "shared" / "data"

CORPUS: list[dict[str, object]] = [
    {"_id": "p1", "title": "Tea", "text": "Steep green tea at seventy degrees."},
    {"_id": "p2", "text": "Bread rises while yeast eats sugar."},
    {"_id": "p3", "title": None, "text": "A tide follows the moon."},
    {"_id": "p4", "title": "Only a title", "text": ""},
]
QUERIES = [{"_id": "q1", "text": "how hot for green tea"}, {"_id": "q2", "text": "why does dough swell"}]
QRELS = "query-id\tcorpus-id\tscore\nq1\tp1\t2\nq1\tp3\t0\nq2\tp2\t1\n"


def jsonl(records: Sequence[Mapping[str, object]]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    (folder / "qrels").mkdir(parents=True)
    (folder / "corpus.jsonl").write_text(jsonl(CORPUS), encoding="utf-8")
    (folder / "queries.jsonl").write_text(jsonl(QUERIES), encoding="utf-8")
    (folder / "qrels" / "test.tsv").write_text(QRELS, encoding="utf-8")
    return folder


def contents(dataset: Dataset) -> tuple[object, ...]:
    return list(dataset.passages), dataset.passages.ids, dataset.queries, dataset.qrels


def test_a_folder_comes_back_as_it_was_written(folder: Path) -> None:
    dataset = load_dataset(str(folder))
    assert list(dataset.passages) == [
        Passage("p1", "Tea", "Steep green tea at seventy degrees."),
        Passage("p2", "", "Bread rises while yeast eats sugar."),
        Passage("p3", "", "A tide follows the moon."),
        Passage("p4", "Only a title", ""),
    ]
    assert dataset.folder == folder
    assert len(dataset.passages) == 4
    assert dataset.passages[2].id == "p3"
    assert dataset.passages.ids == ["p1", "p2", "p3", "p4"]
    assert dataset.passages.row == {"p1": 0, "p2": 1, "p3": 2, "p4": 3}
    assert dataset.queries == {"q1": "how hot for green tea", "q2": "why does dough swell"}
    assert dataset.qrels == {"test": {"q1": {"p1": 2, "p3": 0}, "q2": {"p2": 1}}}


def test_the_full_text_is_title_and_text() -> None:
    assert Passage("p", "Tea", "is hot").full == "Tea is hot"
    assert Passage("p", "", "is hot").full == "is hot"
    assert Passage("p", "Tea", "").full == "Tea"


@pytest.mark.parametrize("row", [-1, 4])
def test_a_row_outside_the_corpus_is_an_index_error(folder: Path, row: int) -> None:
    with pytest.raises(IndexError):
        load_dataset(folder).passages[row]


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda data: data.replace(b"\n", b"\r\n"), id="CRLF line ends"),
        pytest.param(lambda data: b"\xef\xbb\xbf" + data, id="a byte order mark"),
        pytest.param(lambda data: b"\n" + data.replace(b"\n", b"\n \n"), id="blank lines between"),
        pytest.param(lambda data: data.removesuffix(b"\n"), id="no newline at the end"),
    ],
)
def test_files_mean_the_same_with(folder: Path, change: Callable[[bytes], bytes]) -> None:
    before = contents(load_dataset(folder))
    for path in [folder / "corpus.jsonl", folder / "queries.jsonl", folder / "qrels" / "test.tsv"]:
        path.write_bytes(change(path.read_bytes()))
    assert contents(load_dataset(folder)) == before


@pytest.mark.parametrize(
    "qrels",
    [
        pytest.param("q1\tp1\t2\nq1\tp3\t0\nq2\tp2\t1\n", id="no header"),
        pytest.param("q1 0 p1 2\nq1 0 p3 0\nq2 Q0 p2 1\n", id="four TREC columns and spaces"),
        pytest.param("q1\t0\tp1\t2\nq1\t0\tp3\t0\nq2\t0\tp2\t1\n", id="four TREC columns and tabs"),
        pytest.param(QRELS + "q2\tp2\t1\n", id="a line said twice"),
    ],
)
def test_qrels_mean_the_same_with(folder: Path, qrels: str) -> None:
    before = load_dataset(folder).qrels
    (folder / "qrels" / "test.tsv").write_text(qrels, encoding="utf-8")
    assert load_dataset(folder).qrels == before


def test_ids_and_text_may_be_any_unicode(folder: Path) -> None:
    ids = ["日本語", "Ωmega 7", "😀", "line\u2028separator", "no\u00a0break"]
    (folder / "corpus.jsonl").write_text(
        jsonl([{"_id": name, "text": f"über {name}"} for name in ids]), encoding="utf-8"
    )
    (folder / "queries.jsonl").write_text(json.dumps({"_id": "Жq", "text": "что?"}), encoding="utf-8")
    (folder / "qrels" / "test.tsv").write_text("".join(f"Жq\t{name}\t1\n" for name in ids), encoding="utf-8")
    dataset = load_dataset(folder)
    assert [(passage.id, passage.text) for passage in dataset.passages] == [(n, f"über {n}") for n in ids]
    assert dataset.queries == {"Жq": "что?"}
    assert dataset.judged("test") == {"Жq": dict.fromkeys(ids, 1)}


def test_every_visible_tsv_is_a_split(folder: Path) -> None:
    for name in ["train.tsv", "held-out.tsv", ".hidden.tsv", "notes.txt"]:
        (folder / "qrels" / name).write_text(QRELS, encoding="utf-8")
    assert list(load_dataset(folder).qrels) == ["held-out", "test", "train"]


def test_the_fingerprint_changes_with_content_and_with_names_only(folder: Path) -> None:
    first = load_dataset(folder).fingerprint
    assert first == load_dataset(folder).fingerprint
    assert len(first) == 16
    (folder / "qrels" / "test.tsv").rename(folder / "qrels" / "train.tsv")
    renamed = load_dataset(folder).fingerprint
    (folder / "queries.jsonl").write_text(jsonl(QUERIES).replace("swell", "rise"), encoding="utf-8")
    changed = load_dataset(folder).fingerprint
    assert len({first, renamed, changed}) == 3


P1 = '{"_id": "p1", "text": "tea"}'

BAD_LINES = [  # content of the corpus or the queries, line at fault, what the message must name
    pytest.param(f'{P1}\n{{"_id": "p2", "text"\n', 2, "JSON", id="a malformed JSON line"),
    pytest.param(f'{P1}\n{{"_id": "p2", "text": "a"}} {{}}\n', 2, "JSON", id="two objects on a line"),
    pytest.param(f"{P1}\n" + "[" * 100_000 + "\n", 2, "JSON", id="JSON nested without end"),
    pytest.param(f'\n\n{P1}\n["p2", "text"]\n', 4, "object", id="a line that is an array"),
    pytest.param(f'{P1}\n"p2"\n', 2, "object", id="a line that is a string"),
    pytest.param(f'{P1}\n{{"text": "bread"}}\n', 2, "_id", id="a missing _id"),
    pytest.param(f'{P1}\n{{"_id": "", "text": "bread"}}\n', 2, "_id", id="an empty _id"),
    pytest.param(f'{P1}\n{{"_id": " \\t", "text": "bread"}}\n', 2, "_id", id="a blank _id"),
    pytest.param(f'{P1}\n{{"_id": 7, "text": "bread"}}\n', 2, "_id is 7", id="an _id that is a number"),
    pytest.param(f'{P1}\n{{"_id": null, "text": "bread"}}\n', 2, "_id is null", id="an _id that is null"),
    pytest.param(f'{P1}\n{{"_id": "p\\ud83d", "text": "bread"}}\n', 2, "_id", id="half a surrogate pair in _id"),
    pytest.param(f"{P1}\n{P1}\n", 2, "_id repeats 'p1'", id="a duplicate _id"),
    pytest.param(f'{P1}\n{{"_id": "p2"}}\n', 2, "text", id="a missing text"),
    pytest.param(f'{P1}\n{{"_id": "p2", "text": "  "}}\n', 2, "text", id="an empty text"),
    pytest.param(f'{P1}\n{{"_id": "p2", "text": ["a"]}}\n', 2, "text", id="a text that is a list"),
    pytest.param(f'{P1}\n{{"_id": "p2", "text": "\\udc00"}}\n', 2, "text", id="half a surrogate pair in text"),
    pytest.param(f'{P1}\n{{"_id": "p2", "text": "caf\xe9"}}\n'.encode("latin-1"), 2, "UTF-8", id="Latin-1 text"),
    pytest.param(f"{P1}\n".encode("utf-16"), 1, "UTF-8", id="UTF-16"),
]


@pytest.mark.parametrize("name", ["corpus.jsonl", "queries.jsonl"])
@pytest.mark.parametrize(("content", "line", "named"), BAD_LINES)
def test_a_record_is_refused_for(folder: Path, name: str, content: str | bytes, line: int, named: str) -> None:
    data = content if isinstance(content, bytes) else content.encode("utf-8")
    (folder / name).write_bytes(data)
    with pytest.raises(TandemError) as raised:
        load_dataset(folder)
    assert str(raised.value).startswith(f"{folder / name}, line {line}: ")
    assert named in str(raised.value)


@pytest.mark.parametrize(
    ("record", "named"),
    [
        pytest.param({"_id": "p2", "title": "", "text": ""}, "text", id="title and text empty"),
        pytest.param({"_id": "p2", "title": " ", "text": "\n"}, "text", id="title and text blank"),
        pytest.param({"_id": "p2", "title": 3, "text": "bread"}, "title", id="a title that is a number"),
    ],
)
def test_a_passage_is_refused_for(folder: Path, record: dict[str, object], named: str) -> None:
    (folder / "corpus.jsonl").write_text(f"{P1}\n{json.dumps(record)}\n", encoding="utf-8")
    with pytest.raises(TandemError, match=rf"corpus\.jsonl, line 2: field {named} "):
        load_dataset(folder)


@pytest.mark.parametrize(
    ("content", "line", "named"),
    [
        pytest.param("q1\tp1\n", 1, "2 columns", id="two columns"),
        pytest.param("q1,p1,1\n", 1, "1 column;", id="commas"),
        pytest.param("q1\tp1\t1\nq2\t0\tp2\t1\n", 2, "4 columns", id="a width that changes"),
        pytest.param(QRELS + "q2\tp1\tyes\n", 5, "score 'yes'", id="a score that is a word"),
        pytest.param(QRELS + "q2\tp1\t1.0\n", 5, "score '1.0'", id="a score with a decimal point"),
        pytest.param(QRELS + "q2\tp1\t\n", 5, "score ''", id="an empty score"),
        pytest.param(QRELS + "q2\tp1\t1_0\n", 5, "score '1_0'", id="a score with an underscore"),
        pytest.param(QRELS + "q2\tp1\t" + "9" * 5000 + "\n", 5, "score", id="a score of 5000 digits"),
        pytest.param(QRELS + "q9\tp1\t1\n", 5, "query-id 'q9'", id="an unknown query"),
        pytest.param(QRELS + "q1\tp9\t1\n", 5, "corpus-id 'p9'", id="an unknown passage"),
        pytest.param(QRELS + "q1\tp1\t1\n", 5, "'p1'", id="two grades for one pair"),
        pytest.param(QRELS.encode() + b"q1\tp\xff\t1\n", 5, "UTF-8", id="a byte that is not UTF-8"),
    ],
)
def test_qrels_are_refused_for(folder: Path, content: str | bytes, line: int, named: str) -> None:
    path = folder / "qrels" / "test.tsv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    with pytest.raises(TandemError) as raised:
        load_dataset(folder)
    assert str(raised.value).startswith(f"{path}, line {line}: ")
    assert named in str(raised.value)


@pytest.mark.parametrize("content", ["", "\n \n"], ids=["empty", "blank"])
@pytest.mark.parametrize("name", ["corpus.jsonl", "queries.jsonl", "qrels/test.tsv"])
def test_a_file_without_rows_is_refused(folder: Path, name: str, content: str) -> None:
    (folder / name).write_text(content, encoding="utf-8")
    with pytest.raises(TandemError, match=f"{name} has no rows"):
        load_dataset(folder)


def test_qrels_with_a_header_alone_are_refused(folder: Path) -> None:
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n", encoding="utf-8")
    with pytest.raises(TandemError, match=r"test\.tsv has no rows"):
        load_dataset(folder)


@pytest.mark.parametrize("name", ["corpus.jsonl", "queries.jsonl", "qrels/test.tsv"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(TandemError, match=name if name.endswith("jsonl") else "qrels has no .tsv file"):
        load_dataset(folder)


def test_a_missing_qrels_folder_is_named(folder: Path) -> None:
    (folder / "qrels" / "test.tsv").unlink()
    (folder / "qrels").rmdir()
    with pytest.raises(TandemError, match=r"qrels has no \.tsv file"):
        load_dataset(folder)


def test_a_folder_in_the_place_of_a_file_is_named(folder: Path) -> None:
    (folder / "queries.jsonl").unlink()
    (folder / "queries.jsonl").mkdir()
    with pytest.raises(TandemError, match=r"queries\.jsonl cannot be read \(Is a directory\)"):
        load_dataset(folder)


@pytest.mark.parametrize("name", ["nowhere", "data/corpus.jsonl"], ids=["nothing", "a file"])
def test_a_dataset_must_be_a_folder(folder: Path, name: str) -> None:
    with pytest.raises(TandemError, match=f"{name} is not a folder"):
        load_dataset(folder.parent / name)


def test_an_error_is_one_sentence(folder: Path) -> None:
    (folder / "corpus.jsonl").write_text(f"{P1}\n{P1}\n", encoding="utf-8")
    with pytest.raises(TandemError) as raised:
        load_dataset(folder)
    where = f"{folder / 'corpus.jsonl'}, line 2"
    assert str(raised.value) == f"{where}: field _id repeats 'p1' of an earlier line; give each line its own."


def test_judged_names_the_splits_that_exist(folder: Path) -> None:
    (folder / "qrels" / "dev.tsv").write_text(QRELS, encoding="utf-8")
    dataset = load_dataset(folder)
    assert dataset.judged("dev") is dataset.qrels["dev"]
    with pytest.raises(TandemError, match=r"qrels has no split 'train'; choose one of dev, test or add train\.tsv"):
        dataset.judged("train")


def test_judged_refuses_a_split_without_a_positive(folder: Path) -> None:
    (folder / "qrels" / "train.tsv").write_text("q1\tp1\t0\nq2\tp2\t-1\n", encoding="utf-8")
    with pytest.raises(TandemError, match=r"train\.tsv has no positive"):
        load_dataset(folder).judged("train")


def test_a_corpus_that_changes_in_use_is_noticed(folder: Path) -> None:
    passages = Passages(folder / "corpus.jsonl")
    with (folder / "corpus.jsonl").open("r+b") as file:
        file.write(b'{"_id": "xx')
    assert passages[1].id == "p2"
    with pytest.raises(TandemError, match=r"corpus\.jsonl was changed while it was in use: passage 'p1'"):
        passages[0]


@pytest.mark.parametrize(
    ("name", "passages", "queries", "judgements"),
    [  # counts from the README and the PROVENANCE.md of the sets
        (
            "medquad",
            15_759,
            {"train": 11_502, "dev": 943, "test": 1_771},
            {"train": 13_020, "dev": 1_086, "test": 2_094},
        ),
        ("scifact", 5_183, {"train": 711, "dev": 98, "test": 300}, {"train": 815, "dev": 104, "test": 339}),
        (
            "squad-small",
            6_219,
            {"train": 12_000, "dev": 1_000, "test": 2_000},
            {"train": 12_008, "dev": 1_000, "test": 2_000},
        ),
    ],
)
def test_real_data_has_its_published_counts(
    name: str, passages: int, queries: dict[str, int], judgements: dict[str, int]
) -> None:
    if not (REAL / name).is_dir():
        pytest.skip(f"the real dataset {REAL / name} is not here")
    dataset = load_dataset(REAL / name)
    assert len(dataset.passages) == passages
    assert {split: len(dataset.judged(split)) for split in dataset.qrels} == queries
    assert {split: sum(map(len, qrels.values())) for split, qrels in dataset.qrels.items()} == judgements


def test_medquad_reads_back_line_by_line_and_loads_within_a_second() -> None:
    folder = REAL / "medquad"
    if not folder.is_dir():
        pytest.skip(f"the real dataset {folder} is not here")
    begin = time.process_time()
    dataset = load_dataset(folder)
    assert time.process_time() - begin < 1.0
    with (folder / "corpus.jsonl").open(encoding="utf-8") as file:
        for passage, line in zip(dataset.passages, file, strict=True):
            record = json.loads(line)
            assert passage == (record["_id"], record["title"], record["text"])
