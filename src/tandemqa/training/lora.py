"""Low-rank adapters (Hu et al., 2022, "LoRA"), by `peft`: beside each matrix of an encoder, which stays as it is, two
thin ones learn."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from tandemqa.extras import needed
from tandemqa.training.joint import JointModel

# The adapters' part is multiplied by this, whatever their rank, so that a rate suits every rank.
SCALE = 2


@contextmanager
def adapted(model: JointModel, seed: int) -> Iterator[None]:
    """In this block the encoders whose settings name a `lora_rank`, and that learn, do so by adapters alone.

    At its end the adapters are added to the weights, and the encoders are the plain ones they were. The adapters
    begin without effect, drawn from `seed`; an encoder that serves as both towers has one set.
    """
    tuned = []
    torch.manual_seed(seed)
    try:
        for encoder, rank in _encoders(model):
            learning = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
            tuned.append((_adapters(encoder, rank), learning))
        yield
    finally:
        for tuner, learning in tuned:
            tuner.merge_and_unload()
            for parameter in learning:
                parameter.requires_grad_(True)


def _encoders(model: JointModel) -> list[tuple[nn.Module, int]]:
    """The encoders that take adapters, each once, and the rank."""
    found: dict[nn.Module, int] = {}
    if model.retriever is not None and model.retriever_learns and (rank := model.retriever.config.lora_rank):
        found |= {model.retriever.query_tower: rank, model.retriever.passage_tower: rank}
    if model.reranker is not None and model.reranker_learns and (rank := model.reranker.config.lora_rank):
        found[model.reranker.encoder] = rank
    return list(found.items())


def _adapters(encoder: nn.Module, rank: int) -> Any:
    """Put adapters into the encoder's linear layers; peft's handle on them."""
    lora = needed("peft", "lora", "The setting lora_rank").tuners.lora
    layers = [
        name for name, layer in encoder.named_modules() if isinstance(layer, nn.Linear) and "pooler" not in name
    ]
    return lora.LoraModel(encoder, lora.LoraConfig(r=rank, lora_alpha=SCALE * rank, target_modules=layers), "default")
