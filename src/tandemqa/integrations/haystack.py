"""Search as a retriever component of Haystack."""

from collections.abc import Sequence
from typing import Any

from haystack import Document, component, default_from_dict, default_to_dict

from tandemqa.integrations.metadata import metadata
from tandemqa.search.candidates import Mode
from tandemqa.search.searcher import Searcher


@component
class TandemRetriever:
    """`TandemRetriever("index", top_k=5).run("a question")["documents"]`: documents, best first.

    It is saved with a pipeline by the folders of its index and bundle, which are opened when it first runs. A saved
    pipeline is read with `Pipeline.load(..., allowed_modules=["tandemqa.integrations.haystack"])`.
    """

    def __init__(
        self,
        index: str,
        bundle: str | None = None,
        top_k: int = 5,
        depth: int | None = None,
        mode: Mode | None = None,
        stopping: float | None = None,
        where: Sequence[str] = (),
    ) -> None:
        """top_k: passages to find; depth: candidates that are re-ranked; bundle: where it is, if it has moved;
        where: conditions that all passages fulfil, such as year>=2001."""
        self.index, self.bundle, self.top_k = index, bundle, top_k
        self.depth, self.mode, self.stopping, self.where = depth, mode, stopping, list(where)
        self.searcher: Searcher | None = None

    def warm_up(self) -> None:
        """Open the index and its models."""
        if self.searcher is None:
            self.searcher = Searcher(self.index, self.bundle)

    @component.output_types(documents=list[Document])
    def run(self, query: str, top_k: int | None = None) -> dict[str, list[Document]]:
        """The passages that answer `query` best."""
        self.warm_up()
        assert self.searcher is not None
        k = self.top_k if top_k is None else top_k
        answer = self.searcher.search(query, k, self.depth, self.mode, self.stopping, self.where)
        documents = [Document(id=h.id, content=h.text, meta=metadata(answer, h), score=h.score) for h in answer]
        return {"documents": documents}

    def to_dict(self) -> dict[str, Any]:
        """The component as a pipeline saves it."""
        names = ("index", "bundle", "top_k", "depth", "mode", "stopping", "where")
        return dict(default_to_dict(self, **{name: getattr(self, name) for name in names}))

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "TandemRetriever":
        """The component that `to_dict` gave."""
        made: TandemRetriever = default_from_dict(cls, data)
        return made
