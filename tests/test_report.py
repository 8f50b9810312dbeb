"""The report: its numbers against numbers made another way, and a page that needs no other and trusts no text."""

import json
import math
import shutil
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import tandemqa.report
from tandemqa.cli import app
from tandemqa.data.dataset import Dataset, load_dataset
from tandemqa.data.runs import Run
from tandemqa.errors import TandemError
from tandemqa.evaluation.significance import paired_interval, randomisation_test
from tandemqa.files import read_json
from tandemqa.lists.build import ListsConfig, Verdict
from tandemqa.lists.denoise import Scores, denoised_lists
from tandemqa.report.gather import Changes, Confidence, Curve, Facts, Lists, Missing, gather
from tandemqa.report.page import write_report
from tandemqa.report.plots import moving_average

SECTIONS = ["run", "metrics", "candidates", "suspects", "curves", "changes"]
LOGS = ["warm_retriever", "warm_reranker", "joint", "warm_reranker-2", "joint-2"]


def write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


class Page(HTMLParser):
    """The elements of a page, and its text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def count(self, name: str) -> int:
        return sum(tag == name for tag, _ in self.elements)


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """The finished run, to be changed."""
    return Path(shutil.copytree(finished, tmp_path / "run", ignore=shutil.ignore_patterns("*.safetensors")))


@pytest.fixture
def telling(copy: Path, tiny_dataset: Path) -> Path:
    """The finished run as if its re-ranker knew positives from others, and its rankings had changed.

    Re-ranked, the positives of the eight dev questions stand on ranks 1, 2, 3, 4, 5, 10 and nowhere twice; before, on
    2, 1, nowhere, 8, 5, 1, nowhere and 1.
    """
    dataset = load_dataset(tiny_dataset)
    random = np.random.default_rng(1)
    for suffix in ("", "-2"):
        candidates = mined(copy, suffix)
        rankings = zip(candidates.query_ids, candidates.rows.tolist(), strict=True)
        labelled = np.array([[label(dataset, query, row) > 0 for row in rows] for query, rows in rankings])
        scores = (random.normal(size=labelled.shape) + 3 * labelled).astype(np.float32)
        np.save(copy / "stages" / f"score{suffix}" / "scores.npy", scores)
        drawn, about = denoised_lists(
            candidates,
            Scores(scores, scores[:12][labelled[:12]]),
            {query: dataset.qrels["train"][query] for query in candidates.query_ids[:12]},
            candidates.query_ids[12:],
            dataset.passages.ids,
            dataset.passages.row,
            np.arange(40, dtype=np.int64),
            ListsConfig(depth=15, size=4, denoised_share=0.5),
            seed=3,
        )
        folder = copy / "stages" / f"lists{suffix}"
        np.save(folder / "verdicts.npy", drawn.verdicts)
        write(folder / "lists.json", about | {"counts": drawn.counts})
    ranks = {"re-ranked": [1, 2, 3, 4, 5, 10, None, None], "retriever-before": [2, 1, None, 8, 5, 1, None, 1]}
    for name, places in ranks.items():
        lines = []
        for (query, grades), place in zip(dataset.qrels["dev"].items(), places, strict=True):
            ranking = [passage for passage in dataset.passages.ids if passage not in grades][:10]
            if place is not None:
                ranking[place - 1] = next(iter(grades))
            lines += [f"{query} Q0 {passage} {rank} {-rank} x\n" for rank, passage in enumerate(ranking, 1)]
        (copy / "stages" / "evaluate" / f"{name}.trec").write_text("".join(lines))
    return copy


def mined(run: Path, suffix: str = "") -> Run:
    with np.load(run / "stages" / f"mine{suffix}" / "candidates.npz") as arrays:
        return Run(arrays["query_ids"].tolist(), arrays["rows"], arrays["scores"])


def label(dataset: Dataset, query: str, row: int) -> int:
    return dataset.qrels["train"].get(query, {}).get(dataset.passages.ids[row], 0)


def first_confidence(facts: Facts, number: int = 0) -> Confidence:
    lists = facts.lists[number]
    assert isinstance(lists, Lists) and isinstance(lists.confidence, Confidence)
    return lists.confidence


# Numbers


def test_it_tells_what_was_run(finished: Path, tiny_dataset: Path) -> None:
    facts = gather(finished)
    assert facts.data.path == tiny_dataset.resolve() and facts.data.questions == 12
    assert facts.bundle == finished / "bundle"
    assert set(facts.stages.values()) == {"complete"} and len(facts.stages) == 12
    settings = {setting.name: (setting.value, setting.default) for setting in facts.settings}
    assert settings["rounds"] == (2, 1) and settings["lists.denoised_share"] == (0.5, 0.0)
    assert "seed" not in settings and "joint.schedule" not in settings


def test_candidates_are_counted_as_a_loop_counts_them(telling: Path, tiny_dataset: Path) -> None:
    dataset = load_dataset(tiny_dataset)
    facts = gather(telling)
    assert len(facts.lists) == 2
    for number, suffix in enumerate(["", "-2"]):
        about = read_json(telling / "stages" / f"lists{suffix}" / "lists.json")
        candidates = mined(telling, suffix)
        scores = np.load(telling / "stages" / f"score{suffix}" / "scores.npy")
        bands = dict.fromkeys(("negative", "dropped", "positive"), 0)
        positives = dict.fromkeys(bands, 0)
        groups = {True: 0, False: 0}
        for query, rows, values in zip(candidates.query_ids, candidates.rows.tolist(), scores.tolist(), strict=True):
            for place, (row, value) in enumerate(zip(rows, values, strict=True)):
                sure = 1 / (1 + math.exp(-(about["slope"] * value + about["offset"])))
                band = "negative" if sure < 0.1 else "positive" if sure > 0.9 else "dropped"
                # Of the questions that were drawn, the labels are known; they come first.
                labelled = label(dataset, query, row) > 0 and candidates.query_ids.index(query) < 12
                groups[labelled] += 1
                positives[band] += labelled
                if place < 15 and candidates.query_ids.index(query) < 12:
                    bands[band] += not labelled
        lists = facts.lists[number]
        assert isinstance(lists, Lists)
        confidence = first_confidence(facts, number)
        assert confidence.positives_by_band == {
            Verdict.NEGATIVE: positives["negative"],
            Verdict.DROPPED: positives["dropped"],
            Verdict.POSITIVE: positives["positive"],
        }
        assert confidence.positives.sum() == groups[True] and confidence.others.sum() == groups[False]
        assert confidence.edges[0] == scores.min() and confidence.edges[-1] == scores.max()
        verdicts = np.load(telling / "stages" / f"lists{suffix}" / "verdicts.npy")
        assert bands["negative"] == (verdicts[:12] == Verdict.NEGATIVE).sum() > 0
        assert bands["dropped"] == (verdicts[:12] == Verdict.DROPPED).sum() > 0
        assert bands["positive"] == (verdicts[:12] == Verdict.POSITIVE).sum()
        assert lists.verdicts == {verdict: (verdicts == verdict).sum() for verdict in Verdict if verdict}
        assert lists.counts == about["counts"] | {
            "unlabelled questions": 6,
            "pseudo-labelled questions": about["pseudo_labelled"],
        }


def test_suspects_are_the_unjudged_candidates_of_highest_confidence(telling: Path, tiny_dataset: Path) -> None:
    dataset = load_dataset(tiny_dataset)
    about = read_json(telling / "stages" / "lists-2" / "lists.json")
    candidates, scores = mined(telling, "-2"), np.load(telling / "stages" / "score-2" / "scores.npy")
    expected = sorted(
        (
            (float(scores[number, place]), dataset.queries[query], dataset.passages.ids[row], place + 1)
            for number, query in enumerate(candidates.query_ids)
            for place, row in enumerate(candidates.rows[number].tolist())
            if dataset.passages.ids[row] not in dataset.qrels["train"].get(query, {})
        ),
        reverse=True,
    )[:20]
    facts = gather(telling)
    assert isinstance(facts.suspects, list) and facts.suspects is not None
    assert [(each.question, each.id, each.rank) for each in facts.suspects] == [each[1:] for each in expected]
    for suspect, (score, *_) in zip(facts.suspects, expected, strict=True):
        assert suspect.confidence == pytest.approx(1 / (1 + math.exp(-(about["slope"] * score + about["offset"]))))
        assert len(suspect.text) <= 301


def test_what_reads_like_another_or_was_judged_is_no_suspect(
    telling: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    before = gather(telling).suspects
    assert isinstance(before, list)
    first, second = before[:2]
    dataset = load_dataset(tiny_dataset)
    query_of = {text: query for query, text in dataset.queries.items()}
    moved = with_data(telling, tiny_dataset, tmp_path)
    with (moved / "qrels" / "train.tsv").open("a") as file:
        file.write(f"{query_of[first.question]}\t{first.id}\t0\n")
    trust_data(telling, moved)
    candidates = mined(telling, "-2")
    verdicts = np.load(telling / "stages" / "lists-2" / "verdicts.npy")
    number = candidates.query_ids.index(query_of[second.question])
    assert second.rank <= verdicts.shape[1]
    verdicts[number, second.rank - 1] = Verdict.SAME_TEXT
    np.save(telling / "stages" / "lists-2" / "verdicts.npy", verdicts)
    after = gather(telling).suspects
    assert isinstance(after, list) and after[:18] == before[2:]


def test_wins_and_losses_are_those_made_by_hand(telling: Path, tiny_dataset: Path) -> None:
    dataset = load_dataset(tiny_dataset)
    before, after = (
        np.array([0 if rank is None else 1 / rank for rank in ranks])
        for ranks in ([2, 1, None, 8, 5, 1, None, 1], [1, 2, 3, 4, 5, 10, None, None])
    )
    changes = gather(telling).changes
    assert isinstance(changes, Changes)
    difference = changes.difference
    assert (difference.wins, difference.ties, difference.losses) == (3, 2, 3)
    assert difference.mean == pytest.approx((after - before).mean())
    assert (difference.low, difference.high) == pytest.approx(paired_interval(before, after, 0))
    assert difference.p == pytest.approx(randomisation_test(before, after, 0))
    assert changes.differences == pytest.approx(np.sort(after - before))
    assert [(each.before, each.after) for each in changes.wins] == [(2, 1), (None, 3), (8, 4)]
    assert [(each.before, each.after) for each in changes.losses] == [(1, None), (1, 10), (1, 2)]
    dev = list(dataset.qrels["dev"])
    assert changes.wins[0].question == dataset.queries[dev[0]] and changes.wins[0].top_is_labelled
    assert changes.losses[0].question == dataset.queries[dev[7]] and not changes.losses[0].top_is_labelled
    (positive,) = dataset.qrels["dev"][dev[7]]
    assert changes.losses[0].title == dataset.passages[dataset.passages.row[positive]].title
    assert changes.losses[0].top == "Basalt"


def test_curves_are_what_the_logs_hold(finished: Path) -> None:
    curves = gather(finished).curves
    assert [curve.stage for curve in curves if isinstance(curve, Curve)] == LOGS
    for curve in curves:
        assert isinstance(curve, Curve)
        lines = (finished / "stages" / curve.stage / "log.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        assert curve.steps.tolist() == [record["step"] for record in records] == list(range(len(records)))
        assert curve.values["loss"].tolist() == [record["loss"] for record in records]
        assert curve.minutes == pytest.approx(sum(record["seconds"] for record in records) / 60)
        for speed, record in zip(curve.values["tokens_per_second"], records, strict=True):
            assert speed == pytest.approx(record["tokens"] / max(record["seconds"], 0.001))


@pytest.mark.parametrize("window", [1, 2, 5, 50])
def test_a_moving_average_is_the_mean_of_what_is_near_and_finite(window: int) -> None:
    values = np.random.default_rng(0).normal(size=30)
    values[7] = np.inf
    near = [values[max(0, i - window // 2) : i + (window + 1) // 2] for i in range(30)]
    expected = [part[np.isfinite(part)].mean() if np.isfinite(part).any() else 0.0 for part in near]
    assert moving_average(values, window) == pytest.approx(expected)


# The page


def test_the_command_writes_a_page_that_needs_no_other(telling: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["report", str(telling), "--json"])
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout) == {"report": str(telling / "report.html")}
    page = Page(telling / "report.html")
    assert [about.get("id") for tag, about in page.elements if tag == "h2"] == SECTIONS
    assert page.count("svg") == 1 + 2 + 5 + 1 and page.count("script") == page.count("img") == page.count("link") == 0
    for _, about in page.elements:
        assert "src" not in about
        for name in ("href", "xlink:href"):
            assert (about.get(name) or "#").startswith("#")
    assert "url(" not in page.source.replace("url(#", "") and "@import" not in page.source
    assert "Traceback" not in page.text and "no longer" not in page.text
    for word in ("Round 1", "Round 2", "re-ranker alone", "3 wins, 2 ties, 3 losses", "low 0.10", "high 0.90"):
        assert word in page.text, word


def test_the_same_run_gives_the_same_page(telling: Path, tmp_path: Path) -> None:
    for name in ("a.html", "b.html"):
        write_report(telling, tmp_path / name)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_a_long_run_gives_a_page_of_bounded_size(copy: Path, tmp_path: Path) -> None:
    for stage in LOGS:
        log = copy / "stages" / stage / "log.jsonl"
        record = json.loads(log.read_text().splitlines()[0])
        random = np.random.default_rng(0)
        with log.open("w") as file:
            for step in range(20_000):
                noise = {name: value * random.lognormal() for name, value in record.items()}
                file.write(json.dumps(noise | {"step": step}) + "\n")
    write_report(copy, tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size < 2_000_000


def with_data(run: Path, data: Path, tmp_path: Path) -> Path:
    """A copy of the data, to be changed."""
    return Path(shutil.copytree(data, tmp_path / "data"))


def trust_data(run: Path, data: Path) -> None:
    """Let the run be one of the data as it is now."""
    about = read_json(run / "run.json")
    about["data"] |= {"path": str(data), "fingerprint": load_dataset(data).fingerprint}
    write(run / "run.json", about)


HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)> &lt; {{ 7 * 7 }} $\\frac{1}{2}$"


def test_no_text_of_the_data_becomes_markup(telling: Path, tiny_dataset: Path, tmp_path: Path) -> None:
    data = with_data(telling, tiny_dataset, tmp_path)
    for name, fields in (("corpus.jsonl", ("title", "text")), ("queries.jsonl", ("text",))):
        records = [json.loads(line) for line in (data / name).read_text(encoding="utf-8").splitlines()]
        with (data / name).open("w") as file:
            for record in records:
                file.write(json.dumps(record | {field: HOSTILE + record[field] for field in fields}) + "\n")
    trust_data(telling, data)
    about = read_json(telling / "run.json")
    about["recipe"]["retriever"]["model"] = HOSTILE
    write(telling / "run.json", about)
    evaluation = read_json(telling / "stages" / "evaluate" / "evaluation.json")
    evaluation["metrics"]["stages"][HOSTILE] = evaluation["metrics"]["stages"]["BM25"]
    evaluation["metrics"]["split"] = "dev"
    write(telling / "stages" / "evaluate" / "evaluation.json", evaluation)
    write_report(telling, tmp_path / "page.html")
    page = Page(tmp_path / "page.html")
    assert page.count("script") == page.count("img") == 0
    assert not any(name.startswith("on") for _, about in page.elements for name in about)
    # Twenty suspects with question, title and text; the setting; the stage in table and plot.
    assert page.text.count(HOSTILE) >= 20 * 3 + 3


# Runs that lack something


@pytest.mark.parametrize("kept", range(13))
def test_an_unfinished_run_says_what_is_missing(kept: int, copy: Path, tmp_path: Path) -> None:
    names = read_json(copy / "run.json")["stages"]
    for name in names[kept:]:
        shutil.rmtree(copy / "stages" / name)
    if kept < 12:
        shutil.rmtree(copy / "bundle")
    facts = gather(copy)
    assert list(facts.stages.values()) == ["complete"] * kept + ["to do"] * (12 - kept)
    found = [not isinstance(lists, Missing) for lists in facts.lists]
    assert found == [kept > names.index("lists"), kept > names.index("lists-2")]
    assert isinstance(facts.suspects, Missing) == (kept <= names.index("lists"))
    assert [not isinstance(curve, Missing) for curve in facts.curves] == [kept > names.index(name) for name in LOGS]
    for part in (facts.evaluation, facts.changes, facts.bundle):
        assert isinstance(part, Missing) == (kept < 12)
    if kept in (0, 6):
        write_report(copy, tmp_path / "page.html")
        text = Page(tmp_path / "page.html").text
        assert "The stage evaluate has not been run yet; run tandemqa train to its end to see this." in text
        assert "The run has no bundle yet." in text


def test_a_stage_in_the_midst_of_its_training_shows_its_steps_so_far(copy: Path, tmp_path: Path) -> None:
    stage = copy / "stages" / "joint-2"
    write(stage / "stage.json", read_json(stage / "stage.json") | {"complete": False})
    with (stage / "log.jsonl").open("a") as file:
        file.write('{"loss": 0.25, "kl')
    steps = len((stage / "log.jsonl").read_text().splitlines()) - 1
    facts = gather(copy)
    curve = facts.curves[-1]
    assert facts.stages["joint-2"] == "unfinished" and isinstance(curve, Curve) and len(curve.steps) == steps
    write_report(copy, tmp_path / "page.html")
    assert f"{steps} steps so far" in Page(tmp_path / "page.html").text
    (stage / "log.jsonl").write_text("")
    assert "its log has no step yet" in str(gather(copy).curves[-1])


def test_what_an_earlier_recipe_left_is_not_shown(copy: Path) -> None:
    stage = copy / "stages" / "warm_reranker" / "stage.json"
    write(stage, read_json(stage) | {"key": "another", "complete": False})
    facts = gather(copy)
    states = list(facts.stages.values())
    assert states == ["complete", "complete", "unfinished", *["outdated"] * 9]
    assert "still to be run with this one" in str(facts.evaluation)
    assert all("still to be run with this one" in str(lists) for lists in facts.lists)


def test_data_that_is_gone_or_changed_is_told_in_its_place(copy: Path, tiny_dataset: Path, tmp_path: Path) -> None:
    data = with_data(copy, tiny_dataset, tmp_path)
    trust_data(copy, data)
    assert isinstance(gather(copy).changes, Changes)
    with (data / "queries.jsonl").open("a") as file:
        file.write('{"_id": "new", "text": "new"}\n')
    for sentence in ("has changed", "is no longer"):
        facts = gather(copy)
        for part in (facts.suspects, facts.changes):
            assert isinstance(part, Missing) and sentence in part and str(data) in part
        assert not isinstance(facts.evaluation, Missing)
        assert isinstance(facts.lists[0], Lists) and sum(facts.lists[0].verdicts.values()) > 0
        write_report(copy, tmp_path / "page.html")
        assert sentence in Page(tmp_path / "page.html").text
        shutil.rmtree(data, ignore_errors=True)


def test_a_recipe_without_scores_measurement_or_a_base_model(copy: Path, tmp_path: Path) -> None:
    for suffix in ("", "-2"):
        path = copy / "stages" / f"lists{suffix}" / "lists.json"
        write(path, {"counts": read_json(path)["counts"]})
    (copy / "stages" / "evaluate" / "retriever-before.trec").unlink()
    facts = gather(copy)
    assert "asked for no scores" in str(facts.suspects)
    assert "was not measured" in str(facts.changes)
    about = read_json(copy / "run.json")
    write(copy / "run.json", about | {"stages": about["stages"][:-1]})
    facts = gather(copy)
    assert "evaluation.split is null" in str(facts.evaluation) and facts.changes == facts.evaluation
    write_report(copy, tmp_path / "page.html")
    assert Page(tmp_path / "page.html").count("svg") == 5


# Mistakes


def fails(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["report", *map(str, arguments)])
    assert result.exit_code == 2 and result.stdout == "", result.output
    return str(result.stderr.splitlines()[-1])


def test_a_folder_that_is_no_run_is_one_line(tmp_path: Path) -> None:
    assert f"{tmp_path} is no training run (it holds no run.json)" in fails(tmp_path)


def test_no_page_is_left_where_it_cannot_be_written(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    assert "folder could not be written" in fails(finished, "--out", tmp_path / "folder")
    assert [path.name for path in tmp_path.rglob("*")] == ["folder"]


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("run.json", lambda text: b"{", "run.json is not valid JSON"),
        ("run.json", lambda text: b"[1]", "run.json is not what `train` writes"),
        ("stages/joint/stage.json", lambda text: b"{}", "stages/joint is damaged"),
        ("stages/mine/candidates.npz", lambda text: text[:-50], "stages/mine is damaged"),
        ("stages/score/scores.npy", lambda text: b"", "stages/score is damaged"),
        ("stages/lists/verdicts.npy", lambda text: text[:99], "stages/lists is damaged"),
        ("stages/evaluate/evaluation.json", lambda text: b"{}", "stages/evaluate is damaged"),
        ("stages/evaluate/re-ranked.trec", lambda text: b"one\n" + text, "re-ranked.trec, line 1: 1 column;"),
        ("stages/joint/log.jsonl", lambda text: b"no\n" + text, "log.jsonl, line 1: not valid JSON"),
        ("stages/joint/log.jsonl", lambda text: b"{}\n" + text, "log.jsonl is not a log that `train` wrote"),
    ],
)
def test_a_damaged_file_is_named(file: str, damage: Callable[[bytes], bytes], message: str, copy: Path) -> None:
    (copy / file).write_bytes(damage((copy / file).read_bytes()))
    assert message in fails(copy)
    assert not (copy / "report.html").exists()


@pytest.mark.parametrize("package", ["matplotlib", "jinja2"])
def test_a_missing_package_is_one_line(package: str, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*sys.modules]:
        if name.split(".")[0] == package or name.startswith(("tandemqa.report.page", "tandemqa.report.plots")):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(tandemqa.report, "plots")
    monkeypatch.setitem(sys.modules, package, None)
    message = fails(finished)
    assert f"needs the package {package}" in message and "pip install 'tandemqa[report]'" in message


def test_gather_refuses_what_the_command_refuses(tmp_path: Path) -> None:
    with pytest.raises(TandemError, match="is no training run"):
        gather(tmp_path)
