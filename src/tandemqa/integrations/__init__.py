"""Search as the retriever of other frameworks; needs the extra `integrations`."""
