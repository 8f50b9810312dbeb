"""What every framework is told of a hit beside its text."""

from typing import Any

from tandemqa.search.searcher import Answer, Hit


def metadata(answer: Answer, hit: Hit) -> dict[str, Any]:
    """The hit's id, title, ranks, scores and answer, what its passage carries besides (`metadata`), and how sure its
    question's first hit is."""
    return {
        "id": hit.id,
        "title": hit.title,
        "rank": hit.rank,
        "score": hit.score,
        "retriever_rank": hit.retriever_rank,
        "retriever_score": hit.retriever_score,
        "reranker_score": hit.reranker_score,
        "answer": hit.answer,
        "answer_start": hit.answer_start,
        "answer_end": hit.answer_end,
        "metadata": hit.metadata,
        "confidence": answer.confidence,
        "found": answer.found,
    }
