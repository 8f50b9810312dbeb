"""Search as a retriever of LlamaIndex."""

from collections.abc import Sequence

from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode

from tandemqa.integrations.metadata import metadata
from tandemqa.search.candidates import Mode
from tandemqa.search.searcher import Answer, Hit, Searcher


class TandemRetriever(BaseRetriever):
    """`TandemRetriever(Searcher("index"), k=5).retrieve("a question")`: nodes with scores, best first."""

    def __init__(
        self,
        searcher: Searcher,
        k: int = 5,
        depth: int | None = None,
        mode: Mode | None = None,
        stopping: float | None = None,
        where: Sequence[str] = (),
    ) -> None:
        """k: passages to find; depth: candidates that are re-ranked; where: conditions such as year>=2001."""
        super().__init__()
        self.searcher = searcher
        self.k, self.depth, self.mode, self.stopping, self.where = k, depth, mode, stopping, where

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        answer = self.searcher.search(
            query_bundle.query_str, self.k, self.depth, self.mode, self.stopping, self.where
        )
        return [NodeWithScore(node=_node(answer, hit), score=hit.score) for hit in answer]


def _node(answer: Answer, hit: Hit) -> TextNode:
    """A passage as a node of which prompts get title and text, and not how it was found."""
    told = metadata(answer, hit)
    unread = [name for name in told if name != "title" or not hit.title]
    return TextNode(
        id_=hit.id,
        text=hit.text,
        metadata=told,
        excluded_llm_metadata_keys=unread,
        excluded_embed_metadata_keys=unread,
    )
