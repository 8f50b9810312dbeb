"""The folders on disk, in the layout of sentence-transformers 6: its `SentenceTransformer` reads our retriever,
its `CrossEncoder` our re-ranker. Weights are safetensors."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from tandemqa.encoders.backbone import Pooling, resolve_model
from tandemqa.encoders.dense import ACTIVATIONS, Dense
from tandemqa.errors import TandemError
from tandemqa.files import read_json, write_json

MANIFEST = "tandem.json"

TRANSFORMER = "sentence_transformers.base.modules.transformer.Transformer"
POOLING = "sentence_transformers.sentence_transformer.modules.pooling.Pooling"
# Where it lies in releases 5 and 6 both.
NORMALIZE = "sentence_transformers.sentence_transformer.modules.Normalize"
DENSE = "sentence_transformers.base.modules.dense.Dense"
ROUTER = "sentence_transformers.base.modules.router.Router"
IDENTITY = "torch.nn.modules.linear.Identity"

EMBEDDING, SCORES = "sentence_embedding", "scores"

QUERY_TOWER, PASSAGE_TOWER = "query_0_Transformer", "document_0_Transformer"


def save_retriever(
    folder: Path,
    towers: tuple[nn.Module, nn.Module],
    tokenizer: Any,
    dense: Sequence[Dense],
    pooling: Pooling,
    normalise: bool,
    lengths: tuple[int, int],
    prompts: tuple[str, str],
) -> None:
    """Write a dual-encoder: one Transformer if the towers are one object, else a Router with one for each side.

    `towers`, `lengths` (the tokens a text is cut at) and `prompts` are those of the query and of the passage. A
    shared tower can name one length only: the passage's. `dense` stand behind the pooling of both.
    """
    folder.mkdir(parents=True, exist_ok=True)
    size = int(towers[0].config.hidden_size)  # type: ignore[union-attr, arg-type]
    pooling_config = {"embedding_dimension": size, "pooling_mode": pooling, "include_prompt": True}
    if towers[0] is towers[1]:
        _save_transformer(folder, towers[0], tokenizer, lengths[1])
        write_json(folder / "1_Pooling" / "config.json", pooling_config)
        modules = [(TRANSFORMER, ""), (POOLING, "1_Pooling")]
    else:
        sides = {"query": (QUERY_TOWER, "query_1_Pooling"), "document": (PASSAGE_TOWER, "document_1_Pooling")}
        for tower, length, (path, pooling_path) in zip(towers, lengths, sides.values(), strict=True):
            _save_transformer(folder / path, tower, tokenizer, length)
            write_json(folder / pooling_path / "config.json", pooling_config)
        types = {
            path: kind for side in sides.values() for path, kind in zip(side, (TRANSFORMER, POOLING), strict=True)
        }
        parameters = {"default_route": "document", "allow_empty_key": True, "route_mappings": {}}
        write_json(
            folder / "router_config.json",
            {"types": types, "structure": {k: list(v) for k, v in sides.items()}, "parameters": parameters},
        )
        modules = [(ROUTER, "")]
    for layer in dense:
        modules.append((DENSE, _save_dense(folder, len(modules), layer)))
    if normalise:
        path = f"{len(modules)}_Normalize"
        write_json(folder / path / "config.json", {})
        modules.append((NORMALIZE, path))
    _save_modules(folder, modules)
    write_json(
        folder / "config_sentence_transformers.json",
        {
            "model_type": "SentenceTransformer",
            "prompts": {"query": prompts[0], "document": prompts[1]},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine" if normalise else "dot",
        },
    )


def save_reranker(
    folder: Path,
    encoder: nn.Module,
    dense: Sequence[Dense],
    head: nn.Linear,
    tokenizer: Any,
    pooling: Pooling,
    max_length: int,
) -> None:
    """Write a cross-encoder as Transformer, Pooling and Dense, so that the head is linear on the pooled state (or on
    what `dense` make of it)."""
    folder.mkdir(parents=True, exist_ok=True)
    _save_transformer(folder, encoder, tokenizer, max_length)
    size = int(encoder.config.hidden_size)  # type: ignore[union-attr, arg-type]
    write_json(
        folder / "1_Pooling" / "config.json",
        {"embedding_dimension": size, "pooling_mode": pooling, "include_prompt": True},
    )
    modules = [(TRANSFORMER, ""), (POOLING, "1_Pooling")]
    for layer in dense:
        modules.append((DENSE, _save_dense(folder, len(modules), layer)))
    modules.append((DENSE, _save_dense(folder, len(modules), Dense(head, "identity"), SCORES)))
    _save_modules(folder, modules)
    write_json(
        folder / "config_sentence_transformers.json",
        {"model_type": "CrossEncoder", "activation_fn": IDENTITY, "prompts": {}, "default_prompt_name": None},
    )


def tower_sources(source: str) -> tuple[str, str]:
    """Where the query tower and the passage tower of a retriever lie: two folders of a Router, else the same."""
    folder = Path(resolve_model(source))
    if (folder / "router_config.json").exists():
        return str(folder / QUERY_TOWER), str(folder / PASSAGE_TOWER)
    return source, source


def check_origin(source: str, model: str, settings: dict[str, Any]) -> None:
    """Refuse to go on from a bundle's model (`retriever` or `reranker`) with settings that it was not trained with.

    settings: those that decide what its weights mean, such as the pooling; another value would load without a word
    and spoil what was learnt. Any other source may be used in any way.
    """
    manifest = Path(source).parent / MANIFEST
    if not (Path(source).is_dir() and manifest.exists()):
        return
    trained = read_json(manifest).get(model, {})
    for name, value in settings.items():
        if name in trained and trained[name] != value:
            raise TandemError(
                f"{source} was trained with {name} {trained[name]!r}, but {model}.{name} is {value!r}: "
                f"set {model}.{name}={trained[name]}."
            )


def load_dense(source: str) -> list[Dense]:
    """The layers behind the pooling of a model in this layout, none if it has none; the scoring head is not one."""
    return [layer for layer, output in _read_dense(source) if output != SCORES]


def load_head(source: str) -> nn.Linear | None:
    """The scoring head of a re-ranker folder, or None for a model that has none."""
    return next((layer.linear for layer, output in _read_dense(source) if output == SCORES), None)


def _read_dense(source: str) -> Iterator[tuple[Dense, str]]:
    """The Dense modules of a folder, each with the name of its output."""
    folder = Path(resolve_model(source))
    if not (folder / "modules.json").exists():
        return
    for module in read_json(folder / "modules.json"):
        if not module["type"].endswith(".Dense"):
            continue
        path = folder / module["path"]
        config = read_json(path / "config.json")
        known = {f"{kind.__module__}.{kind.__qualname__}": name for name, kind in ACTIVATIONS.items()}
        activation = known.get(config.get("activation_function", ""))
        output = config.get("module_output_name") or EMBEDDING
        if (
            activation is None
            or config.get("use_residual")
            or config.get("module_input_name", EMBEDDING) != EMBEDDING
        ):
            raise TandemError(f"The layer {path} is of a kind that is not supported here; choose another model.")
        linear = nn.Linear(config["in_features"], config["out_features"], bias=config.get("bias", True))
        try:
            weights = load_file(path / "model.safetensors")
            linear.load_state_dict({name.removeprefix("linear."): value for name, value in weights.items()})
        except FileNotFoundError as error:
            raise TandemError(f"{path} holds no model.safetensors, the only form of weights that is read.") from error
        except (SafetensorError, RuntimeError) as error:
            raise TandemError(f"The weights in {path} are damaged; copy the model again.") from error
        yield Dense(linear, activation), output


def _save_dense(folder: Path, number: int, layer: Dense, output: str = EMBEDDING) -> str:
    """Write a Dense module; returns its place in the folder."""
    path, linear = f"{number}_Dense", layer.linear
    kind = type(layer.activation)
    write_json(
        folder / path / "config.json",
        {
            "in_features": linear.in_features,
            "out_features": linear.out_features,
            "bias": linear.bias is not None,
            "activation_function": f"{kind.__module__}.{kind.__qualname__}",
            "module_input_name": EMBEDDING,
            "module_output_name": output,
        },
    )
    save_file(
        {f"linear.{name}": value.contiguous() for name, value in linear.state_dict().items()},
        folder / path / "model.safetensors",
    )
    return path


def _save_transformer(folder: Path, model: nn.Module, tokenizer: Any, max_length: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)  # type: ignore[operator]
    tokenizer.save_pretrained(folder)
    write_json(
        folder / "sentence_bert_config.json",
        {
            "transformer_task": "feature-extraction",
            "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
            "module_output_name": "token_embeddings",
            "max_seq_length": max_length,
        },
    )


def _save_modules(folder: Path, modules: list[tuple[str, str]]) -> None:
    write_json(
        folder / "modules.json",
        [{"idx": i, "name": str(i), "path": path, "type": kind} for i, (kind, path) in enumerate(modules)],
    )
