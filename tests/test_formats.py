"""Data of other formats: what is in a source comes out as a dataset, and whatever is wrong in it is named."""

import csv
import json
import random
import sys
import tracemalloc
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from tandemqa.cli import app
from tandemqa.data.dataset import Dataset, Passage, Passages, load_dataset
from tandemqa.data.formats import source as source_files
from tandemqa.data.formats.convert import convert
from tandemqa.data.formats.judgements import Judgements
from tandemqa.data.formats.ledger import Ledger
from tandemqa.data.formats.recognise import FORMATS, recognise
from tandemqa.describe import describe
from tandemqa.errors import TandemError
from tandemqa.index.index import Index
from tandemqa.index.passages import read_passages
from tandemqa.search.searcher import Searcher

OVEN, YEAST, RYE, SALT = (
    "An oven is ready when flour browns in a minute.",
    "Yeast eats sugar and gives off gas.",
    "Rye holds more water than wheat.",
    "Salt slows the yeast.",
)
HOT, RISE = "how hot must the oven be", "why does dough rise"


def write(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
    return path


def jsonl(*records: object) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def tsv(*rows: tuple[object, ...]) -> str:
    return "".join("\t".join(map(str, row)) + "\n" for row in rows)


def judged(dataset: Dataset) -> dict[str, dict[str, dict[str, int]]]:
    """Split -> text of the query -> title and text of the passage -> grade, whatever the ids."""
    full = {passage.id: passage.full for passage in dataset.passages}
    return {
        split: {
            dataset.queries[query]: {full[passage]: grade for passage, grade in grades.items()}
            for query, grades in qrels.items()
        }
        for split, qrels in dataset.qrels.items()
    }


# A small source in each format


def beir(folder: Path) -> Path:
    passages = [{"_id": "a", "title": "Oven", "text": OVEN, "metadata": {}}, {"_id": "b", "text": YEAST}]
    write(folder / "corpus.jsonl", jsonl(*passages, {"_id": "c", "title": None, "text": RYE}))
    write(folder / "queries.jsonl", jsonl({"_id": "q1", "text": HOT}, {"_id": "q2", "text": RISE}))
    write(folder / "qrels" / "train.tsv", tsv(("query-id", "corpus-id", "score"), ("q1", "a", 2), ("q1", "c", 0)))
    write(folder / "qrels" / "test.tsv", "q2 0 b 1\n")
    return folder


def msmarco(folder: Path) -> Path:
    write(folder / "collection.tsv", tsv((10, OVEN), (11, YEAST), (12, RYE), (13, SALT)))
    write(folder / "queries.train.tsv", tsv((1, HOT)))
    write(folder / "queries.dev.tsv", tsv((2, RISE)))
    write(folder / "queries.dev.small.tsv", tsv((2, RISE)))
    write(folder / "qrels.train.tsv", tsv((1, 0, 10, 1), (1, 0, 11, 2)))
    write(folder / "qrels.dev.small.tsv", "2 0 11 1\n2  0 12  0\n")
    write(folder / "qidpidtriples.train.small.tsv", tsv((1, 10, 12), (1, 10, 13), (1, 10, 11)))
    return folder


def dpr(folder: Path) -> Path:
    oven = {"title": "Oven", "text": OVEN, "score": 1000, "passage_id": "7"}
    records = [
        {
            "question": HOT,
            "answers": ["until flour browns"],
            "positive_ctxs": [oven, {"title": "", "text": YEAST, "psg_id": 8}],
            "negative_ctxs": [{"title": None, "text": SALT}],
            "hard_negative_ctxs": [{"title": "Rye", "text": RYE, "passage_id": ""}],
        },
        {"question": RISE, "positive_ctxs": [{"text": YEAST, "psg_id": "8"}], "hard_negative_ctxs": [oven]},
    ]
    return write(folder / "nq-train.json", json.dumps(records, indent=4))


def wikipedia(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "psgs_w100.tsv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, delimiter="\t")
        rows.writerows([("id", "text", "title"), (1, f'The "deck oven". {OVEN}', "Oven"), (2, RYE, 'Rye "bread"')])
    return folder / "psgs_w100.tsv"


def rocketqa_dual(folder: Path) -> Path:
    rows = [(HOT, "Oven", OVEN, "", RYE, 0), (HOT, "Oven", OVEN, "", SALT, 0), (RISE, "", YEAST, "Oven", OVEN, 0)]
    return write(folder / "dual.train.tsv", tsv(*rows))


def rocketqa_cross(folder: Path) -> Path:
    rows = [(HOT, "Oven", OVEN, 1), (HOT, "", RYE, 0), (HOT, "", YEAST, 2), (RISE, "", YEAST, 1)]
    return write(folder / "cross.train.tsv", tsv(*rows))


def pairs_jsonl(folder: Path) -> Path:
    first = {"question": HOT, "title": "Oven", "passage": OVEN, "negatives": [RYE, {"title": "Salt", "text": SALT}]}
    return write(folder / "pairs.jsonl", jsonl(first, {"query": HOT, "text": YEAST, "score": 2, "negatives": None}))


def pairs_csv(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "pairs.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["Query", "positive", "negative_1", "negative_2", "score"])
        rows.writerow([HOT, 'Two\n\nparagraphs, one "quoted".', RYE, "", 1])
        rows.writerow([HOT, OVEN, RYE, SALT, 3])
    return folder / "pairs.csv"


def pairs_tsv(folder: Path) -> Path:
    return write(
        folder / "pairs.tsv", tsv(("question", "passage", "negative"), (HOT, OVEN, RYE), (RISE, YEAST, SALT))
    )


def passages_jsonl(folder: Path) -> Path:
    oven = {"id": 7, "title": "Oven", "text": OVEN, "year": 2001, "tags": ["heat", '"query": 1'], "gone": None}
    nested = {"id": "r/1", "title": None, "text": RYE, "metadata": {"year": 1999, "lang": "en"}, "year": 5}
    return write(folder / "documents.jsonl", jsonl(oven, {"Text": YEAST, "id": None}, nested))


def passages_csv(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "documents.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow([" ID ", "Title", "Year", "passage", "lang", ""])
        rows.writerows([(7, "Oven", 2001, OVEN, "", ""), ("é 2", "", "", f'"Two"\n{YEAST}', "en", "")])
    return folder / "documents.csv"


def passages_tsv(folder: Path) -> Path:
    return write(folder / "documents.tsv", tsv(("text", "year"), (OVEN, 2001), (OVEN, 1999), (OVEN, 2001), (RYE, "")))


PASSAGES = {"JSONL": passages_jsonl, "CSV": passages_csv, "TSV": passages_tsv}


class Case(NamedTuple):
    """A source, the format it is in, and what must come out of it: passages in order, and judgements."""

    build: Callable[[Path], Path]
    format: str
    passages: list[tuple[str, str]]
    judged: dict[str, dict[str, dict[str, int]]]


OVEN_FULL = f"Oven {OVEN}"
CASES = {
    "BEIR": Case(
        beir,
        "beir",
        [("Oven", OVEN), ("", YEAST), ("", RYE)],
        {"train": {HOT: {OVEN_FULL: 2, RYE: 0}}, "test": {RISE: {YEAST: 1}}},
    ),
    "MS MARCO": Case(
        msmarco,
        "msmarco",
        [("", OVEN), ("", YEAST), ("", RYE), ("", SALT)],
        {"train": {HOT: {OVEN: 1, YEAST: 2, RYE: 0, SALT: 0}}, "dev": {RISE: {YEAST: 1, RYE: 0}}},
    ),
    "DPR": Case(
        dpr,
        "dpr",
        [("Oven", OVEN), ("", YEAST), ("Rye", RYE), ("", SALT)],
        {"train": {HOT: {OVEN_FULL: 1, YEAST: 1, f"Rye {RYE}": 0, SALT: 0}, RISE: {YEAST: 1, OVEN_FULL: 0}}},
    ),
    "RocketQA, dual-encoder": Case(
        rocketqa_dual,
        "rocketqa",
        [("Oven", OVEN), ("", RYE), ("", SALT), ("", YEAST)],
        {"train": {HOT: {OVEN_FULL: 1, RYE: 0, SALT: 0}, RISE: {YEAST: 1, OVEN_FULL: 0}}},
    ),
    "RocketQA, cross-encoder": Case(
        rocketqa_cross,
        "rocketqa",
        [("Oven", OVEN), ("", RYE), ("", YEAST)],
        {"train": {HOT: {OVEN_FULL: 1, RYE: 0, YEAST: 2}, RISE: {YEAST: 1}}},
    ),
    "pairs in JSONL": Case(
        pairs_jsonl,
        "pairs",
        [("Oven", OVEN), ("", RYE), ("Salt", SALT), ("", YEAST)],
        {"train": {HOT: {OVEN_FULL: 1, RYE: 0, f"Salt {SALT}": 0, YEAST: 2}}},
    ),
    "pairs in CSV": Case(
        pairs_csv,
        "pairs",
        [("", 'Two\n\nparagraphs, one "quoted".'), ("", RYE), ("", OVEN), ("", SALT)],
        {"train": {HOT: {'Two\n\nparagraphs, one "quoted".': 1, RYE: 0, OVEN: 3, SALT: 0}}},
    ),
    "pairs in TSV": Case(
        pairs_tsv,
        "pairs",
        [("", OVEN), ("", RYE), ("", YEAST), ("", SALT)],
        {"train": {HOT: {OVEN: 1, RYE: 0}, RISE: {YEAST: 1, SALT: 0}}},
    ),
}
each_case = pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in CASES.items()])


# What is in a source comes out


@each_case
def test_a_source_comes_out_as_a_dataset(tmp_path: Path, case: Case) -> None:
    about = convert(case.build(tmp_path / "in"), tmp_path / "out")
    dataset = load_dataset(tmp_path / "out")
    assert [(passage.title, passage.text) for passage in dataset.passages] == case.passages
    assert judged(dataset) == case.judged
    assert about == {
        "dataset": str(tmp_path / "out"),
        "format": case.format,
        "passages": len(case.passages),
        "questions": len(dataset.queries),
        "splits": {
            split: {
                "positives": sum(grade > 0 for grades in qrels.values() for grade in grades.values()),
                "negatives": sum(grade == 0 for grades in qrels.values() for grade in grades.values()),
            }
            for split, qrels in case.judged.items()
        },
    }


@each_case
def test_the_same_source_twice_gives_the_same_bytes(tmp_path: Path, case: Case) -> None:
    source = case.build(tmp_path / "in")
    for out in ("one", "two"):
        convert(source, tmp_path / out)
    files = [path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file()]
    assert len(files) >= 3
    assert all((tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes() for file in files)


@each_case
def test_a_dataset_converts_to_itself(tmp_path: Path, case: Case) -> None:
    convert(case.build(tmp_path / "in"), tmp_path / "one")
    convert(tmp_path / "one", tmp_path / "two")
    assert load_dataset(tmp_path / "one").fingerprint == load_dataset(tmp_path / "two").fingerprint


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda data: data.replace(b"\n", b"\r\n"), id="CRLF line ends"),
        pytest.param(lambda data: b"\xef\xbb\xbf" + data, id="a byte order mark"),
        pytest.param(lambda data: data.removesuffix(b"\n"), id="no newline at the end"),
    ],
)
@pytest.mark.parametrize(
    "name", ["MS MARCO", "DPR", "RocketQA, dual-encoder", "RocketQA, cross-encoder", "pairs in JSONL", "pairs in TSV"]
)
def test_files_mean_the_same_with(tmp_path: Path, name: str, change: Callable[[bytes], bytes]) -> None:
    source = CASES[name].build(tmp_path / "in")
    for path in source.iterdir() if source.is_dir() else [source]:
        path.write_bytes(change(path.read_bytes()))
    convert(source, tmp_path / "out")
    assert judged(load_dataset(tmp_path / "out")) == CASES[name].judged


def test_wikipedia_becomes_a_corpus_alone(tmp_path: Path) -> None:
    about = convert(wikipedia(tmp_path / "in"), tmp_path / "out")
    assert list(Passages(tmp_path / "out" / "corpus.jsonl")) == [
        Passage("1", "Oven", f'The "deck oven". {OVEN}'),
        Passage("2", 'Rye "bread"', RYE),
    ]
    assert about["format"] == "dpr-wikipedia" and about["splits"] == {} and about["questions"] == 0


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (
            "JSONL",
            [
                ("7", "Oven", OVEN, {"year": 2001, "tags": ["heat", '"query": 1']}),
                (None, "", YEAST, {}),
                ("r/1", "", RYE, {"year": 1999, "lang": "en"}),
            ],
        ),
        ("CSV", [("7", "Oven", OVEN, {"Year": "2001"}), ("é 2", "", f'"Two"\n{YEAST}', {"lang": "en"})]),
        ("TSV", [(None, "", OVEN, {"year": "2001"}), (None, "", OVEN, {"year": "1999"}), (None, "", RYE, {})]),
    ],
)
def test_passages_become_a_corpus_alone_that_carries_the_rest(
    tmp_path: Path, kind: str, expected: list[tuple[str | None, str, str, dict[str, Any]]]
) -> None:
    about = convert(PASSAGES[kind](tmp_path / "in"), tmp_path / "out")
    assert about["format"] == "passages" and about["passages"] == len(expected) and about["questions"] == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["corpus.jsonl"]
    records = [record for _, record in read_passages(tmp_path / "out" / "corpus.jsonl")]
    found = [(*record.passage, record.metadata) for record in records]
    assert [(title, text, metadata) for _, title, text, metadata in found] == [row[1:] for row in expected]
    for (name, *_), (wanted, *_) in zip(found, expected, strict=True):
        assert name == wanted or (wanted is None and len(name) == 16)
    assert len({name for name, *_ in found}) == len(found)


def test_a_corpus_of_beirs_alone_is_passages_where_that_is_asked_for(tmp_path: Path) -> None:
    about = convert(beir(tmp_path / "in") / "corpus.jsonl", tmp_path / "out", "passages")
    assert about["passages"] == 3
    assert [record.passage for _, record in read_passages(tmp_path / "out" / "corpus.jsonl")] == [
        Passage("a", "Oven", OVEN), Passage("b", "", YEAST), Passage("c", "", RYE)
    ]  # fmt: skip


def test_documents_without_questions_are_indexed_and_searched_by_their_columns(
    tmp_path: Path, tiny_bundle: Path
) -> None:
    converted = run(passages_csv(tmp_path / "in"), "--out", tmp_path / "data").stdout
    assert f"Next: tandemqa index BUNDLE {tmp_path / 'data'} --out INDEX" in converted
    assert describe(tmp_path / "data") == {"kind": "corpus", "path": str(tmp_path / "data"), "passages": 2}
    index = Index.build(tiny_bundle, tmp_path / "data", tmp_path / "index")
    (hit,) = Searcher(index).search("how hot", where=["Year>=2000"])
    assert (hit.id, hit.text, hit.metadata) == ("7", OVEN, {"Year": "2001"})
    write(tmp_path / "data" / "queries.jsonl", "")  # as earlier versions left it
    assert len(Index.build(tiny_bundle, tmp_path / "data", tmp_path / "index")) == 2


def test_ids_of_the_source_are_kept(tmp_path: Path) -> None:
    convert(msmarco(tmp_path / "msmarco"), tmp_path / "one")
    dataset = load_dataset(tmp_path / "one")
    assert dataset.passages.ids == ["10", "11", "12", "13"] and dataset.queries == {"2": RISE, "1": HOT}
    convert(dpr(tmp_path / "dpr"), tmp_path / "two")
    ids = load_dataset(tmp_path / "two").passages.ids
    assert ids[:2] == ["7", "8"] and all(len(name) == 16 for name in ids[2:])


def test_content_names_what_has_no_id(tmp_path: Path) -> None:
    """The same passage has the same id in every format, and another title or text another."""
    ids: dict[tuple[str, str], set[str]] = {}
    for number, build in enumerate((rocketqa_dual, rocketqa_cross, pairs_jsonl, pairs_csv, pairs_tsv)):
        convert(build(tmp_path / f"in{number}"), tmp_path / "out")
        for passage in load_dataset(tmp_path / "out").passages:
            ids.setdefault((passage.title, passage.text), set()).add(passage.id)
    assert all(len(names) == 1 for names in ids.values())
    assert len(set().union(*ids.values())) == len(ids)


@pytest.mark.parametrize(
    ("build", "name"),
    [(dpr, "dpr"), (rocketqa_cross, "rocketqa"), (pairs_csv, "pairs")],
    ids=["DPR", "RocketQA", "pairs"],
)
def test_the_split_is_the_one_asked_for(tmp_path: Path, build: Callable[[Path], Path], name: str) -> None:
    convert(build(tmp_path / "in"), tmp_path / "out", name, "held-out")
    assert list(load_dataset(tmp_path / "out").qrels) == ["held-out"]


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("qrels.tsv", "mine"),
        ("qrels.train.tsv", "train"),
        ("qrels.dev.tsv", "dev"),
        ("qrels.dev.small.tsv", "dev"),
        ("qrels-test-2019.tsv", "test"),
        ("qrels.contest.tsv", "mine"),
    ],
)
def test_the_name_of_a_qrels_file_tells_its_split(tmp_path: Path, name: str, split: str) -> None:
    source = msmarco(tmp_path / "in")
    for path in [*source.glob("qrels*"), *source.glob("qidpid*")]:
        path.unlink()
    write(source / name, "1 0 10 1\n")
    convert(source, tmp_path / "out", split="mine")
    assert load_dataset(tmp_path / "out").qrels == {split: {"1": {"10": 1}}}


def test_triples_alone_are_judgements(tmp_path: Path) -> None:
    source = msmarco(tmp_path / "in")
    for path in source.glob("qrels*"):
        path.unlink()
    convert(source, tmp_path / "out")
    # 11 is the hard negative of one triple, 10 the positive of all
    assert load_dataset(tmp_path / "out").qrels == {"train": {"1": {"10": 1, "12": 0, "13": 0, "11": 0}}}


@pytest.mark.parametrize("first", ["positive", "negative"])
def test_the_highest_grade_of_a_pair_stays(tmp_path: Path, first: str) -> None:
    rows = [(HOT, "", OVEN, 0), (HOT, "", OVEN, 3), (HOT, "", OVEN, 1), (HOT, "", RYE, 0), (RISE, "", YEAST, 1)]
    source = write(tmp_path / "cross.tsv", tsv(*(rows if first == "negative" else [rows[1], rows[0], *rows[2:]])))
    about = convert(source, tmp_path / "out")
    assert judged(load_dataset(tmp_path / "out")) == {"train": {HOT: {OVEN: 3, RYE: 0}, RISE: {YEAST: 1}}}
    assert about["splits"] == {"train": {"positives": 2, "negatives": 1}}


def test_a_question_without_a_positive_keeps_its_negatives(tmp_path: Path) -> None:
    record = {"question": HOT, "positive_ctxs": [], "hard_negative_ctxs": [{"title": "", "text": RYE}]}
    convert(write(tmp_path / "dev.json", json.dumps([record])), tmp_path / "out")
    assert judged(load_dataset(tmp_path / "out")) == {"train": {HOT: {RYE: 0}}}


def test_text_may_be_any_unicode(tmp_path: Path) -> None:
    texts = [
        "東京は首都です",
        "line\u2028separator",
        "no\u00a0break",
        "😀 smile",
        "naïve “quotes” \\ and /",
        "tab\tin it",
    ]
    source = write(tmp_path / "pairs.jsonl", jsonl(*({"question": f"{text}?", "passage": text} for text in texts)))
    convert(source, tmp_path / "out")
    dataset = load_dataset(tmp_path / "out")
    assert [passage.text for passage in dataset.passages] == texts
    assert list(dataset.queries.values()) == [f"{text}?" for text in texts]


# Telling formats apart


@pytest.mark.parametrize(
    ("build", "name"),
    [
        *(pytest.param(case.build, case.format, id=name) for name, case in CASES.items()),
        pytest.param(wikipedia, "dpr-wikipedia", id="DPR's Wikipedia"),
        *(pytest.param(build, "passages", id=f"passages in {kind}") for kind, build in PASSAGES.items()),
        pytest.param(lambda folder: Path("hf:org/name"), "hf", id="a name on the hub"),
        pytest.param(lambda folder: write(folder / "rows.parquet", b"PAR1"), "hf", id="a Parquet file"),
        pytest.param(
            lambda folder: write(folder / "train-0.parquet", b"").parent, "hf", id="a folder of Parquet files"
        ),
        pytest.param(lambda folder: write(folder / "state.json", "{}").parent, "hf", id="a saved dataset"),
        pytest.param(lambda folder: Path("ir:vaswani"), "ir", id="an id of ir_datasets"),
        pytest.param(lambda folder: write(folder / "x", '\n  [\n {"question"'), "dpr", id="DPR under any name"),
    ],
)
def test_the_format_is_told_from_the_source(tmp_path: Path, build: Callable[[Path], Path], name: str) -> None:
    assert recognise(build(tmp_path / "in")) == [name]


@pytest.mark.parametrize(
    "build",
    [
        pytest.param(lambda folder: write(folder / "a.txt", "just some words\n"), id="a text"),
        pytest.param(lambda folder: write(folder / "a.csv", ""), id="an empty file"),
        pytest.param(lambda folder: write(folder / "a.gz", b"\x1f\x8b\x08\x00\xff"), id="a compressed file"),
        pytest.param(lambda folder: write(folder / "a.csv", "name,age\nAnn,7\n"), id="a table of other columns"),
        pytest.param(lambda folder: write(folder / "qrels.tsv", "q1\t0\tp1\t1\n"), id="judgements alone"),
        pytest.param(lambda folder: write(folder / "queries.tsv", "1\thow hot\n"), id="queries alone"),
        pytest.param(lambda folder: beir(folder) / "corpus.jsonl", id="a corpus of BEIR's"),
        pytest.param(lambda folder: beir(folder) / "queries.jsonl", id="questions of BEIR's"),
        pytest.param(lambda folder: beir(folder) / "qrels", id="a folder of other files"),
    ],
)
def test_a_source_that_looks_like_nothing_is_refused(tmp_path: Path, build: Callable[[Path], Path]) -> None:
    source = build(tmp_path / "in")
    with pytest.raises(TandemError) as raised:
        convert(source, tmp_path / "out")
    seen = "the files in it" if source.is_dir() else "its name and its first line"
    choices = ", ".join(FORMATS)
    assert str(raised.value) == (
        f"{source} is in no known format, to judge by {seen}; choose with --format: {choices}."
    )


def test_a_source_that_looks_like_two_formats_needs_a_choice(tmp_path: Path) -> None:
    source = msmarco(beir(tmp_path / "in"))
    with pytest.raises(TandemError, match=r"in could be beir or msmarco, to judge by the files in it; choose with"):
        convert(source, tmp_path / "out")
    assert convert(source, tmp_path / "out", "msmarco")["passages"] == 4
    assert load_dataset(source).passages.ids == ["a", "b", "c"]


def test_a_format_must_be_one_of_those_known(tmp_path: Path) -> None:
    with pytest.raises(
        TandemError, match=r"no format 'trec'; choose auto, beir, msmarco, dpr, dpr-wikipedia, rocket"
    ):
        convert(beir(tmp_path / "in"), tmp_path / "out", "trec")


def test_a_source_must_exist(tmp_path: Path) -> None:
    with pytest.raises(TandemError, match=r"nowhere does not exist; name a file, a folder, hf:NAME or ir:ID\."):
        convert(tmp_path / "nowhere", tmp_path / "out")


@pytest.mark.parametrize("split", ["", "../x", "a/b", ".hidden", "a b", "tra\tin"])
def test_a_split_must_be_the_name_of_a_file(tmp_path: Path, split: str) -> None:
    with pytest.raises(TandemError, match="cannot name a split"):
        convert(pairs_csv(tmp_path / "in"), tmp_path / "out", split=split)


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (msmarco, "msmarco"),
        (dpr, "dpr"),
        (rocketqa_cross, "rocketqa"),
        (pairs_csv, "pairs"),
        (wikipedia, "dpr-wikipedia"),
    ],
)
def test_loading_another_format_says_how_to_convert_it(
    tmp_path: Path, build: Callable[[Path], Path], name: str
) -> None:
    source = build(tmp_path / "in")
    with pytest.raises(TandemError) as raised:
        load_dataset(source)
    assert str(raised.value) == (
        f"{source} is not in BEIR layout but in the format {name}; convert it first: "
        f"tandemqa convert {source} --out DATA"
    )


# Bad input

QUESTION = {"question": HOT, "positive_ctxs": [{"title": "", "text": OVEN}]}


def in_list(*records: object) -> str:
    """A DPR file with one record on a line; the first, which is good, is on line 2."""
    return "[\n" + ",\n".join(json.dumps(record) for record in (QUESTION, *records)) + "\n]\n"


def in_pairs(record: object) -> str:
    return jsonl({"question": HOT, "passage": OVEN}, record)


PAIR_HEADER = "question,passage,title,score\n"
BAD_FILES = [  # name of the file, content, where the fault is, what the message must name
    pytest.param("a.json", in_list({"positive_ctxs": []}), "item 2, line 3", "question is missing", id="no question"),
    pytest.param("a.json", in_list({**QUESTION, "question": 7}), "item 2, line 3", "question is 7", id="a number"),
    pytest.param("a.json", in_list({**QUESTION, "question": " "}), "item 2, line 3", "query is empty", id="no words"),
    pytest.param(
        "a.json", in_list({"question": HOT}), "item 2, line 3", "positive_ctxs is missing", id="no positives"
    ),
    pytest.param(
        "a.json", in_list({**QUESTION, "negative_ctxs": "none"}), "item 2, line 3", "negative_ctxs", id="no list"
    ),
    pytest.param(
        "a.json", in_list({**QUESTION, "negative_ctxs": ["x"]}), "item 2, line 3", "negative_ctxs[0]", id="a string"
    ),
    pytest.param(
        "a.json",
        in_list({**QUESTION, "hard_negative_ctxs": [{"text": RYE}, {"title": "Salt"}]}),
        "item 2, line 3",
        "hard_negative_ctxs[1].text is missing",
        id="a passage without text",
    ),
    pytest.param(
        "a.json",
        in_list({**QUESTION, "positive_ctxs": [{"text": " "}]}),
        "item 2, line 3",
        "empty",
        id="a blank passage",
    ),
    pytest.param(
        "a.json",
        in_list({**QUESTION, "positive_ctxs": [{"text": "\ud800"}]}),
        "item 2, line 3",
        "positive_ctxs[0].text holds half of a surrogate pair",
        id="half a surrogate pair",
    ),
    pytest.param(
        "a.json",
        in_list({**QUESTION, "positive_ctxs": [{"text": OVEN, "psg_id": 1}, {"text": RYE, "psg_id": 1}]}),
        "item 2, line 3",
        "passage id '1' has another text",
        id="one id for two passages",
    ),
    pytest.param("a.json", in_list(["question"]), "item 2, line 3", "not a JSON object", id="an item that is a list"),
    pytest.param("a.json", in_list()[:-4], "line 2", "JSON", id="a list cut short in an item"),
    pytest.param("a.json", in_list()[:-2], "line 3", "the list is cut short", id="a list without an end"),
    pytest.param(
        "a.json", f"[{json.dumps(QUESTION)} {{}}]", "line 1", "'{' follows an item", id="no comma between items"
    ),
    pytest.param("a.json", '[\n{"question": "a",\n oops}]', "line 3", "JSON", id="a malformed item"),
    pytest.param(
        "a.json",
        in_list()[:-2] + ',\n{"question":\n\n"a',
        "line 6",
        "Unterminated string",
        id="a string without end",
    ),
    pytest.param("a.json", "[\n" + "[" * 100_000, "line 2", "nested too deeply", id="a list nested without end"),
    pytest.param("a.json", b'[\n{"question": "caf\xe9"}]', "line 2", "UTF-8", id="Latin-1 in a list"),
    pytest.param("a.json", b'["caf\xc3', "line 1", "UTF-8", id="half a character at the end"),
    pytest.param(
        "a.tsv", f"{HOT}\tOven\t{OVEN}\t1\n{HOT}\t{OVEN}\t1\n", "line 2", "3 columns", id="a column missing"
    ),
    pytest.param(
        "a.tsv", f"{HOT}\tOven\t{OVEN}\t1\n{HOT}\t\tx\tyes\n", "line 2", "label is 'yes'", id="a label in words"
    ),
    pytest.param(
        "a.tsv", f"{HOT}\t\t{OVEN}\t\t{RYE}\t0\n{HOT}\t\t{OVEN}\t\t\t0\n", "line 2", "empty", id="no negative"
    ),
    pytest.param("a.tsv", f"{HOT}\t\t{OVEN}\t1\n\t\t{OVEN}\t1\n", "line 2", "query is empty", id="no query"),
    pytest.param("a.tsv", f"{HOT}\t\t{OVEN}\t1\n".encode() + b"\xff\n", "line 2", "UTF-8", id="a byte not UTF-8"),
    pytest.param("a.jsonl", in_pairs({"question": HOT}), "line 2", "passage is missing", id="a pair of one"),
    pytest.param(
        "a.jsonl", in_pairs({"passage": OVEN}), "line 2", "question is missing", id="a pair without question"
    ),
    pytest.param("a.jsonl", in_pairs({"question": HOT, "passage": 3}), "line 2", "passage is 3", id="a passage of 3"),
    pytest.param("a.jsonl", in_pairs({"question": HOT, "passage": ""}), "line 2", "empty", id="an empty passage"),
    pytest.param(
        "a.jsonl", in_pairs({"question": HOT, "passage": OVEN, "title": 1}), "line 2", "title is 1", id="a title of 1"
    ),
    pytest.param(
        "a.jsonl",
        in_pairs({"question": HOT, "passage": OVEN, "score": 0.5}),
        "line 2",
        "score is '0.5'",
        id="half a grade",
    ),
    pytest.param(
        "a.jsonl",
        in_pairs({"question": HOT, "passage": OVEN, "score": True}),
        "line 2",
        "score is 'True'",
        id="a grade true",
    ),
    pytest.param(
        "a.jsonl",
        in_pairs({"question": HOT, "passage": OVEN, "negatives": [7]}),
        "line 2",
        "negatives is 7",
        id="a negative 7",
    ),
    pytest.param(
        "a.jsonl",
        in_pairs({"question": HOT, "passage": OVEN, "negatives": [{"title": "Rye"}]}),
        "line 2",
        "text is missing",
        id="a negative without text",
    ),
    pytest.param("a.jsonl", in_pairs([HOT, OVEN]), "line 2", "object", id="a line that is a list"),
    pytest.param("a.jsonl", jsonl({"question": HOT, "passage": OVEN}) + "{", "line 2", "JSON", id="half an object"),
    pytest.param("a.csv", PAIR_HEADER + f"{HOT},{OVEN},\n", "line 2", "3 columns, but", id="a cell missing"),
    pytest.param("a.csv", PAIR_HEADER + f"{HOT},,,\n", "line 2", "passage is empty", id="an empty cell"),
    pytest.param("a.csv", PAIR_HEADER + f"{HOT},{OVEN},,high\n", "line 2", "score is 'high'", id="a grade in words"),
    pytest.param("a.csv", PAIR_HEADER + f'{HOT},"open\n,,\n', "line 2", "not a row", id="a quote that does not end"),
    pytest.param(
        "a.csv", PAIR_HEADER + f'{HOT},"{"x" * 200_000}",,\n', "line 2", "field limit", id="a cell too large"
    ),
    pytest.param("a.csv", PAIR_HEADER + f'\n{HOT},"The "oven"",,\n', "line 3", "not a row", id="quotes not doubled"),
    pytest.param(
        "a.tsv", "id\ttext\ttitle\n1\tone\tx\n2\ttwo\n", "line 3", "2 columns", id="half a row of Wikipedia"
    ),
    pytest.param(
        "a.tsv", "id\ttext\ttitle\n1\tone\tx\n1\ttwo\tx\n", "line 3", "another text", id="a passage id twice"
    ),
    pytest.param("a.tsv", "id\ttext\ttitle\n\tone\tx\n", "line 2", "passage id '' is empty", id="an empty id"),
    pytest.param("a.csv", "id,text\n1,one\n,two\n", "line 3", "passage id '' is empty", id="an id left out"),
    pytest.param("a.csv", "id,text\n1,one\n1,two\n", "line 3", "id '1' has another text", id="two texts of one id"),
    pytest.param("a.csv", "text,year\none,1\ntwo\n", "line 3", "1 column, but the first", id="half a row"),
    pytest.param("a.csv", "text,year,year\none,1,2\n", "line 1", "column 'year' stands twice", id="a name twice"),
    pytest.param("a.csv", "text,metadata\none,x\n", "line 2", "metadata is not an object", id="metadata in words"),
    pytest.param("a.csv", "text,year\n ,1\n", "line 2", "the passage is empty", id="a year alone"),
    pytest.param("a.jsonl", '{"text": "a"}\n{"year": 1}\n', "line 2", "text is missing", id="no text at all"),
    pytest.param(
        "a.jsonl", '{"text": "a", "n": NaN}\n', "line 1", "field n cannot be kept", id="a field without value"
    ),
    pytest.param(
        "a.jsonl", '{"text": "a", "n": "\\ud800"}', "line 1", "n holds half of a", id="half a pair in a field"
    ),
    pytest.param("a.jsonl", '{"text": "a", "id": [1]}\n', "line 1", "field id is [1]", id="an id that is a list"),
    pytest.param("a.jsonl", '{"text": "a", "id": true}\n', "line 1", "field id is true", id="an id that is true"),
]


def message_of(source: Path, out: Path, format: str = "auto") -> str:
    """What is said of a bad source; nothing may be left at `out` or beside it."""
    before = sorted(out.parent.rglob("*"))
    with pytest.raises(TandemError) as raised:
        convert(source, out, format)
    assert sorted(out.parent.rglob("*")) == before
    return str(raised.value)


@pytest.mark.parametrize(("name", "content", "where", "named"), BAD_FILES)
def test_a_file_is_refused_for(tmp_path: Path, name: str, content: str | bytes, where: str, named: str) -> None:
    path = write(tmp_path / name, content)
    message = message_of(path, tmp_path / "out")
    assert message.startswith(f"{path}, {where}: ")
    assert named in message and len(message.splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "content", "where", "named"),
    [
        pytest.param("collection.tsv", "10\n", "collection.tsv, line 1", "no tab", id="a passage without text"),
        pytest.param("collection.tsv", "10\t \n", "collection.tsv, line 1", "passage is empty", id="a blank passage"),
        pytest.param(
            "collection.tsv", "10\ta\n10\tb\n", "collection.tsv, line 2", "passage id '10'", id="an id twice"
        ),
        pytest.param("collection.tsv", "\ta\n", "collection.tsv, line 1", "passage id ''", id="an empty id"),
        pytest.param("collection.tsv", b"10\t\xff\n", "collection.tsv, line 1", "UTF-8", id="a byte not UTF-8"),
        pytest.param("queries.dev.tsv", "1\n", "queries.dev.tsv, line 1", "no tab", id="a query without text"),
        pytest.param("queries.extra.tsv", "1\tother\n", "queries.train.tsv, line 1", "query id '1'", id="two texts"),
        pytest.param(
            "qrels.train.tsv", "1 0 10 1\n1 0 99 1\n", "qrels.train.tsv, line 2", "passage id '99'", id="no passage"
        ),
        pytest.param("qrels.train.tsv", "9 0 10 1\n", "qrels.train.tsv, line 1", "query id '9'", id="no query"),
        pytest.param("qrels.train.tsv", "1 10\n", "qrels.train.tsv, line 1", "2 columns", id="two columns"),
        pytest.param("qrels.train.tsv", "1 0 10 x\n", "qrels.train.tsv, line 1", "score 'x'", id="a grade x"),
        pytest.param(
            "qidpidtriples.train.small.tsv", "1\t10\n", "small.tsv, line 1", "2 columns", id="half a triple"
        ),
        pytest.param(
            "qidpidtriples.train.small.tsv", "1\t10\t99\n", "small.tsv, line 1", "'99'", id="an unknown negative"
        ),
    ],
)
def test_msmarco_is_refused_for(tmp_path: Path, name: str, content: str | bytes, where: str, named: str) -> None:
    source = msmarco(tmp_path / "in")
    write(source / name, content)
    message = message_of(source, tmp_path / "out")
    assert f"{where}: " in message and named in message


@pytest.mark.parametrize("pattern", ["queries*", "q[ri]*"], ids=["queries", "judgements"])
def test_msmarco_needs_files_of(tmp_path: Path, pattern: str) -> None:
    source = msmarco(tmp_path / "in")
    for path in source.glob(pattern):
        path.unlink()
    kind = "queries" if pattern == "queries*" else "qrels"
    assert f"has no {kind}*.tsv beside collection.tsv" in message_of(source, tmp_path / "out")


@pytest.mark.parametrize(
    ("format", "content", "named"),
    [
        pytest.param("dpr", "{}", "line 1: not a JSON list", id="an object for DPR's list"),
        pytest.param("dpr", "", "line 1: not a JSON list", id="nothing for DPR's list"),
        pytest.param("dpr", "[]", "has no passages", id="an empty list"),
        pytest.param("pairs", "", "has no passages", id="an empty table"),
        pytest.param(
            "pairs", f"{HOT},{OVEN}\na,b\n", "line 2: field question is missing", id="a table without names"
        ),
        pytest.param("rocketqa", "", "has no passages", id="an empty file"),
        pytest.param("msmarco", "", "Not a directory", id="a file for a folder"),
    ],
)
def test_a_format_that_was_asked_for_must_fit(tmp_path: Path, format: str, content: str, named: str) -> None:
    assert named in message_of(write(tmp_path / "file", content), tmp_path / "out", format)


@pytest.mark.parametrize("format", ["dpr", "pairs", "passages", "rocketqa", "dpr-wikipedia", "msmarco", "beir"])
@pytest.mark.parametrize("name", ["nowhere", "."], ids=["nothing", "a folder"])
def test_a_format_that_was_asked_for_must_find_its_file(tmp_path: Path, format: str, name: str) -> None:
    (tmp_path / "in").mkdir()
    message = message_of(tmp_path / "in" / name, tmp_path / "out", format)
    assert message.startswith(str(tmp_path / "in")) and ("does not exist" in message or "cannot be read" in message)


# The list in a file that is larger than memory


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64, 1 << 20])
def test_a_list_may_be_cut_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(source_files, "_CHUNK", chunk)
    values = [{"é": '\u2028😀\\"[{', "n": [1.5e-7, -3, True, None, "\U0001f600 "]}, "x,]", {}, [], [[]], " ", False]
    path = write(tmp_path / "a.json", json.dumps(values, ensure_ascii=False, indent=1))
    assert [value for _, value in source_files.items(path)] == values
    values += ["\ud83d half", "\ude00"]
    path = write(tmp_path / "a.json", json.dumps(values))
    assert [value for _, value in source_files.items(path)] == values


@given(
    values=st.lists(st.dictionaries(st.text(), st.lists(st.text() | st.booleans() | st.none() | st.integers()))),
    indent=st.none() | st.integers(0, 2),
    chunk=st.integers(1, 40),
)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_list_reads_as_json_does(tmp_path: Path, values: list[Any], indent: int | None, chunk: int) -> None:
    path = write(tmp_path / "a.json", json.dumps(values, indent=indent))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(source_files, "_CHUNK", chunk)
        found = list(source_files.items(path))
    assert [value for _, value in found] == values
    assert all(1 <= line <= path.read_text().count("\n") + 1 for (_, line), _ in found)


def test_a_bad_item_is_found_without_reading_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_files, "_CHUNK", 64)
    path = write(tmp_path / "a.json", '[{"question": oops, ' + '"x", ' * 100_000)
    with path.open("rb") as file:
        monkeypatch.setattr(Path, "open", lambda *_: file)
        with pytest.raises(TandemError, match=r"line 1: not valid JSON \(Expecting value\)"):
            list(source_files.items(path))
        # The with statement of `opened` has closed the file.
    assert path.stat().st_size > 100_000


# Memory


def passages_of(number: int) -> str:
    return f"{number}\t{' '.join(f'word{(number * 7919 + place) % 10_000}' for place in range(20))}\n"


def large_msmarco(folder: Path, count: int) -> Path:
    folder.mkdir()
    with (folder / "collection.tsv").open("w") as file:
        file.writelines(map(passages_of, range(count)))
    write(folder / "queries.tsv", tsv((1, HOT)))
    write(folder / "qrels.tsv", "1 0 7 1\n")
    return folder


def large_pairs(folder: Path, count: int) -> Path:
    folder.mkdir()
    with (folder / "pairs.jsonl").open("w") as file:
        file.writelines(jsonl({"question": f"q {n}", "passage": passages_of(n)}) for n in range(count))
    return folder / "pairs.jsonl"


def large_dpr(folder: Path, count: int) -> Path:
    folder.mkdir()
    with (folder / "dpr.json").open("w") as file:
        file.write("[")
        for n in range(count):
            contexts = [{"title": "", "text": passages_of(n)}]
            file.write((", " if n else "") + json.dumps({"question": f"q {n}", "positive_ctxs": contexts}))
        file.write("]")
    return folder / "dpr.json"


def peak_memory(work: Callable[[], object]) -> float:
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("build", "ledgers", "few", "many"),
    [
        pytest.param(large_msmarco, 1, 20_000, 200_000, id="MS MARCO"),
        pytest.param(large_pairs, 3, 2_000, 20_000, id="pairs"),
        pytest.param(large_dpr, 3, 2_000, 20_000, id="DPR"),
    ],
)
def test_memory_is_a_few_bytes_a_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    build: Callable[[Path, int], Path],
    ledgers: int,
    few: int,
    many: int,
) -> None:
    monkeypatch.setattr(source_files, "_CHUNK", 1 << 16)  # small against the files
    peaks = []
    for count in (few, many):
        source = build(tmp_path / f"in{count}", count)
        peaks.append(peak_memory(lambda source=source: convert(source, tmp_path / "out")))  # type: ignore[misc]
    growth = (peaks[1] - peaks[0]) / (many - few)
    assert growth < ledgers * 50
    assert peaks[1] < 12e6


def test_a_ledger_says_what_a_dictionary_says() -> None:
    generator = random.Random(0)
    ledger, truth = Ledger(), {}
    for _ in range(20_000):
        name, number = f"name {generator.randrange(8_000)}", generator.randrange(-(1 << 31), 1 << 31)
        assert ledger.note(name, number) == truth.get(name)
        truth.setdefault(name, number)
        if generator.random() < 0.1:
            ledger.replace(name, number)
            truth[name] = number
    assert len(ledger) == len(truth)
    assert all(ledger.get(f"name {n}") == truth.get(f"name {n}") for n in range(10_000))


def test_judgements_are_rewritten_only_if_a_grade_was_raised(tmp_path: Path) -> None:
    def written(*rows: tuple[str, str, int]) -> tuple[str, int, int]:
        judgements = Judgements(tmp_path / "train.tsv")
        for row in rows:
            judgements.add(*row)
        judgements.close()
        before = judgements.path.stat().st_ino
        judgements.settle()
        text = judgements.path.read_text()
        return text.partition("\n")[2], judgements.positives, judgements.path.stat().st_ino - before

    assert written(("q", "p", 1), ("q", "n", 0), ("q", "p", 0)) == ("q\tp\t1\nq\tn\t0\n", 1, 0)
    text, positives, moved = written(("q", "p", 0), ("q", "n", -1), ("q", "p", 2), ("q", "n", 0), ("q", "p", 3))
    assert (text, positives) == ("q\tp\t3\nq\tn\t0\n", 1) and moved != 0


# Whole or not at all


def test_a_dataset_is_replaced_only_by_a_whole_one(tmp_path: Path) -> None:
    convert(pairs_csv(tmp_path / "in"), tmp_path / "out")
    before = load_dataset(tmp_path / "out").fingerprint
    message_of(write(tmp_path / "bad.csv", PAIR_HEADER + f"{HOT},,,\n"), tmp_path / "out")
    assert load_dataset(tmp_path / "out").fingerprint == before
    convert(dpr(tmp_path / "in"), tmp_path / "out")
    assert load_dataset(tmp_path / "out").fingerprint != before


def test_documents_alone_replace_the_passages_and_leave_the_questions(tmp_path: Path) -> None:
    convert(pairs_csv(tmp_path / "in"), tmp_path / "out")
    before = load_dataset(tmp_path / "out")
    ids = before.passages.ids
    documents = "id,text\n" + "".join(f"{name},Another text of {name}.\n" for name in ids)
    convert(write(tmp_path / "documents.csv", documents), tmp_path / "out")
    after = load_dataset(tmp_path / "out")
    assert (after.queries, after.qrels) == (before.queries, before.qrels) and after.passages.ids == ids
    assert after.passages[0].text.startswith("Another text")


def test_an_interruption_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = msmarco(tmp_path / "in")

    def interrupted(self: Judgements, *arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Judgements, "add", interrupted)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("prepare", "out", "named"),
    [
        pytest.param(lambda folder: folder / "in", "in", "holds the source", id="the source itself"),
        pytest.param(lambda folder: folder / "in", ".", "holds the source", id="a folder around the source"),
        pytest.param(
            lambda folder: write(folder / "x" / "mine.txt", "x"), "x", "is not a dataset", id="a folder of mine"
        ),
        pytest.param(lambda folder: write(folder / "x", "x"), "x", "is not a dataset", id="a file"),
    ],
)
def test_nothing_but_a_dataset_is_replaced(
    tmp_path: Path, prepare: Callable[[Path], Path], out: str, named: str
) -> None:
    source = msmarco(tmp_path / "in")
    prepare(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(TandemError, match=named):
        convert(source, tmp_path / out)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_an_empty_folder_may_be_filled_and_out_may_lie_in_the_source(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    source = msmarco(tmp_path / "in")
    convert(source, tmp_path / "empty")
    convert(source, source / "beir")
    assert load_dataset(source / "beir").fingerprint == load_dataset(tmp_path / "empty").fingerprint


# Other libraries


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Any, ...]]]:
    """A stand-in for the package datasets, which notes what it was asked for."""
    asked: list[tuple[Any, ...]] = []
    rows = [{"query": HOT, "positive": OVEN, "negative": RYE}, {"query": HOT, "positive": YEAST, "negative": None}]

    def load_dataset(*names: str, **options: Any) -> list[dict[str, Any]]:
        asked.append((*names, options))
        if names[0] == "org/broken":
            raise ConnectionError("no\nnetwork")
        return rows

    def load_from_disk(name: str) -> Any:
        asked.append((name,))
        return {"dev": rows} if Path(name, "dataset_dict.json").exists() else rows

    fake = types.ModuleType("datasets")
    fake.load_dataset, fake.load_from_disk = load_dataset, load_from_disk  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", fake)
    yield asked


HUB_JUDGED = {"dev": {HOT: {OVEN: 1, RYE: 0, YEAST: 1}}}


@pytest.mark.parametrize(
    ("build", "asked"),
    [
        pytest.param(
            lambda folder: "hf:org/name",
            lambda source: ("org/name", {"split": "dev", "streaming": True}),
            id="a hub name",
        ),
        pytest.param(
            lambda folder: str(write(folder / "a.parquet", "")),
            lambda source: ("parquet", {"data_files": source, "split": "train", "streaming": True}),
            id="a Parquet file",
        ),
        pytest.param(
            lambda folder: f"hf:{write(folder / 'a.parquet', '')}",
            lambda source: ("parquet", {"data_files": source[3:], "split": "train", "streaming": True}),
            id="a Parquet file after hf:",
        ),
        pytest.param(
            lambda folder: str(write(folder / "a.parquet", "").parent),
            lambda source: (source, {"split": "dev", "streaming": True}),
            id="a folder of Parquet files",
        ),
        pytest.param(
            lambda folder: str(write(folder / "dataset_dict.json", "").parent),
            lambda source: (source,),
            id="saved splits",
        ),
        pytest.param(
            lambda folder: str(write(folder / "state.json", "").parent),
            lambda source: (source,),
            id="a saved dataset",
        ),
    ],
)
def test_a_hub_dataset_has_the_columns_of_pairs(
    tmp_path: Path,
    hub: list[tuple[Any, ...]],
    build: Callable[[Path], str],
    asked: Callable[[str], tuple[Any, ...]],
) -> None:
    source = build(tmp_path / "in")
    about = convert(source, tmp_path / "out", split="dev")
    assert about["format"] == "hf" and hub == [asked(source)]
    assert judged(load_dataset(tmp_path / "out")) == HUB_JUDGED


def test_what_the_hub_library_says_is_told_in_a_line(tmp_path: Path, hub: list[tuple[Any, ...]]) -> None:
    expected = "org/broken, split 'train', could not be read by the package datasets: no network"
    assert message_of(Path("hf:org/broken"), tmp_path / "out") == expected


def test_a_bad_row_of_a_hub_dataset_is_named(tmp_path: Path, hub: list[tuple[Any, ...]]) -> None:
    sys.modules["datasets"].load_dataset = lambda *_, **__: [{"query": HOT, "answer": OVEN}]  # type: ignore[attr-defined]
    assert message_of(Path("hf:org/name"), tmp_path / "out").startswith(
        "hf:org/name, line 1: field passage is missing"
    )


def test_a_real_parquet_file_is_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [
        {"query": HOT, "positive": OVEN, "negatives": [RYE, SALT]},
        {"query": RISE, "positive": YEAST, "negatives": []},
    ]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    convert(tmp_path / "rows.parquet", tmp_path / "out")
    assert judged(load_dataset(tmp_path / "out")) == {"train": {HOT: {OVEN: 1, RYE: 0, SALT: 0}, RISE: {YEAST: 1}}}


class Text(NamedTuple):
    doc_id: str
    text: str

    def default_text(self) -> str:
        return self.text


class Titled(NamedTuple):
    doc_id: str
    title: str
    text: str

    def default_text(self) -> str:
        raise AssertionError("title and text are known apart")


class Topic(NamedTuple):
    query_id: str
    description: str

    def default_text(self) -> str:
        return self.description


class Judged(NamedTuple):
    query_id: str
    doc_id: str
    relevance: int


class Pair(NamedTuple):
    query_id: str
    doc_id_a: str
    doc_id_b: str


@pytest.fixture
def collection(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """What a stand-in for ir_datasets has under the id `bread/test/small`."""
    dataset = types.SimpleNamespace(
        has_docs=lambda: True,
        docs_count=lambda: None,
        docs_iter=lambda: iter([Titled("a", "Oven", OVEN), Text("b", RYE), Text("c", " "), Text("d", YEAST)]),
        has_queries=lambda: True,
        queries_iter=lambda: iter([Topic("1", HOT), Topic("2", "")]),
        has_qrels=lambda: True,
        qrels_iter=lambda: iter([Judged("1", "a", 2), Judged("1", "c", 1), Judged("1", "x", 1), Judged("2", "a", 1)]),
        has_docpairs=lambda: True,
        docpairs_iter=lambda: iter([Pair("1", "a", "b"), Pair("1", "d", "c")]),
    )
    fake = types.ModuleType("ir_datasets")
    fake.load = lambda name: {"bread/test/small": dataset}[name]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ir_datasets", fake)
    return dataset


def test_a_collection_of_ir_datasets_is_read(tmp_path: Path, collection: types.SimpleNamespace) -> None:
    assert convert("ir:bread/test/small", tmp_path / "out")["format"] == "ir"
    dataset = load_dataset(tmp_path / "out")
    assert list(dataset.passages) == [Passage("a", "Oven", OVEN), Passage("b", "", RYE), Passage("d", "", YEAST)]
    assert dataset.queries == {"1": HOT}
    assert dataset.qrels == {"test": {"1": {"a": 2, "b": 0, "d": 1}}}


def test_an_unknown_collection_is_named(tmp_path: Path, collection: types.SimpleNamespace) -> None:
    assert "ir_datasets knows no id 'bread'" in message_of(Path("ir:bread"), tmp_path / "out")
    collection.has_docs = lambda: False
    assert "'bread/test/small' has no passages" in message_of(Path("ir:bread/test/small"), tmp_path / "out")


@pytest.mark.parametrize(("source", "package"), [("hf:org/name", "datasets"), ("ir:vaswani", "ir_datasets")])
def test_a_package_that_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    expected = f"This format needs the package {package}, which is not installed; run: pip install 'tandemqa[data]'"
    assert message_of(Path(source), tmp_path / "out") == expected


# The command


def run(*arguments: object) -> Any:
    result = CliRunner().invoke(app, ["convert", *map(str, arguments)], env={"COLUMNS": "80"})
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_the_command_says_what_it_wrote(tmp_path: Path) -> None:
    result = run(msmarco(tmp_path / "in"), "--out", tmp_path / "out")
    assert result.exit_code == 0
    assert result.stdout == (
        "Converted 4 passages and 2 questions (msmarco).\n"
        "  dev: 1 positive, 1 judged not relevant\n"
        "  train: 2 positives, 2 judged not relevant\n"
        f"The dataset is {tmp_path / 'out'}. Next: tandemqa train {tmp_path / 'out'} --out RUN\n"
    )
    assert "read collection.tsv" in result.stderr


def test_the_command_prints_json(tmp_path: Path) -> None:
    result = run(
        pairs_csv(tmp_path / "in"), "--out", tmp_path / "out", "--split", "test", "--format", "pairs", "--json"
    )
    assert json.loads(result.stdout) == {
        "dataset": str(tmp_path / "out"),
        "format": "pairs",
        "passages": 4,
        "questions": 1,
        "splits": {"test": {"positives": 2, "negatives": 2}},
    }


def test_the_command_says_what_a_corpus_alone_lacks(tmp_path: Path) -> None:
    result = run(wikipedia(tmp_path / "in"), "--out", tmp_path / "out")
    assert "is a corpus alone. Next: tandemqa index BUNDLE" in result.stdout
    assert "To train or measure on it, put queries.jsonl and qrels/SPLIT.tsv beside it." in result.stdout


@pytest.mark.parametrize(("name", "content", "where", "named"), BAD_FILES[::6])
def test_the_command_ends_with_two_and_one_line_for(
    tmp_path: Path, name: str, content: str | bytes, where: str, named: str
) -> None:
    result = run(write(tmp_path / name, content), "--out", tmp_path / "out")
    assert result.exit_code == 2 and result.stdout == "" and not (tmp_path / "out").exists()
    last = result.stderr.splitlines()[-1]
    assert last.startswith("Error: ") and where in last and named in last and "Traceback" not in result.stderr


def test_training_on_another_format_points_to_this_command(tmp_path: Path) -> None:
    source = msmarco(tmp_path / "in")
    result = CliRunner().invoke(app, ["train", str(source), "--out", str(tmp_path / "run")])
    assert result.exit_code == 2 and result.stdout == ""
    assert result.stderr.splitlines()[-1].endswith(f"convert it first: tandemqa convert {source} --out DATA")


def test_the_help_names_every_format_and_what_becomes_of_hard_negatives() -> None:
    help_text = run("--help").stdout
    assert all(f"\n    {name} " in help_text for name in FORMATS)
    assert "hard negative of the source becomes a row of qrels with score 0" in help_text
    assert max(map(len, help_text.splitlines())) <= 80
