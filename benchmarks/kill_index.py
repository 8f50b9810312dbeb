"""A writer of an index killed with SIGKILL at random moments, again and again; nothing committed may be lost.

    python benchmarks/kill_index.py [--kills 120] [--seed 0]

Models of two narrow layers with random weights, so that a change takes a tenth of a second. Three suites:

- builds: `Index.build` of 600 passages in shards of 64, killed until it has come to its end between two kills; the
  index must then equal one of a build left alone, vector for vector, token for token and in the rankings of BM25.
- builds in int8: the same with a bundle that is still to be calibrated, and that again after every other kill; it
  must load after each.
- changes: a process adds, replaces, deletes and compacts at random and writes down what it has committed; after each
  kill the index must open, and hold just what the committed changes make of it, with the one change under way or
  without it: ids, texts, tokens, vectors (each passage found by its own) and conditions on metadata. Segments are
  joined from 9 on, and every other kill waits for an addition that does so.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoTokenizer, BertConfig, BertModel

from tandemqa.encoders.backbone import BASE_MODEL, Precision, resolve_model
from tandemqa.encoders.bundle import Bundle, save_bundle
from tandemqa.encoders.calibration import RANGES
from tandemqa.encoders.cross import CrossEncoder, RerankerConfig
from tandemqa.encoders.dual import DualEncoder, RetrieverConfig
from tandemqa.encoders.quantised import has_int8
from tandemqa.index import segment, update
from tandemqa.index.index import Index
from tandemqa.index.update import add_passages, compact, delete_passages

WORDS = [f"word{number}" for number in range(500)]
FORK = multiprocessing.get_context("fork")
State = dict[str, tuple[str, int]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=120, help="in all; a quarter falls on each kind of build")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    options = parser.parse_args()
    generator = np.random.default_rng(options.seed)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    for one_thread in (torch.set_num_threads, faiss.omp_set_num_threads):
        one_thread(1)  # a process that is forked has none of the others
    segment.SHARD, segment.PART, update.MOST_SEGMENTS = 64, 100, 9
    # tqdm's own lock is one between processes, and stays locked if a writer is killed while it draws a bar.
    tqdm.set_lock(threading.RLock())
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        os.environ["TANDEMQA_CACHE"] = str(work / "cache")
        bundle, data = write_bundle(work), write_corpus(work / "data", 600)
        precisions: list[Precision] = ["auto", "int8"] if has_int8() else ["auto"]
        builds = sum(kill_builds(bundle, data, work, p, options.kills // 4, generator) for p in precisions)
        changes = kill_changes(bundle, work, options.kills - builds, generator)
    print(f"{builds + changes} kills, nothing lost, no index half written")


def kill_builds(
    bundle: Bundle, data: Path, work: Path, precision: Precision, kills: int, generator: np.random.Generator
) -> int:
    """Build until `kills` kills have fallen on builds: how many it became."""

    def build(name: str) -> Index:
        return Index.build(work / f"{name}-bundle", data, work / name, precision=precision)

    def fresh(name: str) -> str:
        """A name for an index whose bundle has not been calibrated."""
        shutil.copytree(bundle.folder, work / f"{name}-bundle")
        return name

    started = time.monotonic()
    alone = build(fresh(f"alone-{precision}"))
    seconds = time.monotonic() - started
    found: Counter[str] = Counter()
    builds = 0
    while found.total() < kills:
        builds += 1
        name = fresh(f"killed-{precision}-{builds}")
        while kill(
            lambda name=name: build(name), generator.uniform(0.05, seconds / 3) if found.total() < kills else None
        ):
            calibrated = Bundle.load(work / f"{name}-bundle").calibrated
            if (work / name).exists():  # renamed, and killed on the way out
                found["complete"] += 1
                break
            found[under_way(work / f".{name}.partial", calibrated or precision == "auto")] += 1
            if calibrated and found.total() % 2:
                (work / f"{name}-bundle" / RANGES).unlink()
        compare(Index.open(work / name), alone)
        print(f"{precision} build {builds}: the same index after {found.total()} kills in all", flush=True)
    print(f"{precision} builds: {found.total()} kills over {builds} of {seconds:.1f} s; when killed: {dict(found)}")
    return found.total()


def kill_changes(bundle: Bundle, work: Path, kills: int, generator: np.random.Generator) -> int:
    folder = work / "alone-auto"
    state: State = {
        passage.id: (passage.full, row) for row, passage in zip(*content(Index.open(folder)), strict=True)
    }
    found: Counter[str] = Counter()
    commits = 0
    for number in range(kills):
        log = work / f"{number}.log"
        log.touch()
        moment = generator.uniform(0, 0.15) if number % 2 else generator.uniform(0.1, 1.5)
        awaited = (lambda log=log: adds_by_joining(log)) if number % 2 else None
        if not kill(lambda n=number, log=log: change_for_ever(bundle, folder, log, n), moment, awaited):
            raise SystemExit("The writer ended by itself; see its messages above.")
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        commits += sum(line["what"] == "end" for line in lines)
        states, doing = replay(lines, state)
        found[doing] += 1
        index = Index.open(folder)
        rows, passages = content(index)
        held = {passage.id: passage.full for passage in passages}
        fitting = [one for one in states if {name: text for name, (text, _) in one.items()} == held]
        if not fitting:
            raise SystemExit(f"After kill {number + 1}, while it was at {doing}, the index holds something else.")
        state = fitting[0]
        check(index, rows, [passage.full for passage in passages], bundle)
        index.close()
    print(f"changes: {kills} kills, {commits} changes committed between them; when killed: {dict(found)}")
    return kills


def adds_by_joining(log: Path) -> bool:
    """Whether the last that a writer has begun is an addition, which joins segments first."""
    *_, change, last = ['{"what": ""}'] * 2 + log.read_text().splitlines()
    return json.loads(last)["what"] == "join" and json.loads(change)["what"] == "add"


def kill(target: Callable[[], Any], after: float | None, awaited: Callable[[], bool] | None = None) -> bool:
    """Run `target` in a process of its own and kill it `after` seconds from now, or from when something `awaited` has
    come; unless it has ended by then."""
    child = FORK.Process(target=target)
    child.start()
    while awaited and not awaited() and child.exitcode is None:
        time.sleep(0.005)
    child.join(after)
    if child.exitcode is None:
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        return True
    if child.exitcode:
        raise SystemExit("The process failed; see its messages above.")
    return False


def change_for_ever(bundle: Bundle, folder: Path, path: Path, seed: int) -> None:
    random = np.random.default_rng(seed)
    join = update._join
    with path.open("a", buffering=1) as log:

        def joined(*arguments: Any) -> None:
            log.write('{"what": "join"}\n')
            join(*arguments)
            log.write('{"what": "joined"}\n')

        update._join = joined
        for step in range(10**6):
            ids = [f"k{name}" for name in random.choice(60, size=5, replace=False)]
            what = str(random.choice(["add"] * 5 + ["delete", "compact"]))
            text = f"version {seed} {step} {' '.join(random.choice(WORDS, size=8))}"
            log.write(json.dumps({"what": what, "ids": ids, "text": text, "year": step}) + "\n")
            if what == "add":
                add_passages(folder, [{"_id": name, "text": text, "year": step} for name in ids], bundle)
            elif what == "delete":
                delete_passages(folder, ids)
            else:
                compact(folder)
            log.write('{"what": "end"}\n')


def replay(lines: list[dict[str, Any]], state: State) -> tuple[list[State], str]:
    """What the index may hold, and what was under way."""
    states, doing = [state], "nothing"
    for line in lines:
        if line["what"] in ("join", "joined"):
            doing = doing.split(",")[0] + (", joining segments" if line["what"] == "join" else "")
            continue
        doing = line["what"]
        if doing == "end":
            states, doing = states[-1:], "nothing"
            continue
        changed = dict(states[-1])
        for name in line["ids"] if doing != "compact" else []:
            changed.pop(name, None)
            if doing == "add":
                changed[name] = (line["text"], line["year"])
        states.append(changed)
    return states, doing


def content(index: Index) -> tuple[list[int], list[Any]]:
    rows = index.rows.tolist()
    return rows, index.passages.rows(rows)


def check(index: Index, rows: list[int], texts: list[str], bundle: Bundle) -> None:
    """Vectors, tokens and metadata of the passages that the last changes brought are those of their texts."""
    if len(index) != len(rows):
        raise SystemExit("The index counts other passages than it holds.")
    last = slice(-70, None)
    vectors = bundle.retriever.encode(bundle.retriever.tokenize(texts[last]), "passage", precision="fp32")
    kept = dict(zip(rows, index.passages.metadata(rows), strict=True))
    for row, text, vector in zip(rows[last], texts[last], vectors, strict=True):
        _, scores = index.search_vectors(vector[None], 1)
        if scores[0, 0] < 0.99:
            raise SystemExit(f"The vector of row {row} is not found.")
        if index.tokens[row].tolist() != bundle.reranker.tokenize([text])[0].tolist():
            raise SystemExit(f"The tokens of row {row} are those of another passage.")
        if "year" in kept[row]:
            found, _ = index.search_vectors(vector[None], len(rows), [f"year={kept[row]['year']}"])
            if row not in found[0]:
                raise SystemExit(f"Row {row} is not found by its year.")


def compare(index: Index, alone: Index) -> None:
    everything = np.arange(len(alone))
    same = (
        len(index) == len(alone)
        and index.passages.rows(everything.tolist()) == alone.passages.rows(everything.tolist())
        and all(np.array_equal(index.tokens[row], alone.tokens[row]) for row in everything.tolist())
        and np.array_equal(
            index.segments[0].vectors.vectors(everything), alone.segments[0].vectors.vectors(everything)
        )
    )
    queries = [f"{first} {second}" for first, second in zip(WORDS[:50], WORDS[50:100], strict=True)]
    same = same and all(map(np.array_equal, index.search_words(queries, 20), alone.search_words(queries, 20)))
    if not same:
        raise SystemExit(f"{index.folder} differs from the index of a build left alone.")


def under_way(partial: Path, calibrated: bool) -> str:
    if not calibrated:
        return "calibrating"
    if not list(partial.glob("segments/*/shards/*")):
        return "reading"
    if list(partial.glob("segments/*/tokens")):
        return "joining"
    return "words" if list(partial.glob("segments/*/bm25/*")) else "encoding"


def write_corpus(folder: Path, count: int) -> Path:
    folder.mkdir()
    random = np.random.default_rng(0)
    with (folder / "corpus.jsonl").open("w") as file:
        for number in range(count):
            text = " ".join(random.choice(WORDS, size=random.integers(5, 30)))
            file.write(json.dumps({"_id": f"p{number}", "title": f"number {number}", "text": text}) + "\n")
    return folder


def write_bundle(work: Path) -> Bundle:
    """Two encoders with the base model's vocabulary and random weights."""
    tokenizer = AutoTokenizer.from_pretrained(resolve_model(BASE_MODEL))
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=len(tokenizer), initializer_range=0.2, **shape)).save_pretrained(work / "model")
    tokenizer.save_pretrained(work / "model")
    name = str(work / "model")
    retriever, reranker = RetrieverConfig(model=name), RerankerConfig(model=name)
    save_bundle(work / "bundle", DualEncoder.load(retriever), CrossEncoder.load(reranker), {})
    return Bundle.load(work / "bundle")


if __name__ == "__main__":
    main()
