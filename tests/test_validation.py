"""Measurements in the midst of training: the best state is kept, and a kill changes nothing."""

import copy
import json
import shutil
import signal

import numpy as np
import one_pass
import pytest
import torch
from conftest import counted_steps, whole
from sentence_transformers import CrossEncoder as TheirReranker
from sentence_transformers import SentenceTransformer

from tandemqa.data.dataset import load_dataset
from tandemqa.data.runs import Run
from tandemqa.encoders.bundle import Bundle
from tandemqa.errors import TandemError
from tandemqa.files import read_json
from tandemqa.recipe.config import load_recipe
from tandemqa.recipe.sample import HARD, RERANKED, Sample, draw_sample, measure_on, sampled_questions
from tandemqa.recipe.train import train
from tandemqa.training import loop
from tandemqa.training.batch import make_batch
from tandemqa.training.config import TrainingConfig
from tandemqa.training.joint import JointModel, LossConfig, joint_loss, loss_terms
from tandemqa.training.listwise import Listwise
from tandemqa.training.loop import fit
from tandemqa.training.validation import BestState, Validation

pytestmark = pytest.mark.usefixtures("float32")

ALL_TERMS = LossConfig(kl_weight=1.0, reranker_weight=0.7, retriever_weight=0.3)
CONFIG = TrainingConfig(epochs=4, batch_lists=4, retriever_rate=1e-3, reranker_rate=1e-3)  # 12 steps


def run(models, texts, lists, folder, figures, every=2, patience=100, config=CONFIG):
    objective = Listwise(*models, texts, texts, lists, ALL_TERMS, config.micro_tokens)
    fit(objective, config, 9, folder, "joint", validation=Validation(every, patience, figures, "score"))


def script(values):
    """Measurements whose values are given."""
    left = iter(values)
    return lambda: {"score": next(left)}


def measured(folder):
    return [json.loads(line) for line in (folder / "validation.jsonl").read_text().splitlines()]


class Killed(BaseException):
    """Stands for a signal that ends the process."""


def steps(folder):
    return [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()]


def weights(models):
    return {name: value.clone() for name, value in JointModel(*models).state_dict().items()}


def assert_same(first, second):
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_the_best_state_is_restored_and_training_stops_after_patience(models, texts, lists, tmp_path):
    states = []

    def figures():
        states.append(weights(models))
        return {"score": [0.1, 0.3, 0.5, 0.5, 0.4, 0.9][len(states) - 1]}

    run(models, texts, lists, tmp_path, figures, patience=2)
    assert [(line["step"], line["score"]) for line in measured(tmp_path)] == [
        (0, 0.1), (2, 0.3), (4, 0.5), (6, 0.5), (8, 0.4),
    ]  # fmt: skip
    assert steps(tmp_path) == list(range(8))
    assert_same(weights(models), states[2])
    assert not torch.equal(states[2]["reranker.head.weight"], states[4]["reranker.head.weight"])
    assert not JointModel(*models).retriever.training


def test_measuring_changes_nothing_but_which_state_is_kept(models, texts, lists, tmp_path):
    straight = copy.deepcopy(models)
    for pair in (straight, models):
        pair[1].dropout.p = 0.3
    objective = Listwise(*straight, texts, texts, lists, ALL_TERMS, CONFIG.micro_tokens)
    fit(objective, CONFIG, 9, tmp_path / "a", "joint")

    def figures():
        models[0].encode(texts.queries, "query")  # leaves the model in evaluation mode
        models[1].eval()
        return {"score": float(len(measured(tmp_path / "b")))}

    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "validation.jsonl").touch()
    run(models, texts, lists, tmp_path / "b", figures, every=5)
    assert [line["step"] for line in measured(tmp_path / "b")] == [0, 5, 10, 12]
    assert_same(weights(straight), weights(models))


def test_a_pair_that_training_only_harms_stays_as_it_was(models, texts, lists, tmp_path):
    before = weights(models)
    run(models, texts, lists, tmp_path, script([0.9, 0.1, 0.2, 0.3]), patience=3)
    assert_same(before, weights(models))


def losses(pair, texts, lists):
    """A measurement that depends on the weights alone."""

    def figures():
        sides = ((pair[0], texts), (pair[1], texts))
        batch = make_batch(lists, np.arange(5), *sides)
        with torch.no_grad():
            scores = one_pass.scores(JointModel(*pair).eval(), batch)
            loss = joint_loss(loss_terms(*scores, batch.mask, ALL_TERMS), ALL_TERMS).mean()
        # Rises and falls along the training, so that the best is in its midst.
        return {"score": -abs(float(loss) - 1.45)}

    return figures


@pytest.mark.parametrize("seconds", [0, 1e9], ids=["a checkpoint each step", "checkpoints at measurements only"])
@pytest.mark.parametrize("killed", [[("step", 1)], [("step", 5), ("step", 2)], [("figures", 3)], [("save", 2)]])
def test_resuming_gives_the_best_state_of_the_uninterrupted_run(
    killed, seconds, models, texts, lists, tmp_path, monkeypatch
):
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", seconds)
    straight = copy.deepcopy(models)
    run(straight, texts, lists, tmp_path / "a", losses(straight, texts, lists), patience=2)
    scores = [line["score"] for line in measured(tmp_path / "a")]
    assert 0 < scores.index(max(scores)) < len(scores) - 1 and len(steps(tmp_path / "a")) < 12, scores
    for what, count in killed:
        again = copy.deepcopy(models)
        figures, calls = losses(again, texts, lists), []
        step, save = loop._step, loop.Checkpoints.save

        def dying(name, whole, what=what, count=count, calls=calls):
            def call(*arguments):
                calls.append(1) if what == name else None
                if what == name and len(calls) > count:
                    raise Killed
                return whole(*arguments)

            return call

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(loop, "_step", dying("step", step))
            patch.setattr(loop.Checkpoints, "save", dying("save", save))
            run(again, texts, lists, tmp_path / "b", dying("figures", figures), patience=2)
    again = copy.deepcopy(models)
    saved = max((int(path.stem[-8:]) for path in (tmp_path / "b").glob("checkpoint-*")), default=0)
    done = counted_steps(monkeypatch)
    run(again, texts, lists, tmp_path / "b", losses(again, texts, lists), patience=2)
    assert done == list(range(saved, len(steps(tmp_path / "a")))), "what was saved is not made again"
    assert_same(weights(straight), weights(again))
    assert [line["score"] for line in measured(tmp_path / "a")] == [
        line["score"] for line in measured(tmp_path / "b")
    ]
    assert steps(tmp_path / "a") == steps(tmp_path / "b")


@pytest.mark.parametrize("damaged", [1, 2])
def test_the_best_state_outlasts_a_damaged_checkpoint(damaged, models, texts, lists, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 1e9)
    straight, again = copy.deepcopy(models), copy.deepcopy(models)
    values = [0.1, 0.2, 0.3, 0.1, 0.4, 0.3, 0.2]
    run(straight, texts, lists, tmp_path, script(values))
    for path in sorted(tmp_path.glob("checkpoint-*"))[-damaged:]:
        path.write_bytes(path.read_bytes()[:1000])
    # Of the checkpoints, 12 and 10, one or both are gone: measured again are 12, or all but the start.
    run(again, texts, lists, tmp_path, script(values[-1:] if damaged == 1 else values[1:]))
    assert_same(weights(straight), weights(again))


def test_the_best_state_of_the_last_checkpoint_but_one_outlasts_a_kill_before_the_next(
    models, texts, lists, tmp_path, monkeypatch
):
    """The checkpoint that the run falls back to has a best state that two others, newer ones, have outdone."""
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 1e9)
    straight, again = copy.deepcopy(models), copy.deepcopy(models)
    values = [0.1, 0.2, 0.3, 0.4, 0, 0, 0]
    run(straight, texts, lists, tmp_path / "a", script([0.1, 0.2, *[0] * 5]))
    save = loop.Checkpoints.save

    def dying(self, step):
        if step == 6:
            raise Killed
        save(self, step)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(loop.Checkpoints, "save", dying)
        run(models, texts, lists, tmp_path / "b", script(values))
    assert [path.stem[-1] for path in sorted((tmp_path / "b").glob("checkpoint-*"))] == ["2", "4"]
    last = tmp_path / "b" / "checkpoint-00000004.safetensors"
    last.write_bytes(last.read_bytes()[:1000])
    run(again, texts, lists, tmp_path / "b", script([0] * 5))
    assert_same(weights(straight), weights(again))


@pytest.mark.parametrize(("number", "made"), [(0, 0), (1, 2), (6, 12)], ids=["first", "midst", "last"])
def test_a_signal_in_a_measurement_ends_the_training_behind_it(
    number, made, models, texts, lists, tmp_path, monkeypatch
):
    values = [0.1, 0.2, 0.3, 0.1, 0.4, 0.3, 0.2]
    straight, again = copy.deepcopy(models), copy.deepcopy(models)
    run(straight, texts, lists, tmp_path / "a", script(values))
    left = iter(enumerate(values[: number + 1]))

    def figures():
        place, value = next(left)
        if place == number:
            signal.raise_signal(signal.SIGTERM)
        return {"score": value}

    with pytest.raises(KeyboardInterrupt, match=f"{made} of 12 steps of joint are made and saved"):
        run(models, texts, lists, tmp_path / "b", figures)
    assert len(measured(tmp_path / "b")) == number + 1
    done = counted_steps(monkeypatch)
    run(again, texts, lists, tmp_path / "b", script(values[number + 1 :]))
    assert len(done) == 12 - made
    assert_same(weights(straight), weights(again))


def test_a_signal_behind_the_last_step_is_not_lost(models, texts, lists, tmp_path, monkeypatch):
    monkeypatch.setattr(BestState, "restore", lambda self: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(KeyboardInterrupt):
        run(models, texts, lists, tmp_path, script([0.1] * 7))


def test_a_damaged_best_state_is_named(models, texts, lists, tmp_path):
    run(models, texts, lists, tmp_path, script([0.9, 0, 0, 0, 0, 0, 0]))
    (path,) = tmp_path.glob("best-*")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(TandemError, match=r"best-00000000\.safetensors is damaged; remove the folder"):
        run(models, texts, lists, tmp_path, script([]))


def test_a_sample_holds_positives_and_hard_candidates_and_is_drawn_from_the_seed(tiny_dataset):
    dataset = load_dataset(tiny_dataset)
    query_ids = sampled_questions(dataset, 4, 3)
    assert len(query_ids) == 4 and set(query_ids) < set(dataset.qrels["dev"])
    hard = Run(query_ids, np.arange(4 * 12, dtype=np.int32).reshape(4, 12) % 8, np.zeros((4, 12), dtype=np.float32))
    hard.rows[0, 5:] = -1
    positives = {dataset.passages.row[p] for q in query_ids for p in dataset.qrels["dev"][q]}
    sample = draw_sample(dataset, [hard], 20, 3)
    assert len(sample.rows) == len(set(sample.rows)) == 20
    assert positives | set(hard.rows[:, :HARD].flatten()) - {-1} <= set(sample.rows)
    assert np.array_equal(sample.rows, draw_sample(dataset, [hard], 20, 3).rows)
    assert not np.array_equal(sample.rows, draw_sample(dataset, [hard], 20, 4).rows)
    assert set(draw_sample(dataset, [hard], 1, 3).rows) == positives | set(hard.rows[:, :HARD].flatten()) - {-1}
    assert len(draw_sample(dataset, [hard], 1000, 3).rows) == 40


def test_the_figures_are_those_of_sentence_transformers_on_the_same_passages(tiny_bundle, tiny_dataset):
    bundle, dataset = Bundle.load(tiny_bundle), load_dataset(tiny_dataset)
    query_ids = sampled_questions(dataset, 100, 0)
    positives = {q: {dataset.passages.row[p] for p in dataset.qrels["dev"][q]} for q in query_ids}
    others = [row for row in range(40) if not any(row in rows for rows in positives.values())]
    sample = Sample(query_ids, np.array([row for row in range(40) if row not in others[:4]]))
    questions = [dataset.queries[q] for q in query_ids]
    passages = [dataset.passages[row].full for row in sample.rows.tolist()]
    retriever = SentenceTransformer(str(tiny_bundle / "retriever"))
    reranker = TheirReranker(str(tiny_bundle / "reranker"))
    similarities = retriever.encode(questions) @ retriever.encode(passages).T
    expected = {"retriever_mrr@10": [], "reranked_mrr@10": []}
    for number, query_id in enumerate(query_ids):
        found = np.argsort(-similarities[number])[:RERANKED]
        scores = reranker.predict([(questions[number], passages[row]) for row in found])
        for name, order in (("retriever_mrr@10", found), ("reranked_mrr@10", found[np.argsort(-scores)])):
            ranks = [rank for rank, row in enumerate(sample.rows[order[:10]], 1) if row in positives[query_id]]
            expected[name].append(1 / ranks[0] if ranks else 0.0)
    figures = measure_on(sample, dataset, bundle.retriever, bundle.reranker)
    for name, values in expected.items():
        assert 0 < np.mean(values) < 1
        assert figures[name] == pytest.approx(np.mean(values), abs=1e-9)


def test_a_chain_measures_when_it_is_due_and_leaves_no_states_behind(finished):
    joint = finished / "stages" / "joint"
    lines = measured(joint)
    assert [line["step"] for line in lines] == sorted({*range(0, len(steps(joint)) + 1, 3), len(steps(joint))})
    assert {"retriever_mrr@10", "reranked_mrr@10", "seconds"} < set(lines[0])
    assert not list(joint.glob("best-*")) and not list(joint.glob("checkpoint-*"))


def test_a_chain_that_gains_nothing_ends_with_the_pair_it_began_with(tiny_model, tiny_dataset, tmp_path, capsys):
    settings = ["rounds=1", "refresh_steps=null", "evaluation.split=null", "joint.epochs=5", "joint.retriever_rate=0"]
    settings += ["joint.reranker_rate=0", "joint.head_rate=0"]
    train(tiny_dataset, tmp_path, whole(tiny_model, *settings))
    assert [line["step"] for line in measured(tmp_path / "stages" / "joint")] == [0, 3, 6]
    assert "joint: stopped after 6 steps; the best state, kept, is that after 0 (reranked_mrr@10" in (
        capsys.readouterr().err
    )


def test_without_a_dev_split_measuring_is_refused_before_any_training(tiny_model, tiny_dataset, tmp_path):
    data = shutil.copytree(tiny_dataset, tmp_path / "data")
    (data / "qrels" / "dev.tsv").unlink()
    settings = ["evaluation.split=null", "joint.validate_steps=2", f"retriever.model={tiny_model}"]
    with pytest.raises(TandemError, match="no split 'dev'"):
        train(data, tmp_path / "run", load_recipe("quick", [*settings, f"reranker.model={tiny_model}"]))
    assert not (tmp_path / "run").exists()


def test_the_sample_of_a_stage_is_kept(finished):
    sample = Sample.load(finished / "stages" / "joint" / "sample.npz")
    assert len(sample.query_ids) == 6 and len(sample.rows) >= 30
    assert read_json(finished / "stages" / "joint" / "stage.json")["depends_on"]["joint"]["validate_steps"] == 3
