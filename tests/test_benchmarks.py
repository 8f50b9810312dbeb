"""Benchmarks measure what their tables say: nothing twice at one commit, nothing of another, no hand's work lost."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import growth
import training


def test_growth_measures_each_cell_once_at_a_commit_and_leaves_the_report_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "growth.md").write_text("by hand\n")
    names = ("seconds_per_list", "tokens_per_second", "peak_mib", "gflops", "matmul_gflops")
    made: list[str] = []

    def run(at: str, seconds: float) -> int:
        """How many cells are measured at this commit, where each takes so long."""
        made.clear()

        def answer(command: list[str], **_: Any) -> SimpleNamespace:
            made.append(command[command.index("--cell") + 1])
            return SimpleNamespace(stdout=json.dumps(dict.fromkeys(names, seconds)) + "\n")

        monkeypatch.setattr(growth, "commit_here", lambda: at)
        monkeypatch.setattr(growth.subprocess, "run", answer)
        growth.main()
        printed = capsys.readouterr().out
        assert f"Commit {at}\n" in printed and printed.count(f"| {seconds:.2f} |") == len(growth.cells())
        return len(made)

    monkeypatch.setattr(sys, "argv", ["growth.py", "--out", str(tmp_path)])
    count = len(growth.cells())
    changed = f"bbbbbbb{growth.CHANGED}"
    assert [run("aaaaaaa", 1), run("aaaaaaa", 1), run("bbbbbbb", 2), run(changed, 3), run(changed, 4)] == [
        count, 0, count, count, count,
    ]  # fmt: skip
    assert (tmp_path / "growth.md").read_text() == "by hand\n" and (tmp_path / "growth.png").exists()
    kept = [json.loads(line)["commit"] for line in (tmp_path / "growth.jsonl").read_text().splitlines()]
    assert kept == ["aaaaaaa"] * count + ["bbbbbbb"] * count + [changed] * 2 * count


def test_both_sides_of_the_training_benchmark_take_as_many_lists_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    configs: list[Any] = []
    monkeypatch.setattr(training, "load_pair", lambda work, head_dropout: None)
    monkeypatch.setattr(training, "read_lists", lambda work, count: [])
    monkeypatch.setattr(training, "train_ours", lambda pair, lists, config, loss: configs.append(config))
    training.joint(tmp_path, 0)
    assert {configs[0].batch_lists, training.DEFAULTS.batch, training.BEST.batch} == {8}
    monkeypatch.setattr(sys, "argv", ["training.py", "--help"])
    with pytest.raises(SystemExit):
        training.main()
    assert "8 lists a step" in " ".join(capsys.readouterr().out.split())
