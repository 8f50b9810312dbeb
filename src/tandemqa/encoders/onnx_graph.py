"""ONNX graphs of encoders, held against torch on padded batches."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tandemqa.encoders.inputs import TokenBatch, position_limit
from tandemqa.errors import TandemError, first_line
from tandemqa.extras import needed

# Where sentence-transformers looks for a graph if it is told nothing.
GRAPH = "onnx/model.onnx"
INPUTS = ("input_ids", "attention_mask", "token_type_ids")

# Sequences and tokens of the batches on which a graph is compared.
SHAPES = ((1, 5), (4, 24), (2, 120))
# How far an output may be from torch's, as a share of the largest.
TOLERANCE = 1e-4

Arrays = npt.NDArray[np.float32]


def difference(graph: Path, compute: Callable[[TokenBatch], Tensor], config: Any) -> float:
    """The largest difference of a graph's first output to torch's, as a share of the largest value; NaN if any is."""
    return float(
        np.max([np.abs(found - own).max() / np.abs(own).max() for found, own in outputs(graph, compute, config)])
    )


def outputs(graph: Path, compute: Callable[[TokenBatch], Tensor], config: Any) -> Iterator[tuple[Arrays, Arrays]]:
    """What a graph's first output is and what `compute` gives, on batches of several shapes: states of real tokens
    (T, d), or logits (N, C)."""
    onnxruntime = needed("onnxruntime", "onnx", "Comparing an ONNX graph with torch")
    try:
        session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
        names = [each.name for each in session.get_inputs()]
        for shape in SHAPES:
            batch = padded(config, *shape, "token_type_ids" in names)
            values = dict(zip(INPUTS, tensors(batch), strict=False))
            found = session.run(None, {name: values[name].numpy() for name in names})[0]
            with torch.inference_mode():
                own = compute(batch).numpy()
            if found.shape != own.shape:
                raise ValueError(f"its first output has the shape {found.shape}, not {own.shape}")
            real = batch.attention_mask.numpy() == 1
            yield (found[real], own[real]) if own.ndim == 3 else (found, own)
    except KeyError as error:
        raise TandemError(f"{graph} has an input {error}, which is not known here; choose another model.") from error
    except (RuntimeError, ValueError) as error:
        raise TandemError(f"{graph} could not be compared with torch: {first_line(error)}.") from error


def padded(config: Any, sequences: int, tokens: int, has_types: bool) -> TokenBatch:
    """Random ids, each row padded more than the one before. The padding is random too, so that a graph which does not
    mask it gives something else."""
    tokens = min(tokens, position_limit(config))
    ids = torch.randint(config.vocab_size, (sequences, tokens), generator=torch.Generator().manual_seed(0))
    lengths = tokens - torch.arange(sequences) * (tokens // (sequences + 1))
    mask = (torch.arange(tokens) < lengths[:, None]).long()
    types = (torch.arange(tokens) >= tokens // 2).long() % config.type_vocab_size * mask if has_types else None
    return TokenBatch(ids, mask, types)


def tensors(batch: TokenBatch) -> tuple[Tensor, ...]:
    """What an encoder reads of a batch, in the order of INPUTS; no types for one without segments."""
    always = batch.input_ids, batch.attention_mask
    return always if batch.type_ids is None else (*always, batch.type_ids)
