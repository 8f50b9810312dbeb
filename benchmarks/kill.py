"""A training run killed with SIGKILL at random moments, again and again, against one that was left alone.

    python benchmarks/kill.py [--kills 24] [--seed 0] [--dropout 0.1]

The whole chain (both warm-ups, mining, scores, hybrid lists, pseudo-labels, a refresh, two rounds, evaluation) on the
demo's passages, with an encoder of two narrow layers and random weights so that a run takes a minute. A run is killed
until it has come to its end between two kills; then the next begins in a new folder. Checkpoints are written every
second instead of every minute, so that kills find them half written. Each finished run must equal the undisturbed
one in every byte of its weights, its lists, its run files and its metrics. Without dropout, the parts of a step are
shared out to threads; with it, one thread draws all of it.
"""

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer, BertConfig, BertModel

from tandemqa.demo.dataset import write_datasets
from tandemqa.encoders.backbone import BASE_MODEL, resolve_model
from tandemqa.files import read_json

RECIPE = """
data: {questions: 250, unlabelled: 60}
retriever: {passage_length: 48, dropout: DROPOUT}
reranker: {pooling: mean, pair_length: 64, dropout: DROPOUT}
warm_retriever: {epochs: 2, batch_lists: 16, micro_tokens: 1024}
mine: {depth: 20, source: fused}
warm_lists: {size: 4, depth: 20}
warm_reranker: {epochs: 1, batch_lists: 4, micro_tokens: 1024}
lists: {size: 6, depth: 20, denoised_share: 0.5, thresholds: quantile, low: 0.4, high: 0.9}
joint: {epochs: 1, batch_lists: 4, micro_tokens: 1024}
refresh_steps: 30
rounds: 2
evaluation: {depth: 5}
"""
TRAIN = """
import sys
from tandemqa.recipe.train import train
from tandemqa.training import loop
loop.CHECKPOINT_SECONDS = 1
train(*sys.argv[1:])
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--dropout", type=float, default=0.1, help="in the encoders")
    options = parser.parse_args()
    generator = np.random.default_rng(options.seed)
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        data, _ = write_datasets(work / "data")
        recipe = write_recipe(work, options.dropout)
        started = time.monotonic()
        if finish(data, work / "alone", recipe, None) is not None:
            raise SystemExit("The undisturbed run failed; see its messages above.")
        seconds = time.monotonic() - started
        expected = digests(work / "alone")
        print(f"undisturbed run: {seconds:.0f} s, {len(expected)} files to compare", flush=True)
        found: Counter[str] = Counter()
        runs = 0
        while found.total() < options.kills:
            runs += 1
            out = work / f"killed-{runs}"
            while (stage := finish(data, out, recipe, generator.uniform(1, seconds / 4))) is not None:
                found[stage] += 1
            differing = [name for name, digest in expected.items() if digests(out).get(name) != digest]
            if differing:
                raise SystemExit(f"After {found.total()} kills these differ: {', '.join(differing)}.")
            print(f"run {runs}: the same bundle after {found.total()} kills in all", flush=True)
        print(f"{found.total()} kills, {runs} runs, none differs; the kills fell into {dict(found)}")


def write_recipe(work: Path, dropout: float) -> Path:
    """An encoder with the base model's vocabulary and random weights, and the recipe that uses it."""
    tokenizer = AutoTokenizer.from_pretrained(resolve_model(BASE_MODEL))
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=len(tokenizer), initializer_range=0.2, **shape)).save_pretrained(work / "model")
    tokenizer.save_pretrained(work / "model")
    recipe = work / "recipe.yaml"
    models = RECIPE.replace("DROPOUT", str(dropout)).replace(
        "retriever: {p", f"retriever: {{model: {work / 'model'}, p"
    )
    recipe.write_text(models.replace("reranker: {p", f"reranker: {{model: {work / 'model'}, p"))
    return recipe


def finish(data: Path, out: Path, recipe: Path, after: float | None) -> str | None:
    """Train until the end (None) or until killed, `after` seconds from now: the stage that was under way."""
    with (out.parent / f"{out.name}.log").open("ab") as log:
        child = subprocess.Popen(
            [sys.executable, "-c", TRAIN, str(data), str(out), str(recipe)], stderr=log, start_new_session=True
        )
        try:
            code = child.wait(after)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            return under_way(out)
    if code:
        raise SystemExit((out.parent / f"{out.name}.log").read_text()[-2000:])
    return None


def under_way(out: Path) -> str:
    if not (out / "run.json").exists():
        return "start"
    for stage in read_json(out / "run.json")["stages"]:
        about = out / "stages" / stage / "stage.json"
        if not (about.exists() and read_json(about).get("complete")):
            return str(stage)
    return "bundle"


def digests(out: Path) -> dict[str, str]:
    """What must not differ, by name: weights, lists, runs and scores as they are; logs without their times."""
    found = {}
    for path in sorted(out.rglob("*")):
        name = str(path.relative_to(out))
        if path.suffix in (".safetensors", ".npy", ".trec"):
            content = path.read_bytes()
        elif path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                content = b"".join(arrays[key].tobytes() for key in sorted(arrays))
        elif path.name == "log.jsonl":
            steps = [json.loads(line) | {"seconds": 0} for line in path.read_text().splitlines()]
            content = json.dumps(steps).encode()
        elif path.name == "evaluation.json":
            about = read_json(path)
            content = json.dumps([about["blend"], about["metrics"] | {"seconds": None}], sort_keys=True).encode()
        elif path.name == "lists.json":
            content = path.read_bytes()
        else:
            continue
        found[name] = hashlib.sha256(content).hexdigest()
    return found


if __name__ == "__main__":
    main()
