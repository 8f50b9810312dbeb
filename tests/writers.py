"""Processes that change or build an index until they are killed.

They are forks of a server that has imported what they need and computed nothing: a fork of the tests' own process
would hang as soon as that had computed on several threads.
"""

import json
import multiprocessing
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np

from tandemqa.data.dataset import load_dataset
from tandemqa.encoders import backbone
from tandemqa.encoders.bundle import Bundle
from tandemqa.index import segment
from tandemqa.index.index import Index
from tandemqa.index.update import add_passages, delete_passages

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["writers", "transformers.models.bert.modeling_bert", "tandemqa.training.joint"])


def start_writer(index: Path, bundle: Path, log: Path, seed: int) -> BaseProcess:
    """Change an index at random; a line in `log` precedes each change, and one follows when it is committed."""
    return _start(_write, index, bundle, log, seed)


def start_builder(bundle: Path, dataset: Path, out: Path) -> BaseProcess:
    """Build an index in small parts, so that there is much to be interrupted."""
    return _start(_build, bundle, dataset, out)


def _start(target: Callable[..., None], *arguments: object) -> BaseProcess:
    process = SERVER.Process(target=target, args=arguments)
    process.start()
    return process


def _load(bundle: Path) -> Bundle:
    # In bfloat16 a vector moves with the batch that it is in.
    backbone.has_bfloat16 = lambda device: False
    return Bundle.load(bundle)


def _write(index: Path, bundle_folder: Path, log: Path, seed: int) -> None:
    bundle = _load(bundle_folder)
    random = np.random.default_rng(seed)
    with log.open("a", buffering=1) as lines:
        for step in range(1_000_000):
            ids = [f"k{number}" for number in random.choice(30, size=3, replace=False)]
            text = f"version {seed}-{step}"
            choice = random.random()
            if choice < 0.6:
                lines.write(json.dumps(["begin", ids, text]) + "\n")
                add_passages(index, [{"_id": name, "text": text} for name in ids], bundle)
            elif choice < 0.85:
                lines.write(json.dumps(["begin", ids, None]) + "\n")
                delete_passages(index, ids)
            else:
                lines.write(json.dumps(["begin", [], None]) + "\n")
                Index.open(index).compact().close()
            lines.write(json.dumps(["end"]) + "\n")


def _build(bundle: Path, dataset: Path, out: Path) -> None:
    segment.SHARD, segment.PART = 4, 10
    Index.build(_load(bundle), load_dataset(dataset), out)
