"""Recipes: what is accepted, what is refused, and a whole run small."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tandemqa import load_dataset, processes
from tandemqa.encoders.dual import DualEncoder
from tandemqa.errors import TandemError
from tandemqa.lists.build import TrainingLists
from tandemqa.recipe import config
from tandemqa.recipe.config import load_recipe
from tandemqa.recipe.train import train

SMALL = ["data.questions=12", "lists.size=3", "warm_lists.size=2", "warm_reranker.epochs=1", "evaluation.split=dev"]
SHORT = ["warm_retriever.epochs=1", "joint.epochs=1", "mine.depth=20", "lists.depth=10", "warm_lists.depth=10"]


def models(folder: Path) -> list[str]:
    return [f"retriever.model={folder}", f"reranker.model={folder}"]


def test_processes_meet_before_models_are_loaded(tiny_model, tiny_dataset, tmp_path, monkeypatch):
    """For it is there that each is given a GPU of its own."""
    events = []
    monkeypatch.setattr(processes, "join", lambda: events.append("join"))

    def load(config):
        events.append("load")
        raise InterruptedError

    monkeypatch.setattr(DualEncoder, "load", load)
    with pytest.raises(InterruptedError):
        train(tiny_dataset, tmp_path, load_recipe("quick", models(tiny_model)))
    assert events == ["join", "load"]


@pytest.mark.parametrize("name", sorted(file.stem for file in config.READY.glob("*.yaml")))
def test_every_ready_recipe_runs_small(name, tiny_model, tiny_dataset, tmp_path):
    recipe = load_recipe(name, [*SMALL, *SHORT, *models(tiny_model)])
    bundle = train(tiny_dataset, tmp_path / "run", recipe)
    stages = bundle.about["metrics"]["stages"]
    alone = ["re-ranker alone"] if bundle.about["blend"] > 0 else []
    assert list(stages) == ["BM25", "retriever before", "retriever after", "hybrid", "re-ranked", *alone]
    # What was learnt on these questions ranks them at least as well as the re-ranker alone does.
    assert stages["re-ranked"]["mrr@10"]["mean"] >= stages[[*stages][-1]]["mrr@10"]["mean"]
    assert bundle.about["recipe"] == recipe.model_dump()


def test_a_setting_that_something_reads_is_taken_and_so_is_one_of_a_stage_that_is_left_out(tmp_path):
    in_use = ["data.unlabelled=5", "joint.validate_steps=9", "retriever.towers=untied"]
    recipe = load_recipe("quick", [*in_use, "joint.patience=3", "retriever.query_length=32", "lists.low=0.05"])
    assert (recipe.joint.patience, recipe.retriever.query_length, recipe.lists.low) == (3, 32, 0.05)
    assert load_recipe("quick", ["warm_reranker.epochs=0", "warm_reranker.reranker_rate=1"]).warm_reranker.epochs == 0
    (tmp_path / "mine.yaml").write_text("warm_retriever: {reranker_rate: 0.1}\n")
    with pytest.raises(TandemError, match=r"mine\.yaml: warm_retriever\.reranker_rate does nothing"):
        load_recipe(tmp_path / "mine.yaml")


def test_overrides_reach_nested_settings_and_leave_the_rest(tmp_path):
    (tmp_path / "mine.yaml").write_text("joint: {batch_lists: 4}\nloss: {kl_weight: 0.5}\n")
    recipe = load_recipe(tmp_path / "mine.yaml", ["joint.epochs=2", "loss.kl_direction=reranker_retriever"])
    assert (recipe.joint.batch_lists, recipe.joint.epochs) == (4, 2)
    assert (recipe.loss.kl_weight, recipe.loss.kl_direction, recipe.loss.reranker_weight) == (
        0.5,
        "reranker_retriever",
        1.0,
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["joint.epoch=2"], r"no setting 'joint\.epoch'; the nearest is 'joint\.epochs'"),
        (["joint.epochs=many"], r"joint\.epochs: .* \(it is 'many'\)"),
        (["lists.size=1"], r"lists\.size: .*greater than or equal to 2"),
        (["joint"], "has no value; write it as section.field=value"),
        (["seed.deep=3"], "'seed' is a value, not a section"),
        (["loss.kl_direction=sideways"], r"loss\.kl_direction"),
        *(
            ([f"{setting}={value}", *more], rf"with --set: {setting} does nothing, because {why}.*; leave it out")
            for setting, value, why, *more in (
                ("warm_retriever.reranker_rate", 1e-4, "the retriever is trained alone there"),
                ("warm_retriever.head_rate", 1e-4, "the retriever is trained alone there"),
                ("warm_reranker.retriever_rate", 1e-4, "the re-ranker is trained alone there"),
                ("warm_reranker.clip", "per_model", "one model is trained alone there"),
                ("retriever.query_length", 32, "shared towers read queries at passage_length"),
                (
                    "warm_retriever.depth",
                    20,
                    "warm_retriever.negatives is not bm25",
                    "warm_retriever.negatives=random",
                ),
                (
                    *("warm_retriever.negatives_per_question", 2, "warm_retriever.negatives is none"),
                    "warm_retriever.negatives=none",
                ),
                ("lists.low", 0.2, "lists.denoised_share and data.unlabelled are both 0"),
                ("joint.patience", 3, "joint.validate_steps is not set"),
                ("loss.kl_reduction", "mean", "loss.kl_weight is 0", "loss.kl_weight=0"),
            )
        ),
        (["lists.size=[1"], "not valid YAML"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(overrides, message, tmp_path):
    (tmp_path / "mine.yaml").write_text("seed: 1\n")
    with pytest.raises(TandemError, match=message):
        load_recipe(tmp_path / "mine.yaml", overrides)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"- 1\n", "must hold sections"), (b"a: [\n", "not valid YAML"), (b"\xff\xfe", "not valid YAML")],
    ids=["a list", "broken", "not UTF-8"],
)
def test_a_broken_recipe_file_is_named(content, message, tmp_path):
    (tmp_path / "mine.yaml").write_bytes(content)
    with pytest.raises(TandemError, match=message):
        load_recipe(tmp_path / "mine.yaml")


def test_an_unknown_recipe_is_told_the_ready_ones():
    with pytest.raises(TandemError, match=r"no recipe 'fast'.*quick"):
        load_recipe("fast")


def test_a_missing_dev_split_is_found_before_any_training(tiny_model, tiny_dataset, tmp_path):
    data = shutil.copytree(tiny_dataset, tmp_path / "data")
    (data / "qrels" / "dev.tsv").unlink()
    with pytest.raises(TandemError, match="no split 'dev'"):
        train(data, tmp_path / "run", load_recipe("quick", models(tiny_model)))
    assert not (tmp_path / "run").exists()


def test_a_model_that_is_no_model_is_named(tiny_dataset, tmp_path):
    with pytest.raises(TandemError, match=r"The model '.*nothing' could not be loaded"):
        train(tiny_dataset, tmp_path / "run", load_recipe("quick", [f"retriever.model={tmp_path / 'nothing'}"]))


def test_lists_of_a_run_hold_no_labelled_positive_as_negative(tiny_model, tiny_dataset, tmp_path):
    train(tiny_dataset, tmp_path / "run", load_recipe("quick", [*SMALL, *models(tiny_model), "data.questions=null"]))
    dataset = load_dataset(tiny_dataset)
    qrels = dataset.qrels["train"]
    for stage in ("warm_reranker", "lists"):
        lists = TrainingLists.load(tmp_path / "run" / "stages" / stage / "lists.npz")
        for query_row, passages in zip(lists.query_rows, lists.passages, strict=True):
            positives = {dataset.passages.row[p] for p in qrels[list(qrels)[query_row]]}
            assert int(passages[0]) in positives
            assert not positives & set(passages[1:].tolist())


def test_a_finished_run_is_not_trained_again_and_a_late_change_keeps_early_stages(
    tiny_model, tiny_dataset, tmp_path, monkeypatch
):
    recipe = load_recipe("quick", [*SMALL, *models(tiny_model)])
    first = train(tiny_dataset, tmp_path / "run", recipe)
    trained = []
    whole = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: (trained.append(1), whole(self))[1])
    again = train(tiny_dataset, tmp_path / "run", recipe)
    assert trained == [] and again.fingerprint == first.fingerprint
    train(
        tiny_dataset,
        tmp_path / "run",
        load_recipe("quick", [*SMALL, *models(tiny_model), "joint.retriever_rate=0.001"]),
    )
    joint_steps = len((tmp_path / "run" / "stages" / "joint" / "log.jsonl").read_text().splitlines())
    assert len(trained) == joint_steps


KILLED = """
import os, sys, signal
from tandemqa.recipe.config import load_recipe
from tandemqa.recipe.train import train
from tandemqa.training import loop

data, out, model, at = sys.argv[1:]
whole, made = loop._step, []
def step(*arguments):
    if len(made) == int(at):
        os.kill(os.getpid(), signal.SIGKILL)
    made.append(1)
    return whole(*arguments)
loop._step = step
recipe = load_recipe("quick", ["data.questions=12", "joint.batch_lists=2", "warm_reranker.batch_lists=2",
    "evaluation.split=null", f"retriever.model={model}", f"reranker.model={model}"])
loop.CHECKPOINT_SECONDS = 0
train(data, out, recipe)
print(len(made))
"""


def test_a_run_killed_twice_ends_with_the_same_bundle(tiny_model, tiny_dataset, tmp_path):
    def run(out: Path, at: int) -> tuple[int, str]:
        """How it ended, and how many steps it made if it came to its end."""
        arguments = [sys.executable, "-c", KILLED, str(tiny_dataset), str(out), str(tiny_model), str(at)]
        ended = subprocess.run(arguments, capture_output=True, text=True)
        return ended.returncode, ended.stdout

    code, steps = run(tmp_path / "straight", 1000)
    assert code == 0
    assert run(tmp_path / "killed", 3) == (-9, "")
    assert run(tmp_path / "killed", 5) == (-9, "")
    assert not (tmp_path / "killed" / "bundle").exists()
    assert run(tmp_path / "killed", 1000) == (0, f"{int(steps) - 3 - 5}\n"), "what was saved is not made again"
    manifests = [
        json.loads((tmp_path / name / "bundle" / "tandem.json").read_text()) for name in ("straight", "killed")
    ]
    assert manifests[0]["fingerprint"] == manifests[1]["fingerprint"]
    logs = [
        (tmp_path / name / "stages" / "joint" / "log.jsonl").read_text().splitlines()
        for name in ("straight", "killed")
    ]
    losses = [[json.loads(line)["loss"] for line in log] for log in logs]
    assert np.array_equal(losses[0], losses[1])


def test_a_damaged_stage_is_named(tiny_model, tiny_dataset, tmp_path):
    recipe = load_recipe("quick", [*SMALL, *models(tiny_model)])
    train(tiny_dataset, tmp_path / "run", recipe)
    shutil.rmtree(tmp_path / "run" / "bundle")  # a run that is whole reads nothing again
    for file in ("joint/retriever.safetensors", "lists/lists.npz"):
        path = tmp_path / "run" / "stages" / file
        whole = path.read_bytes()
        if path.parent.name == "lists":
            shutil.rmtree(tmp_path / "run" / "stages" / "joint")
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(TandemError, match=rf"stage in .*{path.parent.name} is damaged"):
            train(tiny_dataset, tmp_path / "run", recipe)
        path.write_bytes(whole)


def test_a_folder_in_the_place_of_the_bundle_is_left_alone(tiny_model, tiny_dataset, tmp_path):
    (tmp_path / "run" / "bundle").mkdir(parents=True)
    (tmp_path / "run" / "bundle" / "thesis.tex").write_text("years of work")
    with pytest.raises(TandemError, match="holds something that is no bundle"):
        train(tiny_dataset, tmp_path / "run", load_recipe("quick", [*SMALL, *models(tiny_model)]))
    assert (tmp_path / "run" / "bundle" / "thesis.tex").exists()


def test_lengths_beyond_the_encoder_are_refused(tiny_model, tiny_dataset, tmp_path):
    with pytest.raises(TandemError, match=r"retriever\.passage_length is 600, .* 512 tokens at most"):
        train(
            tiny_dataset,
            tmp_path / "run",
            load_recipe("quick", [*models(tiny_model), "retriever.passage_length=600"]),
        )


def test_a_loss_from_which_nothing_learns_is_refused():
    with pytest.raises(TandemError, match="nothing would learn"):
        load_recipe("quick", ["loss.kl_weight=0", "loss.reranker_weight=0", "loss.retriever_weight=0"])
