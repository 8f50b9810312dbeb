"""A bundle's encoders as ONNX graphs, in folders that sentence-transformers opens with `backend="onnx"`."""

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from tandemqa.encoders.backbone import hidden_states
from tandemqa.encoders.bundle import MANIFEST, Bundle
from tandemqa.encoders.dual import Tower
from tandemqa.encoders.inputs import TokenBatch
from tandemqa.encoders.layout import PASSAGE_TOWER, QUERY_TOWER
from tandemqa.encoders.onnx_graph import GRAPH, INPUTS, TOLERANCE, difference, outputs, padded, tensors
from tandemqa.encoders.onnx_int8 import Int8Graph
from tandemqa.encoders.quantised import Ranges, has_vnni
from tandemqa.errors import TandemError, first_line
from tandemqa.extras import needed
from tandemqa.files import whole_folder
from tandemqa.progress import bar

# What sentence-transformers calls it; to be named by `file_name`.
INT8_GRAPH = "onnx/model_qint8_avx512_vnni.onnx"

OUTPUT = "last_hidden_state"
# The first with GELU as one operator.
OPSET = 20
# A file of protocol buffers holds two gigabytes at most; the weights of larger models lie beside it.
LARGEST = 1_900_000_000

# Sequences and tokens of the batch that is traced: neither is one of those that a graph is compared on.
TRACED = (3, 11)
# The least mean cosine of states in int8 to torch's.
LEAST_COSINE = 0.9


@dataclass(frozen=True)
class Exported:
    """What was written: the folder; the largest difference of any hidden state to torch's, as a share of the largest
    state; and the least mean cosine of an encoder's hidden states in int8 to torch's, None without int8."""

    folder: Path
    difference: float
    cosine: float | None


def export(bundle: Bundle | str | Path, out: str | Path, int8: bool = False) -> Exported:
    """Write the models of a bundle to `out/retriever` and `out/reranker`, their encoders as float32 ONNX graphs.

    The folders are sentence-transformers' own: SentenceTransformer(..., backend="onnx") opens the retriever,
    CrossEncoder(..., backend="onnx") the re-ranker. Each graph is compared with torch on padded batches of other
    shapes than the traced one; one that differs is a `TandemError`, and so is a folder at `out` that is no earlier
    export.

    With `int8`, a graph in bytes lies beside each (`INT8_GRAPH`, to be named by `file_name`): by the ranges of a
    calibrated bundle, which is nearer to float32, else by ranges that are measured at each call.
    """
    for package in ("onnx", "onnxscript", "onnxruntime"):
        needed(package, "onnx", "Exporting a bundle")
    place = Path(out)
    if place.exists() and ((place / MANIFEST).exists() or not (place / "reranker" / GRAPH).exists()):
        raise TandemError(f"{place} exists and is no earlier export; choose another place.")
    if int8 and not has_vnni():
        raise TandemError(
            "This processor lacks AVX512-VNNI, which a graph in int8 is made for, so it could not be checked; "
            "leave --int8 out."
        )
    if not isinstance(bundle, Bundle):
        bundle = Bundle.load(bundle)
    encoders = _encoders(bundle)
    differences, cosines = [], []
    with whole_folder(place) as partial, bar("export", len(encoders) * (1 + int8), "graph") as progress:
        bundle.retriever.save(partial / "retriever")
        bundle.reranker.save(partial / "reranker")
        for name, (encoder, has_types, ranges) in encoders.items():
            for weights in (partial / name).glob("model*.safetensors*"):
                weights.unlink()
            graph, states = partial / name / GRAPH, Traceable(encoder)
            write_graph(states, encoder, graph, has_types)
            differences.append(check_graph(states, graph))
            progress.update(1)
            if int8:
                in_bytes = partial / name / INT8_GRAPH
                if ranges is None:
                    quantise(graph, in_bytes)
                else:
                    write_graph(Int8Graph(states.encoder, ranges), encoder, in_bytes, has_types)
                cosines.append(check_int8(states, in_bytes))
                progress.update(1)
    return Exported(place, max(differences), min(cosines) if int8 else None)


class Traceable(nn.Module):
    """A copy of an encoder on the CPU, as a function from tensors to its last hidden states."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(encoder).cpu().eval()
        # Plain products and a softmax; the fused kernel's graph looks for rows that are masked altogether as well.
        self.encoder.set_attn_implementation("eager")  # type: ignore[operator]

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        return self.of(TokenBatch(input_ids, attention_mask, token_type_ids))

    def of(self, batch: TokenBatch) -> Tensor:
        return hidden_states(self.encoder, batch)


def write_graph(states: nn.Module, encoder: nn.Module, path: Path, has_types: bool) -> None:
    """Write what computes an encoder's states as an ONNX graph for batches of any shape."""
    path.parent.mkdir(parents=True, exist_ok=True)
    batch = tensors(padded(encoder.config, *TRACED, has_types))
    shape = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    size = sum(parameter.numel() * parameter.element_size() for parameter in states.parameters())
    try:
        with torch.no_grad(), _quiet():
            torch.onnx.export(
                states,
                batch,
                path,
                dynamo=True,
                verbose=False,
                opset_version=OPSET,
                input_names=INPUTS[: len(batch)],
                output_names=[OUTPUT],
                dynamic_shapes=(shape,) * len(batch),
                external_data=size > LARGEST,
            )
    except RuntimeError as error:
        kind = type(encoder).__name__
        raise TandemError(f"torch cannot write a {kind} as ONNX ({first_line(error)}); leave it in torch.") from error


def quantise(graph: Path, out: Path) -> None:
    """Write `graph` with the products of weights in bytes, for an encoder whose ranges are not known.

    The range of what a product reads is measured each time (dynamic quantisation). Weights are signed bytes with a
    scale for each output; attention and embeddings stay in float32.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _quiet():
        quantize_dynamic(
            graph,
            out,
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            weight_type=QuantType.QInt8,
            use_external_data_format=graph.with_name(graph.name + ".data").exists(),
        )


def check_graph(states: Traceable, graph: Path) -> float:
    """The largest difference of a graph's states to torch's, as a share of the largest state."""
    off = difference(graph, states.of, states.encoder.config)
    if not off < TOLERANCE:
        kind = type(states.encoder).__name__
        raise TandemError(
            f"The ONNX graph of this {kind} gives other states than torch (off by {off:.2g} of the largest); "
            "it cannot be exported, leave it in torch."
        )
    return off


def check_int8(states: Traceable, graph: Path) -> float:
    """The mean cosine of the states of a graph in bytes to torch's."""
    pairs = outputs(graph, states.of, states.encoder.config)
    cosines = [np.sum(f * o, 1) / np.linalg.norm(f, axis=1) / np.linalg.norm(o, axis=1) for f, o in pairs]
    cosine = float(np.concatenate(cosines).mean())
    if not cosine > LEAST_COSINE:
        kind = type(states.encoder).__name__
        raise TandemError(
            f"In int8 this {kind} gives other states (a mean cosine of {cosine:.2f} to float32); leave --int8 out."
        )
    return cosine


def _encoders(bundle: Bundle) -> dict[str, tuple[nn.Module, bool, Ranges | None]]:
    """The folder of each encoder's Transformer: the encoder, whether it reads segments, and its ranges if known."""
    retriever, reranker = bundle.retriever, bundle.reranker
    folders: dict[str, Tower] = {"retriever": "passage"}
    if retriever.query_tower is not retriever.passage_tower:
        folders = {f"retriever/{QUERY_TOWER}": "query", f"retriever/{PASSAGE_TOWER}": "passage"}
    encoders = {
        name: (retriever.tower(tower), retriever.format.has_types, retriever.ranges.get(tower))
        for name, tower in folders.items()
    }
    return encoders | {"reranker": (reranker.encoder, reranker.format.has_types, reranker.ranges)}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings of the exporters, which speak of their own inner workings."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
