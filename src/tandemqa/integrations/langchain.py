"""Search as a retriever of LangChain."""

from collections.abc import Sequence

from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from pydantic import ConfigDict, Field

from tandemqa.integrations.metadata import metadata
from tandemqa.search.candidates import Mode
from tandemqa.search.searcher import Searcher


class TandemRetriever(BaseRetriever):
    """`TandemRetriever(searcher=Searcher("index"), k=5).invoke("a question")`: documents, best first."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    searcher: Searcher
    k: int = Field(5, description="Passages to find.")
    depth: int | None = Field(None, description="Candidates that are re-ranked.")
    mode: Mode | None = None
    stopping: float | None = None
    where: Sequence[str] = Field((), description="Conditions that all passages fulfil, such as year>=2001.")

    def _get_relevant_documents(self, query: str, *, run_manager: CallbackManagerForRetrieverRun) -> list[Document]:
        answer = self.searcher.search(query, self.k, self.depth, self.mode, self.stopping, self.where)
        return [Document(page_content=hit.text, id=hit.id, metadata=metadata(answer, hit)) for hit in answer]
