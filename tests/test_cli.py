"""The commands: what they print, where, and how they end."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import tandemqa
from tandemqa.cli import app
from tandemqa.encoders.bundle import Bundle, save_bundle
from tandemqa.files import read_json
from tandemqa.index.index import Index
from tandemqa.index.lock import only_writer
from tandemqa.search.searcher import Answer, Hit, Searcher
from tandemqa.terminal import answer_text

HEAVY = {"torch", "transformers", "numpy", "pydantic", "faiss", "bm25s", "safetensors", "yaml", "rich", "matplotlib"}
COMMANDS = [str(command.callback.__name__) for command in app.registered_commands if command.callback]


def run(*arguments: object) -> Any:
    """One command in this process; what it raised, other than an exit, is raised again."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "80"})
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def run_json(*arguments: object) -> Any:
    """What a command prints with `--json`, which must be one document and nothing else."""
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def fails(*arguments: object) -> str:
    """The one line that a command says of a mistake."""
    result = run(*arguments)
    assert result.exit_code == 2 and result.stdout == ""
    *progress, last = result.stderr.splitlines()
    assert not any("Error" in line or "Traceback" in line for line in progress)
    assert last.startswith("Error: ")
    return str(last)


@pytest.fixture(scope="module")
def index(tiny_bundle: Path, tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Index.build(tiny_bundle, tiny_dataset, tmp_path_factory.mktemp("cli") / "index").folder


# Help


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from tandemqa.cli import app\n"
        "def run(*command):\n"
        "    assert CliRunner().invoke(app, [*command, '--help']).exit_code == 0\n"
        f"    print(sorted({HEAVY!r} & set(sys.modules)))\n"
        "run()\n"
        f"for command in {COMMANDS!r}:\n"
        "    run(command)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    first, *others = done.stdout.splitlines()
    assert first == "[]"
    assert len(others) == len(COMMANDS) and set(others) <= {
        "[]",
        "['pydantic']",
    }  # Typer's own, for the defaults of options


@pytest.mark.parametrize("command", COMMANDS)
def test_each_help_has_an_example_and_a_word_on_every_option(command: str) -> None:
    help_text = run(command, "--help").stdout
    assert f"    tandemqa {command}" in help_text
    names = re.findall(r"^  (-\S+.*?)(?:  +|$)(.*)$", help_text.partition("Options:")[2], flags=re.MULTILINE)
    assert len(names) >= 2
    assert all(described for _, described in names), names


def test_the_first_help_names_every_command_in_full() -> None:
    help_text = run("--help").stdout
    listed = re.findall(rf"^  ({'|'.join(COMMANDS)})  +(.*)$", help_text, flags=re.MULTILINE)
    assert len(listed) == len(COMMANDS) and all(line.endswith(".") and not line.endswith("...") for _, line in listed)


def test_it_tells_its_version() -> None:
    assert run("--version").stdout == f"tandemqa {tandemqa.__version__}\n"


def test_a_usage_mistake_ends_with_two() -> None:
    for arguments in (
        ["search"],
        ["search", "index", "question", "--nope"],
        ["nope"],
        ["search", "i", "q", "-k", "x"],
    ):
        result = run(*arguments)
        assert result.exit_code == 2 and result.stdout == "" and "Error: " in result.stderr


# The whole way


def test_train_index_search_evaluate_and_inspect_go_together(
    tiny_model: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    small = ["warm_lists.size=2", "lists.size=3", "evaluation.depth=5", "evaluation.split=dev"]
    settings = [f"retriever.model={tiny_model}", f"reranker.model={tiny_model}", *small]
    options = [word for setting in settings for word in ("--set", setting)]
    trained = run_json("train", tiny_dataset, "--out", tmp_path / "run", *options)
    assert trained["bundle"] == str(tmp_path / "run" / "bundle") and trained["metrics"]["split"] == "dev"
    again = run("train", tiny_dataset, "--out", tmp_path / "run", *options)
    assert "MRR@10" in again.stdout
    assert f"tandemqa index {tmp_path / 'run'} {tiny_dataset} --out INDEX" in again.stdout

    indexed = run("index", tmp_path / "run", tiny_dataset, "--out", tmp_path / "index")
    assert indexed.exit_code == 0 and "Indexed 40 passages" in indexed.stdout
    assert f'tandemqa search {tmp_path / "index"} "your question"' in indexed.stdout

    answer = run_json("search", tmp_path / "index", "why do prices rise", "-k", 3, "--depth", 10)
    expected = Searcher(tmp_path / "index").search("why do prices rise", k=3, depth=10)
    assert answer["question"] == "why do prices rise" and set(answer["seconds"]) == {
        "retrieve",
        "re-rank",
        "read",
        "highlight",
    }
    assert [hit["id"] for hit in answer["hits"]] == [hit.id for hit in expected]
    assert set(answer["hits"][0]) == set(Hit.__dataclass_fields__)

    report = run_json("evaluate", tmp_path / "run", tiny_dataset, "--split", "test", "-k", 10)
    assert report["split"] == "test" and report["depth"] == 10 and report["questions"] == 7
    bundle = run_json("inspect", tmp_path / "run")
    assert bundle["kind"] == "bundle" and bundle["metrics"]["stages"] == trained["metrics"]["stages"]


def test_bundle_makes_one_of_two_models_and_it_searches(
    tiny_model: Path, tiny_bundle: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    models = ["--retriever", tiny_model, "--reranker", tiny_bundle]
    made = run("bundle", *models, "--out", tmp_path / "bundle")
    assert made.stdout == (
        "Nothing is learnt of how to search, not even what a bundle of these models had; --data learns it.\n"
        f"The bundle is {tmp_path / 'bundle'}. Next: tandemqa index {tmp_path / 'bundle'} DATA --out INDEX\n"
    )
    measured = run_json("bundle", *models, "--out", tmp_path / "bundle", "--data", tiny_dataset, "-k", 10)
    assert measured["sources"] == {"retriever": str(tiny_model), "reranker": str(tiny_bundle)}
    assert measured["metrics"]["depth"] == 10
    run("index", tmp_path / "bundle", tiny_dataset, "--out", tmp_path / "index")
    answer = run_json("search", tmp_path / "index", "owls", "--mode", "hybrid")
    assert len(answer["hits"]) == 5
    assert "cannot be the re-ranker" in fails(
        "bundle", "--retriever", tiny_model, "--reranker", tiny_model, "--out", tmp_path / "other"
    )
    assert not (tmp_path / "other").exists()


# Search


def a_hit(text: str = "text", answer: tuple[int, int] = (0, 0), **values: Any) -> Hit:
    """A hit of some passage, with this part of its text as its answer."""
    usual = {"rank": 1, "id": "id", "title": "", "score": 1.0, "reranker_score": 1.0, "retriever_score": 0.5}
    span = {"answer": text[slice(*answer)], "answer_start": answer[0], "answer_end": answer[1]}
    return Hit(text=text, **{**usual, "retriever_rank": 1, "bm25_score": None, **span, **values})


def test_search_prints_each_passage_within_eighty_columns(index: Path) -> None:
    result = run("search", index, "when does a function stop calling itself", "-k", 40)
    lines = result.stdout.splitlines()
    assert all(len(line) <= 80 for line in lines)
    expected = Searcher(index).search("when does a function stop calling itself", k=40)
    titles = [re.match(r"^ ?(\d+)  (.*?) +(-?\d+\.\d\d)$", line) for line in lines]
    shown = [(int(m[1]), m[2], m[3]) for m in titles if m]
    assert shown == [(hit.rank, hit.title or hit.id, f"{hit.score:.2f}") for hit in expected]
    assert sum(line.endswith("…") for line in lines) == 1  # of the one long passage the rest is left out


@pytest.mark.parametrize("title", ["title\x1b]0;pwned\x07", "", " \n"])
def test_a_passage_cannot_steer_the_terminal(title: str) -> None:
    hit = a_hit(id="id\x1b[2J", title=title, text="text \x1b[31mred\x9b" * 50)
    text = answer_text(Answer("q", (hit,), None, True, {"retrieve": 0.001}), 80)
    assert all(character.isprintable() for character in text.replace("\n", ""))


def bold(text: str) -> str:
    """What stands in bold, line by line."""
    return " ".join(re.findall("\x1b\\[1m(.*?)\x1b\\[0m", text))


def test_the_answer_is_in_bold_over_all_its_lines_and_only_there() -> None:
    text = "The moon pulls. Twice a day the sea rises at most shores of the world. The sun adds to it."
    hit = a_hit(text, (16, 70))
    shown = answer_text(Answer("q", (hit,), None, True, {}), 40)
    assert bold(shown) == "Twice a day the sea rises at most shores of the world."
    assert all(len(re.sub("\x1b\\[.m", "", line)) <= 40 for line in shown.splitlines())
    assert " ".join(re.sub("\x1b\\[.m", "", shown).split()).startswith(f"1 id 1.00 {text}")


def test_an_answer_far_down_a_passage_is_shown() -> None:
    text = "Nothing of use is said here. " * 30 + "Edo is what it was called. " + "More of nothing. " * 30
    start = text.index("Edo")
    shown = answer_text(Answer("q", (a_hit(text, (start, start + 26)),), None, True, {}), 60)
    assert bold(shown) == "Edo is what it was called." and len(shown.splitlines()) <= 9


@pytest.mark.parametrize("answer", [(0, 0), (0, 4), (2, 900), (1000, 1000)])
def test_any_answer_of_any_passage_fits_the_width(answer: tuple[int, int]) -> None:
    shown = answer_text(Answer("q", (a_hit("word " * 300, answer),), None, True, {}), 50)
    assert all(len(re.sub("\x1b\\[.m", "", line)) <= 50 for line in shown.splitlines())
    assert shown.count("\x1b[1m") == shown.count("\x1b[0m") and "\x02" not in shown and "\x03" not in shown


def test_no_good_answer_is_said_first() -> None:
    nothing = answer_text(Answer("q", (a_hit(),), 0.07, False, {}), 80)
    assert nothing.startswith("No good answer found (confidence 0.07); the nearest passages:\n")
    assert "No good answer" not in answer_text(Answer("q", (a_hit(),), 0.7, True, {}), 80)
    assert answer_text(Answer("q", (), 0.0, False, {}), 80).startswith("No passage was found")


def test_a_title_longer_than_the_line_is_cut() -> None:
    hit = a_hit(title="word " * 50, score=-12345.678)
    first, *_ = answer_text(Answer("q", (hit,), None, True, {}), 40).splitlines()
    assert len(first) == 40 and "…" in first and first.endswith("-12345.68")


@pytest.mark.parametrize("width", [1, 12])
def test_a_terminal_too_narrow_for_anything_gets_lines_of_forty_columns(width: int) -> None:
    answer = Answer("q", (a_hit("word " * 50, title="title " * 20),), None, True, {})
    assert answer_text(answer, width) == answer_text(answer, 40)


def test_search_takes_a_bundle_that_has_moved(tiny_bundle: Path, tiny_dataset: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_bundle, tmp_path / "bundle")
    Index.build(tmp_path / "bundle", tiny_dataset, tmp_path / "index")
    (tmp_path / "bundle").rename(tmp_path / "moved")
    assert "give its new place with --bundle" in fails("search", tmp_path / "index", "owls")
    assert len(run_json("search", tmp_path / "index", "owls", "--bundle", tmp_path / "moved")["hits"]) == 5


# An index that changes


def test_index_takes_a_structure_and_inspect_tells_its_recall(
    tiny_bundle: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    built = run_json(
        *("index", tiny_bundle, tiny_dataset, "--out", tmp_path / "index", "--vectors", "hnsw", "--storage", "int8")
    )
    (segment,) = run_json("inspect", tmp_path / "index")["segments"].values()
    assert segment["vectors"] == {"kind": "hnsw", "storage": "int8", "size": 32, "candidates searched": 40}
    assert segment["recall"]["queries"] == 38 and 0.9 <= segment["recall"]["recall@40"] <= 1
    assert built["passages"] == 40 and list(built["segments"].values()) == [segment]
    result = run("index", tiny_bundle, tiny_dataset, "--out", tmp_path / "index", "--vectors", "best")
    assert result.exit_code == 2 and "'best' is not one of 'auto', 'exact', 'ivf', 'hnsw'" in result.stderr


def test_add_search_where_delete_and_compact_go_together(index: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(index, tmp_path / "index"))
    (tmp_path / "new.jsonl").write_text(
        '{"_id": "n1", "text": "An owl hunts at night.", "year": 2001}\n'
        '{"_id": "p1", "text": "Granite is hard.", "metadata": {"year": 1999}}\n'
    )
    bundle = ["--bundle", tiny_bundle]
    assert run_json("add", own, tmp_path / "new.jsonl", *bundle) == {"index": str(own), "passages": 2, "replaced": 1}
    again = run("add", own, tmp_path / "new.jsonl", *bundle).stdout
    assert again == "Added 2 passages; 2 earlier versions replaced.\n"
    found = run_json("search", own, "owls", "--where", "year>=1999", "--where", "year<2001", *bundle)
    assert [(hit["id"], hit["metadata"]) for hit in found["hits"]] == [("p1", {"year": 1999})]
    assert "No passage has a field 'day'" in fails("search", own, "owls", "--where", "day=1", *bundle)
    assert "The condition 'year' cannot be read" in fails("search", own, "owls", "--where", "year", *bundle)
    nothing = run("search", own, "owls", "--where", "year=3", *bundle)
    assert nothing.exit_code == 0
    assert nothing.stdout.startswith(
        "No passage was found: none fulfils the conditions, or none shares a word with the question (mode bm25).\n"
    )
    nothing = run_json("search", own, "owls", "--where", "year=3", *bundle)
    assert (nothing["hits"], nothing["found"]) == ([], False)
    assert run("delete", own, "p2", "nobody").stdout == "Deleted 1 passage; 1 id not found.\n"
    assert run_json("delete", own, "n1") == {"index": str(own), "deleted": 1}
    about = run_json("inspect", own)
    assert (about["passages"], about["deleted until compacted"], len(about["segments"])) == (39, 5, 3)
    assert about["fields"] == "year" and "recall@40: 1.0" in run("inspect", own).stdout
    assert run("compact", own).stdout == f"{own} is now in one part.\n"
    assert run_json("compact", own) == {"index": str(own), "changed": False}
    assert run_json("inspect", own)["deleted until compacted"] == 0


def test_a_change_that_cannot_be_made_is_one_line(index: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "twice.jsonl").write_text('{"_id": "a", "text": "x"}\n{"_id": "a", "text": "y"}\n')
    (tmp_path / "empty.jsonl").write_text("")
    assert "line 2: field _id repeats 'a'" in fails("add", index, tmp_path / "twice.jsonl")
    assert "has no rows" in fails("add", index, tmp_path / "empty.jsonl")
    assert "does not exist" in fails("add", index, tmp_path / "nowhere.jsonl")
    assert "is not an index" in fails("add", tiny_bundle, tmp_path / "twice.jsonl")
    assert "is not an index" in fails("delete", tiny_bundle, "p1")
    assert "is not an index" in fails("compact", tiny_bundle)
    with only_writer(index, index):
        assert "Another command is writing to the index" in fails("delete", index, "p1")
    own = Path(shutil.copytree(index, tmp_path / "index"))
    run("delete", own, *(f"p{number}" for number in range(40)))
    assert "is empty: all its passages were deleted" in fails("search", own, "owls", "--bundle", tiny_bundle)


# Evaluate, inspect, demo


def test_evaluate_writes_a_trec_run_a_stage(tiny_bundle: Path, tiny_dataset: Path, tmp_path: Path) -> None:
    result = run("evaluate", tiny_bundle, tiny_dataset, "-k", 10, "--run-dir", tmp_path / "runs")
    assert result.exit_code == 0
    stages = ["BM25", "retriever before", "retriever after", "hybrid", "re-ranked"]
    assert [line[:24].rstrip() for line in result.stdout.splitlines()[3:8]] == stages
    files = {path.stem: path.read_text().splitlines() for path in (tmp_path / "runs").iterdir()}
    assert set(files) == {*(stage.lower().replace(" ", "-") for stage in stages), "qrels"}
    assert len(files["re-ranked"]) == 7 * 40 and files["re-ranked"][0].split()[1] == "Q0"
    assert (
        run_json("compare", tmp_path / "runs" / "qrels.txt", tmp_path / "runs" / "re-ranked.trec")["questions"] == 7
    )


def test_tune_draws_the_front_and_search_uses_what_it_chose(
    tiny_bundle: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    bundle = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    run("index", bundle, tiny_dataset, "--out", tmp_path / "index")
    options = ["--p95-ms", 10_000, "--index", tmp_path / "index", "--questions", 5]
    told = run("tune", bundle, tiny_dataset, *options, "--plot", tmp_path / "front.svg")
    assert told.exit_code == 0 and "MRR@10" in told.stdout and "  chosen" in told.stdout
    assert f"tandemqa search {tmp_path / 'index'}" in told.stdout
    assert (tmp_path / "front.svg").read_text().count("<svg") == 1
    tuned = run_json("tune", bundle, tiny_dataset, *options, "--plot", tmp_path / "front.png")
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")
    assert run_json("inspect", bundle)["tuned"] == tuned["tuned"] and "tuned:" in run("inspect", bundle).stdout
    depth = tuned["tuned"]["depth"]
    hits = run_json("search", tmp_path / "index", "owls", "-k", 40)["hits"]
    assert sum(hit["reranker_score"] is not None for hit in hits) == (40 if depth else 0)


def test_inspect_tells_what_each_folder_holds(
    tiny_bundle: Path, tiny_dataset: Path, index: Path, tmp_path: Path
) -> None:
    dataset = run_json("inspect", tiny_dataset)
    assert (dataset["kind"], dataset["passages"], dataset["questions"]) == ("dataset", 40, 38)
    assert dataset["splits"]["train"] == {"questions": 23, "positives": 23}
    bundle = run_json("inspect", tiny_bundle)
    assert (
        bundle["kind"] == "bundle" and bundle["fingerprint"] == read_json(tiny_bundle / "tandem.json")["fingerprint"]
    )
    described = run_json("inspect", index)
    assert described["kind"] == "index" and described["bundle"]["fingerprint"] == bundle["fingerprint"]
    for name, state in (("candidates", True), ("warm_reranker", False)):
        folder = tmp_path / "run" / "stages" / name
        folder.mkdir(parents=True)
        (folder / "stage.json").write_text(json.dumps({"key": name, "complete": state, "depends_on": {}}))
    told = {"data": {"path": ".", "fingerprint": "0", "questions": 1}, "recipe": {}}
    stages = ["candidates", "warm_reranker", "lists"]
    (tmp_path / "run" / "run.json").write_text(json.dumps(told | {"stages": stages}))
    unfinished = run_json("inspect", tmp_path / "run")
    assert unfinished["stages"] == {"candidates": "complete", "warm_reranker": "unfinished", "lists": "to do"}
    for folder in (tiny_dataset, tiny_bundle, index, tmp_path / "run"):
        text = run("inspect", folder).stdout
        assert text.startswith("kind: ") and "{" not in text


def test_demo_hands_its_options_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[tuple[Path, bool]] = []
    module = types.ModuleType("tandemqa.demo.run")
    module.run_demo = lambda out, as_json: calls.append((out, as_json))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tandemqa.demo.run", module)
    run("demo")
    run("demo", "--out", tmp_path, "--json")
    assert calls == [(Path("runs/demo"), False), (tmp_path, True)]


# Mistakes


def test_what_does_not_exist_is_one_line(tiny_bundle: Path, tiny_dataset: Path, index: Path, tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    out = tmp_path / "out"
    for arguments in (
        ["train", nowhere, "--out", out],
        ["index", nowhere, tiny_dataset, "--out", out],
        ["index", tiny_bundle, nowhere, "--out", out],
        ["search", nowhere, "owls"],
        ["search", index, "owls", "--bundle", nowhere],
        ["evaluate", nowhere, tiny_dataset],
        ["evaluate", tiny_bundle, nowhere],
        ["inspect", nowhere],
    ):
        assert str(nowhere) in fails(*arguments), arguments
    assert list(tmp_path.iterdir()) == []


def test_what_is_something_else_is_one_line(
    tiny_bundle: Path, tiny_dataset: Path, index: Path, tmp_path: Path
) -> None:
    assert "is not a bundle" in fails("index", tiny_dataset, tiny_dataset, "--out", tmp_path / "out")
    assert "corpus.jsonl does not exist" in fails("index", tiny_bundle, tiny_bundle, "--out", tmp_path / "out")
    assert "is not an index" in fails("search", tiny_bundle, "owls")
    assert "is no dataset" in fails("inspect", tmp_path)
    assert "choose another place" in fails("index", tiny_bundle, tiny_dataset, "--out", tiny_dataset)
    assert (tiny_dataset / "corpus.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["search", "INDEX", " "], "The question is empty"),
        (["search", "INDEX", "owls", "-k", "0"], "k is 0"),
        (["search", "INDEX", "owls", "--depth", "-1"], "depth is -1"),
        (["search", "INDEX", "owls", "--mode", "sparse"], "'sparse' is not one of 'dense', 'bm25', 'hybrid'"),
        (["search", "INDEX", "owls", "--stopping", "2"], "stopping is 2.0"),
        (["search", "INDEX", "owls", "--stopping", "0.1"], "did not learn when to stop"),
        (["evaluate", "BUNDLE", "DATA", "--split", "nope"], "no split 'nope'; choose one of dev, test, train"),
        (["evaluate", "BUNDLE", "DATA", "-k", "0"], "k is 0"),
        (["tune", "BUNDLE", "DATA", "--p95-ms", "0"], "p95_ms is 0.0"),
        (["tune", "BUNDLE", "DATA", "--p95-ms", "80", "--split", "nope"], "no split 'nope'"),
        (["tune", "BUNDLE", "DATA", "--p95-ms", "80", "--plot", "front.gif"], "end it with .svg or .png"),
        (["train", "DATA", "--out", "OUT", "--recipe", "slow"], "There is no recipe 'slow'"),
        (["train", "DATA", "--out", "OUT", "--set", "joint.epoch=2"], "the nearest is 'joint.epochs'"),
        (["train", "DATA", "--out", "OUT", "--set", "joint.epochs"], "write it as section.field=value"),
        (["train", "DATA", "--out", "OUT", "--set", "retriever.model=/nowhere"], "'/nowhere' could not be loaded"),
    ],
)
def test_a_wrong_value_is_one_line(
    tiny_bundle: Path, tiny_dataset: Path, index: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    places = {"INDEX": index, "BUNDLE": tiny_bundle, "DATA": tiny_dataset, "OUT": tmp_path / "out"}
    assert message in fails(*(places.get(argument, argument) for argument in arguments))
    assert list(tmp_path.iterdir()) == []


def test_a_bad_line_of_the_data_is_named(tiny_bundle: Path, tiny_dataset: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_dataset, tmp_path / "data")
    with (tmp_path / "data" / "corpus.jsonl").open("a") as file:
        file.write('{"_id": "p0", "text": "again"}\n')
    for arguments in (
        ["inspect", tmp_path / "data"],
        ["index", tiny_bundle, tmp_path / "data", "--out", tmp_path / "out"],
        ["train", tmp_path / "data", "--out", tmp_path / "out"],
    ):
        assert "corpus.jsonl, line 41: field _id repeats 'p0'" in fails(*arguments)
    assert not (tmp_path / "out").exists()


def test_another_model_is_one_line_with_the_command_that_helps(
    tiny_bundle: Path, index: Path, tmp_path: Path
) -> None:
    changed = Bundle.load(tiny_bundle)
    changed.reranker.head.bias.data += 1
    other = save_bundle(tmp_path / "other", changed.retriever, changed.reranker, {}).folder
    line = fails("search", index, "owls", "--bundle", other)
    assert "built by another model" in line and line.endswith(f"tandemqa index {other} DATA --out {index}")


def test_a_full_disk_is_one_line(
    tiny_bundle: Path, tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tandemqa.index.build.store_passages", fail)
    line = fails("index", tiny_bundle, tiny_dataset, "--out", tmp_path / "out")
    assert (
        line.startswith("Error: The disk is full: ")
        and f"{tmp_path / 'out'} was not written; free some space" in line
    )
    assert list(tmp_path.iterdir()) == []


def test_any_failure_of_the_system_is_one_line(tiny_bundle: Path, tiny_dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    line = fails("index", tiny_bundle, tiny_dataset, "--out", tmp_path / "file" / "index")
    place = tmp_path / "file" / "index"
    assert line == f"Error: {place} could not be written: Not a directory; choose another place."


def test_an_interrupt_says_that_the_command_goes_on(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Searcher, "search", interrupt)
    result = run("search", index, "owls")
    assert result.exit_code == 130 and result.stdout == ""
    assert result.stderr.splitlines()[-1] == "Interrupted; nothing is left half-written. Give the same command again."


def test_a_mistake_of_ours_keeps_its_traceback(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Searcher, "search", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run("search", index, "owls")


# As a process


@pytest.mark.parametrize("depth", [0, 5])
def test_standard_output_holds_the_result_and_standard_error_no_more_than_what_is_amiss(
    index: Path, tiny_bundle: Path, depth: int
) -> None:
    command = [sys.executable, "-m", "tandemqa", "search", str(index), "owls", "--json", "--depth", str(depth)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert len(json.loads(done.stdout)["hits"]) == 5
    if depth == 0:
        assert done.stderr == ""
    else:
        assert done.stderr.startswith(f"Warning: The re-ranker of {tiny_bundle} was never measured on dev questions")
        assert done.stderr.count("\n") == 1


def test_an_error_of_a_process_is_one_line_and_two(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tandemqa", "search", str(tmp_path), "owls"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("Error: ") and done.stderr.count("\n") == 1


def test_a_reader_that_goes_away_is_no_error(tiny_dataset: Path) -> None:
    command = [sys.executable, "-m", "tandemqa", "inspect", str(tiny_dataset)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    process.wait(60)
    process.stderr.close()


# Plan, runs, explain


def test_plan_runs_and_explain_tell_of_a_run(tiny_model: Path, tiny_dataset: Path, tmp_path: Path) -> None:
    settings = [
        f"--set=retriever.model={tiny_model}",
        f"--set=reranker.model={tiny_model}",
        "--set=data.questions=10",
        "--set=lists.denoised_share=0.5",
        "--set=lists.low=0.6",
        "--set=lists.high=0.95",
    ]
    before = run_json("plan", "default", tiny_dataset, "--out", tmp_path / "runs" / "a", *settings)
    assert [stage["stage"] for stage in before] == [
        *("warm_retriever", "mine", "warm_reranker", "score", "lists", "joint", "evaluate")
    ]
    assert all(stage["runs"] for stage in before)
    assert run("train", tiny_dataset, "--out", tmp_path / "runs" / "a", *settings).exit_code == 0
    again = run("plan", "default", tiny_dataset, "--out", tmp_path / "runs" / "a", *settings, "--set=lists.low=0.5")
    assert [line.split()[:2] for line in again.stdout.splitlines()] == [
        ["keep", "warm_retriever"],
        ["keep", "mine"],
        ["keep", "warm_reranker"],
        ["keep", "score"],
        ["run", "lists"],
        ["run", "joint"],
        ["run", "evaluate"],
    ]
    assert "lists.low was 0.6, is 0.5" in again.stdout
    listed = run("runs", tmp_path / "runs").stdout
    assert str(tmp_path / "runs" / "a") in listed and "7 of 7 stages; MRR@10 on dev: BM25 " in listed
    found = run_json("runs", tmp_path / "runs")[0]
    assert found["bundle"] and found["questions"] == 10
    assert "was not trained on a question 'nobody'" in fails("explain", tmp_path / "runs" / "a", "nobody")
    known = re.search(r"one that it was is '(.*?)'", fails("explain", tmp_path / "runs" / "a", "nobody"))
    assert known
    explained = run("explain", tmp_path / "runs" / "a", known[1]).stdout
    assert "labelled positive" in explained and "confidence 0." in explained


def test_an_index_is_made_and_inspected_where_one_is(
    tiny_bundle: Path, tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for command in (["index", tiny_bundle, tiny_dataset, "--out", "index"], ["inspect", "index"]):
        done = run(*command)
        assert done.exit_code == 0, done.stderr
    assert run_json("inspect", "index")["passages"] == 40


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_what_the_terminal_cannot_show_ends_no_search(index: Path, form: list[str]) -> None:
    command = [
        sys.executable,
        "-m",
        "tandemqa",
        "search",
        str(index),
        "what was Tokyo called before",
        "-k",
        "40",
        *form,
    ]
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    done = subprocess.run(command, capture_output=True, env=environment, check=True)
    shown = done.stdout.decode("latin-1")
    if form:
        assert any(not hit["text"].isascii() for hit in json.loads(shown)["hits"])
    else:
        assert all(f"\n{rank:2}  " in f"\n{shown}" for rank in range(1, 41))
