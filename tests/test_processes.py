"""Several processes against one: the same lists, losses and weights, with torchrun and Gloo as a user starts them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import WHOLE
from safetensors.torch import load_file

from tandemqa.encoders import backbone
from tandemqa.lists.build import NO_PASSAGE, TrainingLists

# Rounding differs with the order of sums; Adam, which divides by the gradient's size, lets the differences grow
# where a gradient is next to nothing. Weights are about 0.2, and 50 steps move them by up to 5e-3.
TOLERANCE = 2e-4
# What shifts all scores of a list, or all logits of an attention, alike has no gradient but rounding, of which Adam
# makes steps.
UNSEEN = {
    "retriever": ("key.bias",),
    "reranker": ("key.bias", "linear.bias", "layer.1.output.LayerNorm.bias"),
}


PROGRAM = ("-m", "tandemqa")
IN_FLOAT32 = (str(Path(__file__).with_name("in_float32.py")),)


def torchrun(count: int, data: Path, out: Path, settings: list[str], program: tuple[str, ...] = PROGRAM) -> list[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    command += [*program, "train", str(data), "--out", str(out)]
    return command + [word for setting in settings for word in ("--set", setting)]


@pytest.fixture(scope="module")
def settings(tiny_model: Path) -> list[str]:
    # Of eleven lists, batches of 5 leave an odd one to one process, and at the end of an epoch none to the other.
    return [
        *WHOLE,
        "data.questions=11",
        f"retriever.model={tiny_model}",
        f"reranker.model={tiny_model}",
        "retriever.towers=untied",
        "reranker.lora_rank=2",
        "reranker.head_dropout=0",
        "warm_retriever.epochs=2",
        "warm_retriever.batch_lists=5",
        "joint.batch_lists=5",
        "refresh_steps=null",
        "rounds=1",
        "warm_retriever.precision=fp32",
        "warm_reranker.precision=fp32",
        "joint.precision=fp32",
    ]


@pytest.fixture(scope="module")
def alone(tiny_dataset: Path, settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tandemqa import load_recipe, train

    out = tmp_path_factory.mktemp("alone") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backbone, "has_bfloat16", lambda device: False)
        train(tiny_dataset, out, load_recipe("quick", settings))
    return out


def test_two_processes_train_what_one_does(
    alone: Path, tiny_dataset: Path, settings: list[str], tmp_path: Path
) -> None:
    command = torchrun(2, tiny_dataset, tmp_path, settings, IN_FLOAT32)
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("The bundle is") == 1
    uneven = set()
    for stage in ("warm_retriever", "warm_reranker", "lists"):
        drawn = [TrainingLists.load(out / "stages" / stage / "lists.npz") for out in (alone, tmp_path)]
        assert (drawn[0].passages[:, 1:] != NO_PASSAGE).all(axis=1).any(), "hard negatives are there"
        uneven.add(len(drawn[0]) % 5)
        assert np.array_equal(drawn[0].query_rows, drawn[1].query_rows)
        assert np.array_equal(drawn[0].passages, drawn[1].passages)
    for stage in ("warm_retriever", "warm_reranker", "joint"):
        one, two = ((out / "stages" / stage / "log.jsonl").read_text().splitlines() for out in (alone, tmp_path))
        assert len(one) == len(two) > 0
        for steps in zip(one, two, strict=True):
            losses = [json.loads(step)["loss"] for step in steps]
            assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert uneven == {1}, "a last batch holds one list: none for the second process"
    measured = [(out / "stages" / "joint" / "validation.jsonl").read_text().splitlines() for out in (alone, tmp_path)]
    for lines in zip(*measured, strict=True):
        one, two = (json.loads(line) | {"seconds": 0} for line in lines)
        assert one == pytest.approx(two, abs=1e-6)
    for model in ("retriever", "reranker"):
        paths = sorted(path.relative_to(alone) for path in (alone / "bundle" / model).rglob("*.safetensors"))
        assert paths
        for path in paths:
            expected, found = load_file(alone / path), load_file(tmp_path / path)
            for name in (name for name in expected if not name.endswith(UNSEEN[model])):
                torch.testing.assert_close(found[name], expected[name], rtol=0, atol=TOLERANCE, msg=name)


def test_a_process_that_dies_ends_the_job_and_it_can_be_resumed(
    alone: Path, tiny_dataset: Path, settings: list[str], tmp_path: Path
) -> None:
    longer = [*settings, "joint.epochs=24", "joint.validate_steps=30", "joint.patience=99"]
    log = tmp_path / "stages" / "joint" / "log.jsonl"
    job = subprocess.Popen(
        torchrun(2, tiny_dataset, tmp_path, longer), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while job.poll() is None and not (log.exists() and len(log.read_text().splitlines()) > 5):
        time.sleep(0.05)
    children = [int(line) for line in Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()]
    (second,) = (pid for pid in children if b"RANK=1" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))
    os.kill(second, signal.SIGKILL)
    _, messages = job.communicate(timeout=60)
    assert job.returncode != 0
    assert "Error: Another process of this training has stopped" in messages
    assert messages.count("Traceback") == 1  # torchrun's own report
    assert not (tmp_path / "bundle").exists()
    resumed = subprocess.run(torchrun(2, tiny_dataset, tmp_path, longer), capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stderr
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == list(range(72))
