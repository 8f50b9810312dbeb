"""The whole way on a slice of real data: both models must beat their start."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from tandemqa import Index, Searcher, load_dataset, load_recipe, train
from tandemqa.data.tokens import passage_tokens
from tandemqa.encoders.cross import CrossEncoder
from tandemqa.evaluation.metrics import counted_queries, evaluate_run
from tandemqa.index.vectors import passage_index
from tandemqa.search.rank import rerank, retrieve

MEDQUAD = Path(__file__).parents[2] / "shared" / "data" / "medquad"
TRAIN, DEV, OTHERS = 160, 80, 600


@pytest.fixture(autouse=True)
def all_cores():
    """These models are large enough to gain from more than the one thread that the other tests take."""
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def slice_of_medquad(tmp_path_factory):
    if not MEDQUAD.exists():
        pytest.skip(f"needs the medquad dataset at {MEDQUAD}")
    dataset = load_dataset(MEDQUAD)
    generator = np.random.default_rng(1)
    folder = tmp_path_factory.mktemp("medquad")
    (folder / "qrels").mkdir()
    queries, rows = [], set(generator.choice(len(dataset.passages), size=OTHERS, replace=False).tolist())
    for split, count in (("train", TRAIN), ("dev", DEV)):
        lines = ["query-id\tcorpus-id\tscore"]
        qrels = dataset.qrels[split]
        for query_id in generator.choice(sorted(qrels), size=count, replace=False).tolist():
            queries.append({"_id": query_id, "text": dataset.queries[query_id]})
            for passage_id, grade in qrels[query_id].items():
                lines.append(f"{query_id}\t{passage_id}\t{grade}")
                rows.add(dataset.passages.row[passage_id])
        (folder / "qrels" / f"{split}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    passages = [dataset.passages[row] for row in sorted(rows)]
    corpus = [{"_id": p.id, "title": p.title, "text": p.text} for p in passages]
    for name, records in (("corpus", corpus), ("queries", queries)):
        text = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return folder


@pytest.mark.timeout(900)
def test_the_trained_pair_beats_its_start_and_answers(slice_of_medquad, tmp_path):
    recipe = load_recipe(
        "quick",
        [
            "retriever.passage_length=64",
            "reranker.pair_length=96",
            "warm_reranker.reranker_rate=0.0003",
            "warm_reranker.epochs=2",
            "warm_reranker.batch_lists=8",
            "lists.size=5",
            "joint.batch_lists=8",
            "evaluation.depth=20",
        ],
    )
    dataset = load_dataset(slice_of_medquad)
    bundle = train(dataset, tmp_path / "run", recipe)
    stages = {name: figures["mrr@10"]["mean"] for name, figures in bundle.about["metrics"]["stages"].items()}
    assert stages["retriever after"] > stages["retriever before"]

    # The re-ranker alone, without the retriever's share, on the same candidates, against its start.
    qrels = dataset.judged("dev")
    query_ids = counted_queries(qrels)
    texts = [dataset.queries[query_id] for query_id in query_ids]
    retriever = bundle.retriever
    candidates = retrieve(
        retriever, passage_index(retriever, dataset), query_ids, retriever.tokenize(texts), recipe.evaluation.depth
    )
    means = {}
    torch.manual_seed(recipe.seed)  # the fresh head that the run began with
    for name, reranker in (("before", CrossEncoder.load(recipe.reranker)), ("after", bundle.reranker)):
        tokens = passage_tokens(dataset, reranker.tokenizer)
        run = rerank(reranker, candidates, reranker.tokenize(texts), tokens)
        means[name] = evaluate_run(run, qrels, dataset.passages.row, ["mrr@10"])["mrr@10"].mean()
    assert means["after"] > means["before"] + 0.05

    index = Index.build(bundle, dataset, tmp_path / "index")
    answer = Searcher(index).search(texts[0], k=3)
    assert [hit.rank for hit in answer] == [1, 2, 3]
