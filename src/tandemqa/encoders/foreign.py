"""Models trained elsewhere: sentence-transformers' retrievers and cross-encoders, read exactly or refused."""

from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError
from torch import Tensor, nn

from tandemqa.data.tokens import MAX_TOKENS
from tandemqa.encoders.backbone import default_device, load_tokenizer, resolve_model
from tandemqa.encoders.bundle import MANIFEST, check_bundle
from tandemqa.encoders.cross import CrossEncoder, RerankerConfig
from tandemqa.encoders.dense import Activation, Dense
from tandemqa.encoders.dual import DualEncoder, RetrieverConfig
from tandemqa.encoders.inputs import TokenBatch, position_limit
from tandemqa.encoders.layout import IDENTITY, load_head
from tandemqa.encoders.onnx_graph import GRAPH
from tandemqa.encoders.onnx_weights import graph_of, read_into
from tandemqa.errors import TandemError, first_line
from tandemqa.files import read_json

Config = TypeVar("Config", bound=BaseModel)

# What is fetched from a hub: no pickled weights, no code.
FETCHED = ["*.json", "*.txt", "*.model", "*.safetensors"]
# Where that brought no weights: the first of these graphs that is there, none of its quantised variants.
GRAPHS = (GRAPH, "model.onnx")

POOLING_KEYS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}

# Of each kind of classifier: the layer on the [CLS] state, what follows it, and the layer that gives the score.
CLASSIFIERS: dict[str, tuple[str, Activation, str]] = {
    "bert": ("bert.pooler.dense", "tanh", "classifier"),
    "roberta": ("classifier.dense", "tanh", "classifier.out_proj"),
    "xlm-roberta": ("classifier.dense", "tanh", "classifier.out_proj"),
    "electra": ("classifier.dense", "gelu", "classifier.out_proj"),
    "distilbert": ("pre_classifier", "relu", "classifier"),
}


def read_retriever(source: str, query_prompt: str | None = None, passage_prompt: str | None = None) -> DualEncoder:
    """The retriever of a bundle or a run of ours, or any sentence-transformers model of Transformer, Pooling, Dense
    and Normalize, from a folder or a hub; a plain encoder is mean-pooled, as sentence-transformers does.

    Vectors equal sentence-transformers' (of unit length where the model compares by cosine), but for texts of more
    than 512 tokens, which are cut there. Prompts, which stand before every query and every passage, take the place of
    those in the model's files, where some models do not tell theirs. Anything that cannot be read exactly is a
    `TandemError`, and so are other prompts than those that a model of ours was trained with.
    """
    prompts = {"query_prompt": query_prompt, "passage_prompt": passage_prompt}
    given = {name: prompt for name, prompt in prompts.items() if prompt is not None}
    own = _of_bundle(source, "retriever")
    if own is not None:
        place, known = own
        return DualEncoder.load(_read_as(RetrieverConfig, known | given | {"model": str(place)}, source))
    folder = _local(source)
    settings: dict[str, Any] = {"model": str(folder), "similarity": "cosine", "pooling": "mean"}
    if (folder / "modules.json").exists():
        settings |= _retriever_modules(folder, source)
    settings |= _prompts(folder) | given
    settings["passage_length"] = _length(folder)
    return DualEncoder.load(_read_as(RetrieverConfig, settings, source))


def read_reranker(source: str) -> CrossEncoder:
    """The re-ranker of a bundle or a run of ours, or a cross-encoder with one label from a folder or a hub: a
    sequence classifier of the kinds in CLASSIFIERS, or Transformer, Pooling and Dense as we write them.

    Its score is the logit. Where sentence-transformers puts it through a sigmoid, the order is the same, and the
    logit still tells apart what rounds to 1. Anything that cannot be read exactly is a `TandemError`.
    """
    own = _of_bundle(source, "reranker")
    if own is not None:
        place, known = own
        return CrossEncoder.load(_read_as(RerankerConfig, known | {"model": str(place)}, source))
    folder = _local(source)
    if any(_settings(folder).get("prompts", {}).values()):
        raise TandemError(f"{source} cannot be the re-ranker: it has prompts, which are not supported for pairs.")
    head = load_head(str(folder))
    if head is not None:
        pooling = _pooling_before(head, folder, source)
        settings = {"model": str(folder), "pooling": pooling, "pair_length": _length(folder)}
        return CrossEncoder.load(_read_as(RerankerConfig, settings, source))
    config = read_json(folder / "config.json")
    kind = config.get("model_type")
    labels = len(config.get("id2label") or range(config.get("num_labels", 2)))
    if kind not in CLASSIFIERS or labels != 1 or not str(config.get("architectures")).count("SequenceClassification"):
        raise TandemError(
            f"{source} cannot be the re-ranker: it is {_named(config)} with {labels} labels, and what is read are "
            f"sequence classifiers of the kinds {', '.join(CLASSIFIERS)} with one label."
        )
    settings = {"model": str(folder), "pooling": "cls", "pair_length": _length(folder)}
    read_as = _read_as(RerankerConfig, settings, source)
    model, (inner, activation, outer) = _classifier(folder, source), CLASSIFIERS[kind]
    dense = Dense(_linear(model, inner), activation)
    reranker = CrossEncoder(read_as, load_tokenizer(str(folder)), model.base_model, _linear(model, outer), [dense])
    return reranker.to(default_device())


def _of_bundle(source: str, model: str) -> tuple[Path, dict[str, Any]] | None:
    """The folder and settings of a bundle's model, if `source` is a run, a bundle or that model's folder in one."""
    given = Path(source)
    for place in (given, given / "bundle", given.parent if given.name == model else given):
        if (place / MANIFEST).exists():
            folder, about = check_bundle(place)
            if not isinstance(about.get(model), dict):
                raise TandemError(f"{source} cannot be read exactly: its {MANIFEST} does not describe the {model}.")
            return folder / model, about[model]
    return None


def _read_as(kind: type[Config], settings: dict[str, Any], source: str) -> Config:
    """The settings of a model as ours; one that ours cannot have is a `TandemError`."""
    try:
        return kind(**settings)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise TandemError(
            f"{source} cannot be read exactly: its {field} is {first['input']!r} ({first['msg']})."
        ) from error


def _local(source: str) -> Path:
    """The folder of a model, fetched from a hub if it is not here."""
    folder = Path(resolve_model(source))
    if folder.is_dir():
        if not (folder / "config.json").exists() and not (folder / "modules.json").exists():
            raise TandemError(f"{source} holds no model: neither modules.json nor config.json is there.")
        return folder
    try:
        return _fetched(str(folder))
    except (OSError, ValueError) as error:
        raise TandemError(
            f"{source} is no folder and could not be fetched from a hub: {first_line(error)}."
        ) from error


def _fetched(name: str) -> Path:
    """The folder of a model of a hub, of the files that are needed alone."""
    from huggingface_hub import snapshot_download

    folder = Path(snapshot_download(name, allow_patterns=FETCHED))
    for graph in GRAPHS:
        if any(folder.glob("*.safetensors")) or any((folder / each).exists() for each in GRAPHS):
            break
        # What is too large for one file lies beside it: model.onnx_data.
        folder = Path(snapshot_download(name, allow_patterns=[*FETCHED, f"{graph}*"]))
    return folder


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / "config_sentence_transformers.json"
    return dict(read_json(path)) if path.exists() else {}


def _retriever_modules(folder: Path, source: str) -> dict[str, Any]:
    """The settings that the modules of a sentence-transformers model amount to."""
    modules = _modules(folder)
    kinds = [kind for kind, _ in modules]
    layers = kinds[2:-1] if kinds[-1] == "Normalize" else kinds[2:]
    if kinds[:2] != ["Transformer", "Pooling"] or set(layers) - {"Dense"} or modules[0][1] != folder:
        raise TandemError(
            f"{source} cannot be the retriever: it is made of {', '.join(kinds)}, and what is read is Transformer, "
            "Pooling, any Dense, and at most one Normalize at the end."
        )
    pooling = _pooling(modules[1][1], f"{source} cannot be the retriever")
    similarity = _settings(folder).get("similarity_fn_name") or "cosine"
    if similarity not in ("cosine", "dot"):
        raise TandemError(f"{source} cannot be the retriever: it compares by {similarity}, not by cosine or dot.")
    transformer = folder / "sentence_bert_config.json"
    if transformer.exists() and read_json(transformer).get("do_lower_case"):
        tokenizer = load_tokenizer(str(folder))
        if tokenizer.tokenize("ÉA") != tokenizer.tokenize("éa"):
            raise TandemError(f"{source} cannot be the retriever: its texts are lowercased outside its tokeniser.")
    return {"pooling": pooling, "similarity": "cosine" if kinds[-1] == "Normalize" else similarity}


def _pooling_before(head: nn.Linear, folder: Path, source: str) -> str:
    """The pooling of a cross-encoder that is made of modules, `head` in the last of them."""
    modules = _modules(folder)
    kinds = [kind for kind, _ in modules]
    if kinds[:2] != ["Transformer", "Pooling"] or set(kinds[2:]) != {"Dense"} or modules[0][1] != folder:
        raise TandemError(
            f"{source} cannot be the re-ranker: it is made of {', '.join(kinds)}, and what is read is Transformer, "
            "Pooling and Dense."
        )
    if head.out_features != 1 or read_json(modules[-1][1] / "config.json")["activation_function"] != IDENTITY:
        raise TandemError(f"{source} cannot be the re-ranker: its last layer does not give one linear score.")
    return _pooling(modules[1][1], f"{source} cannot be the re-ranker")


def _modules(folder: Path) -> list[tuple[str, Path]]:
    """The kinds and places of a model's modules."""
    modules = read_json(folder / "modules.json")
    return [(str(module["type"]).rpartition(".")[2], folder / module["path"]) for module in modules]


def _pooling(folder: Path, refusal: str) -> str:
    """The mode of a Pooling module; one of several modes, or one that leaves the prompt out, is refused."""
    pooling = read_json(folder / "config.json")
    modes = pooling.get("pooling_mode") or [name for key, name in POOLING_KEYS.items() if pooling.get(key)]
    modes = [modes] if isinstance(modes, str) else list(modes)
    with_prompt = pooling.get("include_prompt", True)
    if len(modes) != 1 or not with_prompt:
        described = f"{', '.join(modes) or 'none'}{'' if with_prompt else ', without the prompt'}"
        raise TandemError(f"{refusal}: its pooling ({described}) is not supported.")
    return str(modes[0])


def _prompts(folder: Path) -> dict[str, str]:
    prompts = _settings(folder).get("prompts") or {}
    passage = next((prompts[name] for name in ("document", "passage", "corpus") if prompts.get(name)), "")
    return {"query_prompt": prompts.get("query") or "", "passage_prompt": passage}


def _length(folder: Path) -> int:
    """Tokens that the model reads, special ones included, as sentence-transformers cuts them; 512 at most."""
    path = folder / "sentence_bert_config.json"
    length = read_json(path).get("max_seq_length") if path.exists() else None
    tokenizer = load_tokenizer(str(folder))
    return int(min(length or MAX_TOKENS, tokenizer.model_max_length, position_limit(_config(folder))))


def _config(folder: Path) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder, trust_remote_code=False)


def _classifier(folder: Path, source: str) -> Any:
    from transformers import AutoModelForSequenceClassification

    graph = graph_of(folder)
    if graph is not None:
        auto: Any = AutoModelForSequenceClassification
        empty = auto.from_config(_config(folder), dtype=torch.float32)
        read_into(empty, graph, lambda batch: _logits(empty, batch))
        return empty
    try:
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            folder, trust_remote_code=False, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise TandemError(f"The re-ranker {source} could not be loaded: {first_line(error)}.") from error
    if loading["missing_keys"]:
        raise TandemError(
            f"The re-ranker {source} lacks weights ({sorted(loading['missing_keys'])[0]}); copy it again."
        )
    return model


def _logits(model: nn.Module, batch: TokenBatch) -> Tensor:
    types = {} if batch.type_ids is None else {"token_type_ids": batch.type_ids}
    logits: Tensor = model(batch.input_ids, attention_mask=batch.attention_mask, **types).logits
    return logits


def _linear(model: nn.Module, name: str) -> nn.Linear:
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    return layer


def _named(config: dict[str, Any]) -> str:
    return str((config.get("architectures") or [config.get("model_type", "a model")])[0])
