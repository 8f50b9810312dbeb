"""Search inside LangChain, LlamaIndex and Haystack, by these libraries themselves; each skips where it is absent."""

import json
from pathlib import Path
from typing import Any

import pytest

from tandemqa.errors import TandemError
from tandemqa.index.index import Index
from tandemqa.search.searcher import Answer, Searcher

QUESTION = "what was Tokyo called before"
WHERE = ["row>=20", "half=b"]  # which of all passages the second half fulfils
REFUSED = "No passage has a field 'year' to search by; choose one of half, row"
INSTALL = "not installed: pip install 'tandemqa[integrations]'"


@pytest.fixture(scope="module")
def searcher(tiny_bundle: Path, tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Searcher:
    work = tmp_path_factory.mktemp("integrations")
    lines = (tiny_dataset / "corpus.jsonl").read_text(encoding="utf-8").splitlines()
    records = [{**json.loads(line), "row": row, "half": "ab"[row >= 20]} for row, line in enumerate(lines)]
    (work / "corpus.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return Searcher(Index.build(tiny_bundle, work, work / "index"))


def check(found: list[tuple[str, str, dict[str, Any]]], expected: Answer) -> None:
    """The same passages in the same order, with the answer that search marks in each."""
    assert [(id_, text) for id_, text, _ in found] == [(hit.id, hit.text) for hit in expected]
    for (_, text, meta), hit in zip(found, expected, strict=True):
        assert meta["answer"] == hit.answer == text[meta["answer_start"] : meta["answer_end"]]
        assert (meta["rank"], meta["title"], meta["confidence"]) == (hit.rank, hit.title, expected.confidence)
        assert meta["metadata"] == hit.metadata and hit.metadata.keys() == {"row", "half"}


def only_the_second_half(found: list[dict[str, Any]]) -> None:
    """The metadata of twenty passages that were to be found by the conditions."""
    assert sorted(each["metadata"]["row"] for each in found) == list(range(20, 40))


def test_langchain_chains_it(searcher: Searcher) -> None:
    pytest.importorskip("langchain_core", reason=f"langchain-core is {INSTALL}")
    from langchain_core.runnables import RunnableLambda

    from tandemqa.integrations.langchain import TandemRetriever

    chain = TandemRetriever(searcher=searcher, k=3, mode="hybrid") | RunnableLambda(list)
    documents = chain.invoke(QUESTION)
    check([(d.id, d.page_content, d.metadata) for d in documents], searcher.search(QUESTION, k=3, mode="hybrid"))
    limited = TandemRetriever(searcher=searcher, k=40, where=WHERE).invoke(QUESTION)
    only_the_second_half([document.metadata for document in limited])
    with pytest.raises(TandemError, match=REFUSED):
        TandemRetriever(searcher=searcher, where=["year=1"]).invoke(QUESTION)


def test_llamaindex_queries_it(searcher: Searcher) -> None:
    pytest.importorskip("llama_index.core", reason=f"llama-index-core is {INSTALL}")
    from llama_index.core.llms import MockLLM
    from llama_index.core.query_engine import RetrieverQueryEngine
    from llama_index.core.response_synthesizers import CompactAndRefine
    from llama_index.core.schema import MetadataMode

    from tandemqa.integrations.llamaindex import TandemRetriever

    synthesizer = CompactAndRefine(llm=MockLLM())
    engine = RetrieverQueryEngine(TandemRetriever(searcher, k=3, depth=10), response_synthesizer=synthesizer)
    nodes = engine.query(QUESTION).source_nodes
    expected = searcher.search(QUESTION, k=3, depth=10)
    check([(n.node.node_id, n.node.text, n.node.metadata) for n in nodes], expected)
    assert [node.score for node in nodes] == [hit.score for hit in expected]
    for node, hit in zip(nodes, expected, strict=True):
        title = f"title: {hit.title}\n\n" if hit.title else ""
        for mode in (MetadataMode.LLM, MetadataMode.EMBED):
            assert node.node.get_content(mode) == title + hit.text
    limited = TandemRetriever(searcher, k=40, where=WHERE).retrieve(QUESTION)
    only_the_second_half([each.node.metadata for each in limited])
    with pytest.raises(TandemError, match=REFUSED):
        TandemRetriever(searcher, where=["year=1"]).retrieve(QUESTION)


def test_haystack_runs_it_in_a_pipeline_that_was_saved(searcher: Searcher) -> None:
    pytest.importorskip("haystack", reason=f"haystack-ai is {INSTALL}")
    from haystack import Pipeline

    from tandemqa.integrations.haystack import TandemRetriever

    pipeline = Pipeline()
    pipeline.add_component("retriever", TandemRetriever(str(searcher.index.folder), top_k=4))
    pipeline = Pipeline.loads(pipeline.dumps(), allowed_modules=["tandemqa.integrations.haystack"])
    documents = pipeline.run({"retriever": {"query": QUESTION, "top_k": 3}})["retriever"]["documents"]
    expected = searcher.search(QUESTION, k=3)
    check([(d.id, d.content, d.meta) for d in documents], expected)
    assert [document.score for document in documents] == [hit.score for hit in expected]
    with pytest.raises(TandemError, match="k is 0"):
        TandemRetriever(str(searcher.index.folder)).run(QUESTION, top_k=0)
    saved = TandemRetriever(str(searcher.index.folder), top_k=40, where=WHERE).to_dict()
    limited = TandemRetriever.from_dict(saved).run(QUESTION)["documents"]
    only_the_second_half([document.meta for document in limited])
    with pytest.raises(TandemError, match=REFUSED):
        TandemRetriever(str(searcher.index.folder), where=["year=1"]).run(QUESTION)
