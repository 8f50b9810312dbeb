"""Models trained elsewhere: the vectors and scores that sentence-transformers gives, or a refusal."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from sentence_transformers import CrossEncoder as TheirCrossEncoder
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import modules
from test_bundle import TEXTS
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    ElectraConfig,
    ElectraForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
)
from typer.testing import CliRunner

from tandemqa.cli import app
from tandemqa.encoders import foreign
from tandemqa.encoders.bundle import Bundle
from tandemqa.encoders.dual import DualEncoder, RetrieverConfig, Tower
from tandemqa.encoders.foreign import read_reranker, read_retriever
from tandemqa.errors import TandemError, first_line
from tandemqa.evaluation.pair import make_bundle
from tandemqa.search.learnt import Learnt

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
CLASSIFIERS = {
    "bert": (BertForSequenceClassification, BertConfig, SMALL),
    "electra": (ElectraForSequenceClassification, ElectraConfig, {**SMALL, "embedding_size": 16}),
    "distilbert": (
        DistilBertForSequenceClassification,
        DistilBertConfig,
        {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64},
    ),
    "roberta": (RobertaForSequenceClassification, RobertaConfig, {**SMALL, "max_position_embeddings": 514}),
    "xlm-roberta": (XLMRobertaForSequenceClassification, XLMRobertaConfig, {**SMALL, "max_position_embeddings": 514}),
}


def retriever(
    model: Path, out: Path, pooling: Any = "mean", dense: Any = (), normalise: bool = False, **options: Any
) -> SentenceTransformer:
    """A model of sentence-transformers, made and saved by it."""
    torch.manual_seed(2)
    transformer = modules.Transformer(str(model), max_seq_length=options.pop("length", 100))
    parts = [transformer, modules.Pooling(32, pooling_mode=pooling), *dense]
    made = SentenceTransformer(
        modules=[*parts, *([modules.Normalize()] if normalise else [])], device="cpu", **options
    )
    made.save(str(out))
    return SentenceTransformer(str(out), device="cpu")


def classifier(kind: str, model: Path, bpe: Any, out: Path, labels: int = 1) -> Path:
    """A cross-encoder of this kind with random weights, as transformers saves it."""
    tokenizer = bpe if "roberta" in kind else AutoTokenizer.from_pretrained(model)
    tokenizer.model_max_length = 64
    make, config, settings = CLASSIFIERS[kind]
    torch.manual_seed(5)
    made = make(
        config(
            vocab_size=len(tokenizer), num_labels=labels, initializer_range=0.3, pad_token_id=tokenizer.pad_token_id,
            **settings,
        )
    )  # fmt: skip
    made.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


# Retrievers


@pytest.mark.parametrize("pooling", ["cls", "mean", "max", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"])
def test_every_pooling_gives_the_vectors_of_sentence_transformers(
    tiny_model: Path, tmp_path: Path, pooling: str
) -> None:
    theirs = retriever(tiny_model, tmp_path / "model", pooling, similarity_fn_name="dot")
    ours = read_retriever(str(tmp_path / "model"))
    assert ours.config.similarity == "dot" and ours.limit("passage") == 100
    vectors = ours.encode(ours.tokenize(TEXTS), "passage", precision="fp32")
    np.testing.assert_allclose(vectors, theirs.encode(TEXTS), atol=1e-4)


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("normalise", [False, True])
def test_dense_layers_prompts_and_normalising_are_respected_before_and_after_saving(
    tiny_model: Path, tiny_bundle: Path, tmp_path: Path, normalise: bool, similarity: str
) -> None:
    torch.manual_seed(1)
    dense = [
        modules.Dense(32, 24, activation_function=torch.nn.Tanh()),
        modules.Dense(24, 16, bias=False, activation_function=torch.nn.Identity()),
    ]
    prompts = {"query": "query: ", "document": "the passage: "}
    theirs = retriever(
        tiny_model, tmp_path / "model", "mean", dense, normalise, prompts=prompts, similarity_fn_name=similarity
    )
    made = make_bundle(str(tmp_path / "model"), str(tiny_bundle), tmp_path / "bundle")
    again = SentenceTransformer(str(tmp_path / "bundle" / "retriever"), device="cpu")
    expected = theirs.encode_query(TEXTS), theirs.encode_document(TEXTS)
    if similarity == "cosine":
        expected = tuple(vectors / np.linalg.norm(vectors, axis=1, keepdims=True) for vectors in expected)
    assert np.abs(expected[0] - expected[1]).max() > 0.01, "the prompts matter"
    for ours in (made.retriever, Bundle.load(tmp_path / "bundle").retriever):
        assert ours.size == 16
        queries = ours.encode(ours.tokenize(TEXTS), "query", precision="fp32")
        passages = ours.encode(ours.tokenize(TEXTS), "passage", precision="fp32")
        np.testing.assert_allclose(queries, expected[0], atol=1e-4)
        np.testing.assert_allclose(passages, expected[1], atol=1e-4)
    np.testing.assert_allclose(again.encode_query(TEXTS), expected[0], atol=1e-4)
    np.testing.assert_allclose(again.encode_document(TEXTS), expected[1], atol=1e-4)


def test_prompts_that_are_given_take_the_place_of_the_models_own(
    tiny_model: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    theirs = retriever(tiny_model, tmp_path / "model", prompts={"query": "of the model: "})
    given = ["--query-prompt", "query: ", "--passage-prompt", "passage: "]
    models = ["--retriever", str(tmp_path / "model"), "--reranker", str(tiny_bundle)]
    done = CliRunner().invoke(app, ["bundle", *models, *given, "--out", str(tmp_path / "bundle")])
    assert done.exit_code == 0, done.output
    ours = Bundle.load(tmp_path / "bundle").retriever
    again = SentenceTransformer(str(tmp_path / "bundle" / "retriever"), device="cpu")
    sides: dict[Tower, tuple[str, Any]] = {
        "query": ("query: ", again.encode_query),
        "passage": ("passage: ", again.encode_document),
    }
    for tower, (prompt, encode) in sides.items():
        expected = theirs.encode(TEXTS, prompt=prompt, normalize_embeddings=True)
        vectors = ours.encode(ours.tokenize(TEXTS), tower, precision="fp32")
        np.testing.assert_allclose(vectors, expected, atol=1e-4)
        np.testing.assert_allclose(encode(TEXTS), expected, atol=1e-4)
    one = read_retriever(str(tmp_path / "model"), passage_prompt="passage: ").config
    assert (one.query_prompt, one.passage_prompt) == ("of the model: ", "passage: ")
    assert read_retriever(str(tmp_path / "bundle"), query_prompt="query: ").config.query_prompt == "query: "
    with pytest.raises(TandemError, match="was trained with query_prompt 'query: '"):
        read_retriever(str(tmp_path / "bundle"), query_prompt="")


@pytest.mark.parametrize(
    ("weights", "fetched"),
    [
        (["model.safetensors", "onnx/model.onnx", "pytorch_model.bin"], ["model.safetensors"]),
        (
            [
                "onnx/model.onnx",
                "onnx/model.onnx_data",
                "onnx/model_quantized.onnx",
                "onnx/model_O4.onnx",
                "model.onnx",
            ],
            ["onnx/model.onnx", "onnx/model.onnx_data"],
        ),
        (["model.onnx", "onnx/model_fp16.onnx", "pytorch_model.bin"], ["model.onnx"]),
        (["pytorch_model.bin", "modeling.py"], []),
    ],
)
def test_of_a_hub_the_needed_files_are_fetched_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: list[str], fetched: list[str]
) -> None:
    settings = ["config.json", "tokenizer.json", "vocab.txt", "1_Pooling/config.json"]

    def download(name: str, allow_patterns: list[str]) -> str:
        for file in filter_repo_objects([*settings, *weights], allow_patterns=allow_patterns):
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).touch()
        return str(tmp_path / name)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    folder = foreign._local("someone/model")
    files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    assert sorted(files) == sorted([*settings, *fetched])


def test_a_prompt_by_the_name_of_passage_is_taken(tiny_model: Path, tmp_path: Path) -> None:
    """sentence-transformers' own `encode_document` passes it over, unless it is named."""
    retriever(tiny_model, tmp_path / "model")
    path = tmp_path / "model" / "config_sentence_transformers.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prompts": {"query": "q: ", "passage": "p: "}}))
    theirs = SentenceTransformer(str(tmp_path / "model"), device="cpu")
    ours = read_retriever(str(tmp_path / "model"))
    expected = theirs.encode(TEXTS, prompt_name="passage", normalize_embeddings=True)
    np.testing.assert_allclose(ours.encode(ours.tokenize(TEXTS), "passage", precision="fp32"), expected, atol=1e-4)


def test_a_plain_encoder_and_the_older_layout_are_read(tiny_model: Path, tmp_path: Path) -> None:
    ours = read_retriever(str(tiny_model))
    theirs = SentenceTransformer(str(tiny_model), device="cpu")
    expected = theirs.encode(TEXTS, normalize_embeddings=True)
    np.testing.assert_allclose(ours.encode(ours.tokenize(TEXTS), "query", precision="fp32"), expected, atol=1e-4)
    old = Path(shutil.copytree(tiny_model, tmp_path / "old"))
    (old / "1_Pooling").mkdir()
    (old / "modules.json").write_text(
        '[{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},'
        ' {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}]'
    )
    (old / "1_Pooling" / "config.json").write_text(
        '{"word_embedding_dimension": 32, "pooling_mode_cls_token": true, "pooling_mode_mean_tokens": false}'
    )
    (old / "sentence_bert_config.json").write_text('{"max_seq_length": 40, "do_lower_case": false}')
    ours, theirs = read_retriever(str(old)), SentenceTransformer(str(old), device="cpu")
    expected = theirs.encode(TEXTS, normalize_embeddings=True)
    np.testing.assert_allclose(ours.encode(ours.tokenize(TEXTS), "query", precision="fp32"), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("modules.json", '"idx": 1', "Pooling", "LSTM"), "made of Transformer, LSTM"),
        (("1_Pooling/config.json", '"mean"', '"mean"', '["mean", "max"]'), r"its pooling \(mean, max\)"),
        (("1_Pooling/config.json", "true", "true", "false"), "without the prompt"),
        (("config_sentence_transformers.json", "cosine", "cosine", "euclidean"), "compares by euclidean"),
        (("2_Dense/config.json", "Tanh", "Tanh", "Softplus"), "of a kind that is not supported"),
        (
            ("1_Pooling/config.json", '"mean"', '"mean"', '"median"'),
            "cannot be read exactly: its pooling is 'median'",
        ),
        (
            ("sentence_bert_config.json", "{", '"module_output', '"max_seq_length": 7, "module_output'),
            r"cannot be read exactly: its passage_length is 7 \(Input should be greater than or equal to 8\)",
        ),
    ],
)
def test_what_cannot_be_read_exactly_is_refused(
    tiny_model: Path, tmp_path: Path, change: tuple[str, str, str, str], message: str
) -> None:
    retriever(tiny_model, tmp_path / "model", dense=[modules.Dense(32, 8)], similarity_fn_name="cosine")
    name, known, before, after = change
    text = (tmp_path / "model" / name).read_text()
    assert known in text and before in text
    (tmp_path / "model" / name).write_text(text.replace(before, after))
    with pytest.raises(TandemError, match=message):
        read_retriever(str(tmp_path / "model"))


def test_a_tokeniser_that_joins_prompt_and_text_is_refused(tmp_path: Path, tiny_model: Path, bpe: Any) -> None:
    classifier("roberta", tiny_model, bpe, tmp_path / "model")
    (tmp_path / "model" / "config_sentence_transformers.json").write_text('{"prompts": {"query": "query: "}}')
    with pytest.raises(TandemError, match="'query: ' cannot be used: this model's tokeniser joins it"):
        read_retriever(str(tmp_path / "model"))


def test_a_model_that_is_nowhere_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(TandemError, match="is no folder and could not be fetched from a hub"):
        read_retriever(str(tmp_path / "nowhere"))
    with pytest.raises(TandemError, match="holds no model"):
        read_reranker(str(tmp_path))


def test_another_prompt_is_another_retriever(tiny_model: Path) -> None:
    """Or the cache would give vectors of passages that were encoded without it."""
    plain, prompted = (
        DualEncoder.load(RetrieverConfig(model=str(tiny_model), passage_prompt=prompt))
        for prompt in ("", "passage: ")
    )
    assert plain.fingerprint() != prompted.fingerprint()


# Re-rankers


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_a_classifier_gives_the_logits_of_sentence_transformers_before_and_after_saving(
    kind: str, tiny_model: Path, bpe: Any, tmp_path: Path
) -> None:
    folder = classifier(kind, tiny_model, bpe, tmp_path / "model")
    theirs = TheirCrossEncoder(str(folder), device="cpu")
    pairs = [(query, passage) for query in range(len(TEXTS)) for passage in range(len(TEXTS))]
    words = [(TEXTS[query], TEXTS[passage]) for query, passage in pairs]
    expected = theirs.predict(words, activation_fn=torch.nn.Identity())
    assert np.ptp(expected) > 0.1
    made = make_bundle(str(tiny_model), str(folder), tmp_path / "bundle")
    for ours in (made.reranker, Bundle.load(tmp_path / "bundle").reranker):
        ids = ours.tokenize(TEXTS)
        scores = ours.score(ids, ids, np.array(pairs), precision="fp32")
        np.testing.assert_allclose(scores, expected, atol=1e-4)
        np.testing.assert_allclose(1 / (1 + np.exp(-scores)), theirs.predict(words), atol=1e-4)
    again = TheirCrossEncoder(str(tmp_path / "bundle" / "reranker"), device="cpu")
    np.testing.assert_allclose(again.predict(words), expected, atol=1e-4)


def test_a_classifier_of_several_labels_and_a_plain_encoder_are_refused(
    tiny_model: Path, bpe: Any, tmp_path: Path
) -> None:
    with pytest.raises(TandemError, match="BertForSequenceClassification with 3 labels"):
        read_reranker(str(classifier("bert", tiny_model, bpe, tmp_path / "three", labels=3)))
    with pytest.raises(TandemError, match="BertModel with"):
        read_reranker(str(tiny_model))


def test_a_classifier_that_reads_too_few_tokens_is_refused(tiny_model: Path, bpe: Any, tmp_path: Path) -> None:
    folder = classifier("bert", tiny_model, bpe, tmp_path / "model")
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 4}')
    with pytest.raises(TandemError, match="cannot be read exactly: its pair_length is 4"):
        read_reranker(str(folder))


def test_weights_that_cannot_be_read_are_one_line(tiny_model: Path, bpe: Any, tmp_path: Path) -> None:
    folder = classifier("bert", tiny_model, bpe, tmp_path / "model")
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(TandemError, match=r"^The re-ranker .* could not be loaded: .*[^.]\.$"):
        read_reranker(str(folder))


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("  it broke.\nAnd so on."), "it broke"),
        (OSError(), "OSError"),
        (ValueError(" \n"), "ValueError"),
    ],
)
def test_what_an_error_says_first(error: Exception, line: str) -> None:
    assert first_line(error) == line


def test_a_reranker_made_of_modules_is_read_from_its_folder_alone(tiny_bundle: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_bundle / "reranker", tmp_path / "model"))
    theirs = TheirCrossEncoder(str(folder), device="cpu")
    ours = read_reranker(str(folder))
    ids, pairs = ours.tokenize(TEXTS), np.array([(0, 1), (2, 5), (7, 3), (5, 5)])
    expected = theirs.predict([(TEXTS[query], TEXTS[passage]) for query, passage in pairs])
    np.testing.assert_allclose(ours.score(ids, ids, pairs, precision="fp32"), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "before", "after", "message"),
    [
        ("modules.json", "pooling.Pooling", "lstm.LSTM", "made of Transformer, LSTM, Dense"),
        ("2_Dense/config.json", "linear.Identity", "activation.Tanh", "does not give one linear score"),
        ("1_Pooling/config.json", '"cls"', '["cls", "max"]', r"its pooling \(cls, max\) is not supported"),
        ("config_sentence_transformers.json", "{}", '{"query": "query: "}', "it has prompts"),
    ],
)
def test_a_reranker_of_other_modules_is_refused(
    tiny_bundle: Path, tmp_path: Path, name: str, before: str, after: str, message: str
) -> None:
    folder = Path(shutil.copytree(tiny_bundle / "reranker", tmp_path / "model"))
    text = (folder / name).read_text()
    assert before in text
    (folder / name).write_text(text.replace(before, after))
    with pytest.raises(TandemError, match=message):
        read_reranker(str(folder))


# Both as a bundle


def test_models_of_our_own_keep_what_they_are(tiny_bundle: Path, tmp_path: Path) -> None:
    made = make_bundle(str(tiny_bundle), str(tiny_bundle / "reranker"), tmp_path / "bundle")
    before = Bundle.load(tiny_bundle)
    assert made.retriever.fingerprint() == before.retriever.fingerprint()
    assert made.reranker.fingerprint() == before.reranker.fingerprint()
    assert made.about["reranker"]["pooling"] == before.about["reranker"]["pooling"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"retriever": None}, "its tandem.json does not describe the retriever"),
        ({"retriever": {"poling": "cls"}}, "its poling is 'cls'"),
    ],
)
def test_a_manifest_that_does_not_describe_the_model_is_refused(
    tiny_bundle: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    copy = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    about = json.loads((copy / "tandem.json").read_text()) | change
    (copy / "tandem.json").write_text(json.dumps({name: value for name, value in about.items() if value is not None}))
    with pytest.raises(TandemError, match=f"cannot be read exactly: {message}"):
        read_retriever(str(copy))
    assert read_reranker(str(copy)).config.pair_length > 0


def test_with_data_the_pair_is_measured_and_learns(tiny_bundle: Path, tiny_dataset: Path, tmp_path: Path) -> None:
    made = make_bundle(str(tiny_bundle), str(tiny_bundle), tmp_path / "bundle", tiny_dataset, "dev", 10)
    learnt = Learnt.of(Bundle.load(made.folder))
    assert learnt.blend == made.about["blend"] and {"fusion", "confidence", "stopping"} <= made.about.keys()
    assert made.about["metrics"]["split"] == "dev" and made.about["metrics"]["depth"] == 10


def test_a_bundle_behind_a_link_is_replaced_where_it_lies(tiny_bundle: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "disk" / "bundle")
    for _ in range(2):
        make_bundle(str(tiny_bundle), str(tiny_bundle), link)
    assert link.is_symlink() and Bundle.load(tmp_path / "disk" / "bundle").fingerprint
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_folder_of_something_else_is_not_replaced(tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(TandemError, match="exists and is not a bundle"):
        make_bundle(str(tiny_bundle), str(tiny_bundle), tmp_path)
