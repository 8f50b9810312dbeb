"""What a training says of itself: the log, TensorBoard's copy of it, the progress line, and what is not finite."""

import copy
import json
import re
import signal
import sys

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tandemqa.data.dataset import load_dataset
from tandemqa.encoders.bundle import save_bundle
from tandemqa.encoders.cross import CrossEncoder, RerankerConfig
from tandemqa.encoders.dual import DualEncoder, RetrieverConfig
from tandemqa.errors import TandemError
from tandemqa.lists.build import TrainingLists
from tandemqa.progress import bar
from tandemqa.recipe.config import load_recipe
from tandemqa.recipe.train import train
from tandemqa.training import loop
from tandemqa.training.config import TrainingConfig
from tandemqa.training.joint import LossConfig
from tandemqa.training.listwise import Listwise
from tandemqa.training.loop import NotFiniteError, fit
from tandemqa.training.validation import Validation

CONFIG = TrainingConfig(epochs=3, batch_lists=4, tensorboard=True)  # 9 steps


def run(models, texts, lists, folder, config=CONFIG, validation=None):
    objective = Listwise(*models, texts, texts, lists, LossConfig(), config.micro_tokens)
    fit(objective, config, 9, folder, "joint", validation=validation)


def shown(folder):
    """TensorBoard's points, as (step, value) by their name."""
    board = EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    return {name: [(e.step, e.value) for e in board.Scalars(name)] for name in board.Tags()["scalars"]}


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("killed", [None, 5, 6])
def test_tensorboard_shows_the_numbers_of_the_log_each_once(killed, models, texts, lists, tmp_path, monkeypatch):
    # Measured after 0, 3, 6 and 9 steps; the checkpoint before a kill at 5 is that of 3 steps, at 6 that of 6.
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 1e9)
    validation = Validation(3, 9, lambda: {"mrr": float(np.random.rand())}, "mrr")
    if killed is not None:
        original, made = loop._step, []

        def step(*arguments):
            if len(made) == killed:
                raise RuntimeError("killed")
            made.append(1)
            return original(*arguments)

        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
            patch.setattr(loop, "_step", step)
            run(copy.deepcopy(models), texts, lists, tmp_path, validation=validation)
    run(models, texts, lists, tmp_path, validation=validation)
    points = shown(tmp_path)
    lines = records(tmp_path / "log.jsonl")
    measured = records(tmp_path / "validation.jsonl")
    assert len(lines) == 9 and len(measured) == 4
    expected = {name: [(line["step"], line[name]) for line in lines] for name in lines[0].keys() - {"step"}}
    expected |= {f"validation/{n}": [(line["step"], line[n]) for line in measured] for n in ("mrr", "seconds")}
    assert points.keys() == expected.keys() and "loss" in points
    for name, values in expected.items():
        assert [step for step, _ in points[name]] == [step for step, _ in values], name
        np.testing.assert_allclose([v for _, v in points[name]], [v for _, v in values], rtol=1e-6)


def test_without_the_option_nothing_is_written_for_tensorboard(models, texts, lists, tmp_path):
    run(models, texts, lists, tmp_path, TrainingConfig())
    assert not (tmp_path / "tensorboard").exists()


def test_without_tensorboard_it_is_said_before_any_training(tiny_model, tiny_dataset, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    settings = [f"retriever.model={tiny_model}", f"reranker.model={tiny_model}", "joint.tensorboard=true"]
    with pytest.raises(TandemError, match=r"needs the package tensorboard, .*'tandemqa\[tensorboard\]'"):
        train(tiny_dataset, tmp_path / "run", load_recipe("quick", settings))
    assert not (tmp_path / "run").exists()


def test_the_progress_line_shows_loss_speed_and_time_left(models, texts, lists, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("tqdm.std.time", iter(np.arange(0, 1e6, 0.7)).__next__)
    run(models, texts, lists, tmp_path, TrainingConfig(epochs=3, batch_lists=2))
    lines = re.split(r"[\r\n]+", capsys.readouterr().err)
    form = r"joint: +\d+%\|.*\| \d+/30 \[\d\d:\d\d<\d\d:\d\d, +[\d.]+ list/s, loss \d+\.\d{3}, [\d,]+ tokens/s\]"
    assert any(re.fullmatch(form, line.strip()) for line in lines), lines


def test_lists_read_before_an_interruption_do_not_count_for_the_speed(models, texts, lists, tmp_path, monkeypatch):
    bars = []
    monkeypatch.setattr(loop, "bar", lambda *arguments: bars.append(bar(*arguments)) or bars[-1])
    config, original = TrainingConfig(epochs=3, batch_lists=2), loop._step

    def step(*arguments):
        if arguments[-1] == 7:
            signal.raise_signal(signal.SIGINT)
        return original(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "_step", step)
        run(copy.deepcopy(models), texts, lists, tmp_path, config)
    run(models, texts, lists, tmp_path, config)
    assert [(one.format_dict["initial"], one.n) for one in bars] == [(0, 16), (16, 30)]


def test_a_loss_that_is_not_finite_is_named_by_question_and_passages(tiny_dataset, tiny_model, tmp_path):
    base = tmp_path / "base"
    retriever = DualEncoder.load(RetrieverConfig(model=str(tiny_model)))
    reranker = CrossEncoder.load(RerankerConfig(model=str(tiny_model), pooling="mean"))
    with torch.no_grad():
        reranker.head.weight.fill_(float("nan"))
    save_bundle(base, retriever, reranker, {})
    settings = ["data.questions=12", "lists.size=4", "lists.depth=20", "joint.batch_lists=1"]
    settings += [
        "warm_reranker.epochs=0",
        f"retriever.model={tiny_model}",
        f"reranker.model={base / 'reranker'}",
        "evaluation.split=null",
    ]
    with pytest.raises(TandemError) as told:
        train(tiny_dataset, tmp_path / "run", load_recipe("quick", settings))
    lists = TrainingLists.load(tmp_path / "run" / "stages" / "lists" / "lists.npz")
    with np.load(tmp_path / "run" / "stages" / "mine" / "candidates.npz") as arrays:
        query_ids = arrays["query_ids"].tolist()
    (number,) = next(loop._steps(len(lists), 1, 1, seed=14))
    dataset = load_dataset(tiny_dataset)
    passages = ", ".join(repr(dataset.passages.ids[row]) for row in lists.passages[number])
    question = query_ids[lists.query_rows[number]]
    assert str(told.value).startswith(f"The loss of question {question!r} with its passages {passages} is not finite")
    assert question in dataset.qrels["train"]


def test_a_gradient_that_is_not_finite_names_the_questions_and_leaves_the_weights(models, texts, lists, tmp_path):
    before = models[1].head.weight.clone()
    hook = models[1].head.weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(NotFiniteError, match=r"gradient of question (row \d+, ){3}row \d+ is not finite at step 0"):
        run(models, texts, lists, tmp_path, TrainingConfig(batch_lists=4))
    hook.remove()
    assert torch.equal(before, models[1].head.weight)
