"""Several processes against one: the same lists, losses and weights, with torchrun and Gloo as a user starts them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import WHOLE
from safetensors.torch import load_file

from tandemqa import processes
from tandemqa.encoders import backbone
from tandemqa.errors import TandemError
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


PROGRAM = str(Path(__file__).with_name("in_float32.py"))


def torchrun(count: int, data: Path, out: Path, settings: list[str]) -> list[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    command += [PROGRAM, "train", str(data), "--out", str(out)]
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
        "warm_lists.per_query=1",
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
        train(tiny_dataset, out, load_recipe("default", settings))
    return out


@pytest.fixture(scope="module")
def together(tiny_dataset: Path, settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("together") / "run"
    ended = subprocess.run(torchrun(2, tiny_dataset, out, settings), capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("The bundle is") == 1
    return out


def test_two_processes_train_what_one_does(alone: Path, together: Path) -> None:
    uneven = set()
    for stage in ("warm_retriever", "warm_reranker", "lists"):
        drawn = [TrainingLists.load(out / "stages" / stage / "lists.npz") for out in (alone, together)]
        assert (drawn[0].passages[:, 1:] != NO_PASSAGE).all(axis=1).any(), "hard negatives are there"
        uneven.add(len(drawn[0]) % 5)
        assert np.array_equal(drawn[0].query_rows, drawn[1].query_rows)
        assert np.array_equal(drawn[0].passages, drawn[1].passages)
    for stage in ("warm_retriever", "warm_reranker", "joint"):
        one, two = ((out / "stages" / stage / "log.jsonl").read_text().splitlines() for out in (alone, together))
        assert len(one) == len(two) > 0
        for steps in zip(one, two, strict=True):
            expected, found = map(json.loads, steps)
            assert found["loss"] == pytest.approx(expected["loss"], abs=1e-4)
            norms = {name: value for name, value in expected.items() if name.endswith("_gradient_norm")}
            assert norms
            assert {name: found[name] for name in norms} == pytest.approx(norms, rel=1e-3, abs=1e-6)
    assert uneven == {1}, "a last batch holds one list: none for the second process"
    measured = [(out / "stages" / "joint" / "validation.jsonl").read_text().splitlines() for out in (alone, together)]
    for lines in zip(*measured, strict=True):
        one, two = (json.loads(line) | {"seconds": 0} for line in lines)
        assert one == pytest.approx(two, abs=1e-6)
    for model in ("retriever", "reranker"):
        paths = sorted(path.relative_to(alone) for path in (alone / "bundle" / model).rglob("*.safetensors"))
        assert paths
        for path in paths:
            expected, found = load_file(alone / path), load_file(together / path)
            for name in (name for name in expected if not name.endswith(UNSEEN[model])):
                torch.testing.assert_close(found[name], expected[name], rtol=0, atol=TOLERANCE, msg=name)


@pytest.mark.parametrize(
    ("said", "kind", "told"),
    [
        (
            "[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4711",
            TandemError,
            "has stopped",
        ),
        ("Tensors must be contiguous", RuntimeError, "contiguous"),
    ],
)
def test_only_a_lost_process_is_called_so(said, kind, told, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(tensor: torch.Tensor, async_op: bool) -> None:
        raise RuntimeError(said)

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(processes, "join", lambda: None)
    monkeypatch.setattr(torch.distributed, "all_reduce", fail)
    with pytest.raises((RuntimeError, TandemError), match=told) as raised:
        processes.add_up([torch.zeros(1)])
    assert raised.type is kind


def test_a_process_that_dies_ends_the_job_and_it_can_be_resumed(
    together: Path, tiny_dataset: Path, settings: list[str], tmp_path: Path
) -> None:
    noted = tmp_path / "steps"
    command = torchrun(2, tiny_dataset, tmp_path, settings)
    watched = os.environ | {"JOINT_STEPS": str(noted)}
    killed = subprocess.run(command, capture_output=True, text=True, env=watched | {"KILLED_AT": "1 2"})
    assert killed.returncode != 0
    assert "Error: Another process of this training has stopped" in killed.stderr
    assert killed.stderr.count("Traceback") == 1  # torchrun's own report
    assert not (tmp_path / "bundle").exists()
    noted.unlink()
    resumed = subprocess.run(command, capture_output=True, text=True, env=watched)
    assert resumed.returncode == 0, resumed.stderr
    assert sorted(noted.read_text().splitlines()) == ["0 2", "1 2"], (
        "the steps before the checkpoint are not made again"
    )
    logs = [(out / "stages" / "joint" / "log.jsonl").read_text().splitlines() for out in (together, tmp_path)]
    assert [[json.loads(line)["step"] for line in log] for log in logs] == [[0, 1, 2]] * 2
    for path in together.glob("bundle/**/*.safetensors"):
        expected, found = load_file(path), load_file(tmp_path / path.relative_to(together))
        assert all(torch.equal(found[name], value) for name, value in expected.items()), path
