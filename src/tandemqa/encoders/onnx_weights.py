"""The weights of a model that is there as an ONNX graph alone, read back into torch.

A graph keeps most parameters under their names, but the matrix of a linear layer comes transposed and anonymous
("onnx::MatMul_123"), and of equal parameters one is left. So each is found where it is used: a node tells the module
that it was traced in by its name ("/encoder/layer.0/output/dense/MatMul") or its metadata, or else by the name of
another parameter that it, or the sum behind it, reads. What was read is compared with ONNX Runtime.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from tandemqa.encoders.inputs import TokenBatch
from tandemqa.encoders.onnx_graph import GRAPH, TOLERANCE, difference
from tandemqa.errors import TandemError, first_line
from tandemqa.extras import needed

Array = npt.NDArray[Any]
# Of each module: its parameters by their names, "weight" and "bias".
Parameters = dict[str, dict[str, Array]]

# Where the exporter of torch.export keeps the modules that a node was traced in, as a list in words.
SCOPES = "pkg.torch.onnx.name_scopes"


def graph_of(folder: Path) -> Path | None:
    """The ONNX graph of a model folder that holds no safetensors, or None."""
    if any(folder.glob("*.safetensors")):
        return None
    graphs = [
        folder / GRAPH,
        folder / "model.onnx",
        *sorted(folder.glob("onnx/*.onnx")),
        *sorted(folder.glob("*.onnx")),
    ]
    return next((graph for graph in graphs if graph.exists()), None)


def read_into(model: nn.Module, graph: Path, compute: Callable[[TokenBatch], Tensor]) -> None:
    """Give a model of random weights those of its graph; `compute` is what the graph's first output should be.

    Quantised weights, a parameter that is not found, and a result that differs from ONNX Runtime's are a
    `TandemError`.
    """
    found = _parameters(graph)
    model.eval()
    for name, parameter in model.named_parameters():
        module, _, kind = name.rpartition(".")
        value = _of_module(found, module).get(kind)
        if value is None and module.startswith("pooler"):
            parameter.data.zero_()  # nothing here reads it, but what identifies a model must not be random
            continue
        if value is None or value.dtype != np.float32 or value.shape != tuple(parameter.shape):
            raise TandemError(
                f"{graph} cannot be read exactly: {name} is not in it as float32 of shape {tuple(parameter.shape)}; "
                "give the graph as it was exported, not optimised, or the model in safetensors."
            )
        parameter.data.copy_(torch.from_numpy(np.array(value)))
    off = difference(graph, compute, model.config)
    if not off < TOLERANCE:
        raise TandemError(
            f"{graph} cannot be read exactly: with its weights torch gives other values (off by {off:.2g} of the "
            "largest); give the model in safetensors."
        )


def _parameters(graph: Path) -> Parameters:
    onnx, message = (needed(name, "onnx", "Reading ONNX weights") for name in ("onnx", "google.protobuf.message"))
    try:
        nodes, constants = _constants(onnx, onnx.load(graph).graph)
    except (OSError, ValueError, onnx.checker.ValidationError, message.DecodeError) as error:
        raise TandemError(f"{graph} is damaged ({first_line(error)}); copy it again.") from error
    if any(value.dtype.itemsize == 1 and value.ndim == 2 for value in constants.values()):
        raise TandemError(f"{graph} holds quantised weights, which are not exact; give the float model.")
    reader = {name: node for node in nodes for name in node.input}
    found: Parameters = defaultdict(dict)
    for node in nodes:
        for kind, value in _roles(node, constants):
            found[_module(node, reader)].setdefault(kind, value)
    return found


def _constants(onnx: Any, graph: Any) -> tuple[list[Any], dict[str, Array]]:
    """A graph's nodes, and its values that depend on no input, by name."""
    constants = {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer}
    for node in graph.node:
        first = constants.get(node.input[0]) if node.input else None
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            constants[node.output[0]] = onnx.numpy_helper.to_array(node.attribute[0].t)
        elif node.op_type == "Identity" and first is not None:
            constants[node.output[0]] = first
        elif node.op_type == "Transpose" and first is not None and first.ndim == 2:
            constants[node.output[0]] = first.T
    return list(graph.node), constants


def _roles(node: Any, constants: dict[str, Array]) -> Iterator[tuple[str, Array]]:
    """The constants that a node reads as its module's parameters."""
    read = [constants.get(name) for name in node.input]
    if node.op_type == "MatMul" and read[1] is not None:
        yield "weight", read[1].T
    elif node.op_type == "Gemm" and read[1] is not None:
        turned = any(each.name == "transB" and each.i for each in node.attribute)
        yield "weight", read[1] if turned else read[1].T
        yield from (("bias", value) for value in read[2:] if value is not None)
    elif node.op_type == "Gather" and read[0] is not None:
        yield "weight", read[0]
    elif node.op_type == "LayerNormalization":
        yield from (
            (kind, value) for kind, value in zip(("weight", "bias"), read[1:], strict=False) if value is not None
        )
    elif node.op_type in ("Add", "Mul"):
        # The halves of a linear layer and of a LayerNorm; single numbers are not parameters.
        kind = "bias" if node.op_type == "Add" else "weight"
        yield from ((kind, value) for value in read if value is not None and value.ndim == 1)


def _module(node: Any, reader: dict[str, Any]) -> str:
    """The module that a node belongs to; "" if nothing tells."""
    scopes = next((each.value for each in node.metadata_props if each.key == SCOPES), None)
    if scopes is not None:
        *_, module, _ = ["", *re.findall(r"'([^']*)'", scopes)]
        return str(module)
    if node.name.startswith("/"):
        return str(node.name[1:].rpartition("/")[0].replace("/", "."))
    for name in node.input:
        module, _, kind = name.rpartition(".")
        if kind in ("weight", "bias"):
            return str(module)
    behind = reader.get(node.output[0])
    return (
        _module(behind, reader) if node.op_type == "MatMul" and behind is not None and behind.op_type == "Add" else ""
    )


def _of_module(found: Parameters, module: str) -> dict[str, Array]:
    """The parameters of a module, which in the graph may be part of others that torch does not have here."""
    names = [name for name in found if f".{name}".endswith(f".{module}")]
    return found[min(names, key=len)] if names else {}
