"""The chain of stages: what runs, what is kept, what is explained, and the same end after any kill."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import WHOLE, whole

import tandemqa
from tandemqa import processes
from tandemqa.data.dataset import load_dataset
from tandemqa.encoders.bundle import Bundle
from tandemqa.errors import TandemError
from tandemqa.evaluation.stages import rank_stages
from tandemqa.files import read_json
from tandemqa.lists.build import TrainingLists, Verdict
from tandemqa.recipe import chain, stage
from tandemqa.recipe.config import load_recipe
from tandemqa.recipe.explain import explain
from tandemqa.recipe.plan import plan, runs
from tandemqa.recipe.train import train
from tandemqa.search.learnt import Learnt
from tandemqa.training.validation import BestState

STAGES = [
    "warm_retriever",
    *("mine", "warm_reranker", "score", "lists", "joint"),
    *("mine-2", "warm_reranker-2", "score-2", "lists-2", "joint-2"),
    "evaluate",
]


@pytest.mark.parametrize(
    ("setting", "first"),
    [
        ("seed=14", "warm_retriever"),
        ("mine.depth=21", "mine"),
        ("warm_reranker.reranker_rate=0.0003", "warm_reranker"),
        ("lists.low=0.4", "lists"),
        ("loss.kl_weight=0.5", "joint"),
        ("evaluation.depth=9", "evaluate"),
        ("joint.micro_tokens=999", None),
    ],
)
def test_a_changed_setting_runs_its_stage_and_all_that_follow(setting, first, finished, tiny_model, tiny_dataset):
    planned = plan(load_dataset(tiny_dataset), whole(tiny_model, setting), finished)
    assert [stage.stage for stage in planned] == STAGES
    running = [stage.stage for stage in planned if stage.runs]
    expected = STAGES[STAGES.index(first) :] if first else []
    if first == "lists":
        expected = [*expected]
    if first == "warm_reranker":
        expected = [name for name in expected if name != "mine"]
    assert running == expected
    if first:
        name, value = setting.split("=")
        reason = next(stage.why for stage in planned if stage.stage == first)
        assert name.split(".")[-1] in reason and value in reason


def test_changed_code_runs_the_stages_it_belongs_to_and_all_that_follow(
    finished, tiny_model, tiny_dataset, tmp_path, monkeypatch
):
    package = shutil.copytree(Path(tandemqa.__file__).parent, tmp_path / "tandemqa")
    with (package / "search" / "rank.py").open("a") as file:
        file.write("# another version\n")
    monkeypatch.setattr(tandemqa, "__file__", str(package / "__init__.py"))
    monkeypatch.setattr(stage, "code_version", stage.code_version.__wrapped__)
    planned = {each.stage: each for each in plan(load_dataset(tiny_dataset), whole(tiny_model), finished)}
    assert [name for name, each in planned.items() if not each.runs] == ["warm_retriever"]
    assert planned["mine"].why == "this version of the program computes it with other code"
    assert "its input mine changes" in planned["lists"].why and "code" not in planned["lists"].why


def test_processes_meet_between_the_best_state_and_the_removal_of_what_led_to_it(
    tiny_model, tiny_dataset, tmp_path, monkeypatch
):
    events = []

    def noted(name, do):
        return lambda *arguments: (events.append(name), do(*arguments))[1]

    monkeypatch.setattr(BestState, "restore", noted("restore", BestState.restore))
    monkeypatch.setattr(chain, "remove_checkpoints", noted("remove", chain.remove_checkpoints))
    monkeypatch.setattr(processes, "wait", noted("wait", processes.wait))
    train(tiny_dataset, tmp_path, whole(tiny_model, "rounds=1", "evaluation.split=null"))
    behind = events[events.index("restore") + 1 :]
    assert behind[: behind.index("remove")] == ["wait"]


def test_what_is_finished_is_not_run_again(finished, tiny_model, tiny_dataset, monkeypatch):
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *arguments: pytest.fail("something was trained"))
    before = read_json(finished / "bundle" / "tandem.json")
    assert train(tiny_dataset, finished, whole(tiny_model)).about == before
    (run,) = runs(finished.parent)
    assert list(run["stages"]) == STAGES and set(run["stages"].values()) == {"complete"} and run["bundle"]


def test_the_lists_hold_pseudo_labelled_questions_and_no_positive_as_negative(finished, tiny_dataset):
    dataset = load_dataset(tiny_dataset)
    about = read_json(finished / "stages" / "lists" / "lists.json")
    assert about["unlabelled"] == 6 and 0 <= about["pseudo_labelled"] <= 6
    assert about["counts"]["denoised lists"] > 0 and about["counts"]["undenoised lists"] > 0
    with np.load(finished / "stages" / "mine" / "candidates.npz") as arrays:
        query_ids = arrays["query_ids"].tolist()
    assert len(query_ids) == 18
    lists = TrainingLists.load(finished / "stages" / "lists" / "lists.npz")
    for number, passages in zip(lists.query_rows.tolist(), lists.passages.tolist(), strict=True):
        grades = dataset.qrels["train"][query_ids[number]]
        if number < 12:
            assert not {dataset.passages.row[p] for p in grades} & set(passages[1:])


def test_explain_tells_what_became_of_each_candidate(finished, tiny_dataset):
    dataset = load_dataset(tiny_dataset)
    query_id = np.load(finished / "stages" / "mine" / "candidates.npz")["query_ids"][0]
    explanation = explain(finished, str(query_id))
    assert explanation.question == dataset.queries[query_id] and not explanation.pseudo_labelled
    ranked = [candidate for candidate in explanation.candidates if candidate.rank is not None]
    assert [candidate.rank for candidate in ranked] == list(range(1, 21))
    about = read_json(finished / "stages" / "lists" / "lists.json")
    for candidate in ranked:
        grade = dataset.qrels["train"][query_id].get(candidate.id, 0)
        assert (candidate.verdict == "labelled") == (grade > 0)
        if candidate.verdict == "negative":
            assert candidate.confidence < about["low"] and f"{about['low']:.2f}" in candidate.why
    lists = TrainingLists.load(finished / "stages" / "lists" / "lists.npz")
    own = lists.passages[lists.query_rows == 0]
    assert sum(candidate.lists for candidate in explanation.candidates) == (own >= 0).sum()
    assert sum(candidate.heads for candidate in explanation.candidates) == len(own)


def test_explain_tells_a_pseudo_label_from_a_label_even_where_the_dataset_has_one(finished, tiny_dataset, tmp_path):
    """Question 12 is the first whose labels were not read; its best candidate is made to head a list."""
    run = shutil.copytree(finished, tmp_path / "run")
    with np.load(run / "stages" / "mine" / "candidates.npz") as arrays:
        query_id, rows = str(arrays["query_ids"][12]), arrays["rows"][12]
    assert query_id in load_dataset(tiny_dataset).qrels["train"]
    listed = run / "stages" / "lists"
    TrainingLists(np.array([12], dtype=np.int32), rows[None, :4]).save(listed / "lists.npz")
    verdicts = np.load(listed / "verdicts.npy")
    verdicts[12] = Verdict.NEGATIVE
    verdicts[12, 0] = Verdict.LABELLED
    np.save(listed / "verdicts.npy", verdicts)
    explanation = explain(run, query_id)
    assert explanation.pseudo_labelled
    first, second, *_ = explanation.candidates
    assert first.why.startswith("taken for the positive") and (first.heads, first.lists) == (1, 1)
    assert second.why.startswith("negative") and (second.heads, second.lists) == (0, 1)


def test_explain_says_of_an_unlabelled_question_why_it_has_no_list(tiny_model, tiny_dataset, tmp_path):
    settings = ["lists.high=1", "lists.thresholds=confidence", "rounds=1", "joint.epochs=0", "evaluation.split=null"]
    train(tiny_dataset, tmp_path, whole(tiny_model, *settings))
    with np.load(tmp_path / "stages" / "mine" / "candidates.npz") as arrays:
        labelled, unlabelled = arrays["query_ids"][[0, -1]].tolist()
    told = explain(tmp_path, unlabelled)
    assert not told.pseudo_labelled
    assert {candidate.why.split(":")[0] for candidate in told.candidates} == {"in no list"}
    assert any(candidate.heads for candidate in explain(tmp_path, labelled).candidates)


@pytest.mark.parametrize(
    ("query_id", "round_number", "message"),
    [
        ("nobody", 1, "not trained on a question 'nobody'"),
        ("q", 3, "has no round 3; its stages are"),
    ],
)
def test_explain_says_what_there_is_not(query_id, round_number, message, finished):
    with pytest.raises(TandemError, match=message):
        explain(finished, query_id, round_number)


def test_explain_wants_a_training_run(tmp_path):
    with pytest.raises(TandemError, match="is no training run"):
        explain(tmp_path, "q")


KILLED = """
import os, signal, sys
from tandemqa.recipe.config import load_recipe
from tandemqa.recipe.train import train
from tandemqa.training import loop

data, out, at, *settings = sys.argv[1:]
steps = []
whole = loop._step
def step(*arguments):
    steps.append(1)
    if len(steps) == int(at):
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(*arguments)
loop._step = step
loop.CHECKPOINT_SECONDS = 0
train(data, out, load_recipe("quick", settings))
print(len(steps))
"""


def test_a_chain_killed_in_every_training_stage_ends_with_the_same_bundle(
    finished, tiny_model, tiny_dataset, tmp_path
):
    def run(at: int) -> tuple[int, str]:
        settings = [*WHOLE, f"retriever.model={tiny_model}", f"reranker.model={tiny_model}"]
        arguments = [sys.executable, "-c", KILLED, str(tiny_dataset), str(tmp_path / "run"), str(at), *settings]
        ended = subprocess.run(arguments, capture_output=True, text=True)
        return ended.returncode, ended.stdout

    logs = sorted((finished / "stages").glob("*/log.jsonl"), key=lambda log: STAGES.index(log.parent.name))
    steps = [len(log.read_text().splitlines()) for log in logs]
    assert len(steps) == 5
    kills = (2, steps[0] + 1, steps[1] + 3)  # counted anew in each process: warm-up, warm-up, after a refresh
    for at in kills:
        assert run(at) == (-9, "")
        assert not (tmp_path / "run" / "bundle").exists()
    left = sum(steps) - sum(at - 1 for at in kills)
    assert run(0) == (0, f"{left}\n"), "what was saved is not made again"
    fingerprints = [read_json(out / "bundle" / "tandem.json")["fingerprint"] for out in (finished, tmp_path / "run")]
    assert fingerprints[0] == fingerprints[1]


def test_what_the_evaluation_learns_of_searching_is_in_the_bundle(finished, tiny_dataset):
    bundle = Bundle.load(finished)
    learnt = Learnt.of(bundle)
    evaluated = read_json(finished / "stages" / "evaluate" / "evaluation.json")
    assert learnt.model_dump() == {name: evaluated[name] for name in Learnt.model_fields}
    again = rank_stages(bundle, load_dataset(tiny_dataset), "dev", 10).report(learnt).stages
    for name, figures in bundle.about["metrics"]["stages"].items():
        assert again[name]["mrr@10"].mean == pytest.approx(figures["mrr@10"]["mean"], abs=0.01)


def test_a_refresh_takes_new_candidates_from_the_models_as_they_stand(finished):
    made = [
        read_json(path)["counts"] for path in sorted((finished / "stages" / "joint").glob("refresh-*/lists.json"))
    ]
    steps = len((finished / "stages" / "joint" / "log.jsonl").read_text().splitlines())
    assert len(made) == (steps - 1) // 2
    first = json.loads((finished / "stages" / "joint" / "log.jsonl").read_text().splitlines()[0])
    assert {"kl", "rank_correlation", "retriever_gradient_norm", "reranker_gradient_norm"} <= set(first)


def test_a_recipe_deeper_than_its_candidates_is_refused(tmp_path):
    with pytest.raises(TandemError, match=r"lists\.depth \(300\) is more than mine\.depth \(100\)"):
        load_recipe("quick", ["lists.depth=300"])


def test_plan_writes_nothing(tiny_model, tiny_dataset, tmp_path):
    planned = plan(load_dataset(tiny_dataset), whole(tiny_model), tmp_path / "run")
    assert all(stage.runs and stage.why == "it has no result yet" for stage in planned)
    assert not (tmp_path / "run").exists()


def test_an_interrupted_stage_is_told_from_a_new_one(finished, tiny_model, tiny_dataset, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    state = read_json(run / "stages" / "joint-2" / "stage.json")
    (run / "stages" / "joint-2" / "stage.json").write_text(json.dumps(state | {"complete": False}))
    planned = {stage.stage: stage for stage in plan(load_dataset(tiny_dataset), whole(tiny_model), run)}
    assert planned["joint-2"].runs and "goes on where it stopped" in planned["joint-2"].why
    assert not planned["evaluate"].runs
