"""ONNX: what is written gives what torch and sentence-transformers give, or is refused; what is read is exact."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from test_bundle import TEXTS, reranker, retriever
from test_foreign import classifier
from transformers import AutoModel, AutoModelForSequenceClassification
from typer.testing import CliRunner

from tandemqa.cli import app
from tandemqa.encoders import onnx_export
from tandemqa.encoders.bundle import Bundle, save_bundle
from tandemqa.encoders.dual import Tower
from tandemqa.encoders.foreign import read_reranker, read_retriever
from tandemqa.encoders.onnx_export import INT8_GRAPH, Traceable, check_graph, export, quantise
from tandemqa.encoders.onnx_graph import GRAPH, INPUTS, padded, tensors
from tandemqa.encoders.packed import packed
from tandemqa.encoders.quantised import has_vnni
from tandemqa.errors import TandemError

PAIRS = [(query, passage) for query in range(len(TEXTS)) for passage in range(len(TEXTS))]
INTERPRETER = os.environ.get("SENTENCE_TRANSFORMERS_ONNX")

# Read with sentence-transformers and ONNX Runtime in an interpreter that has optimum-onnx.
READER = """
import json, sys
import numpy as np
from sentence_transformers import CrossEncoder, SentenceTransformer
folder, texts, pairs, file_name = json.loads(sys.stdin.read())
options = {"backend": "onnx", "device": "cpu", "model_kwargs": {"file_name": file_name}}
retriever = SentenceTransformer(folder + "/retriever", **options)
reranker = CrossEncoder(folder + "/reranker", **options)
np.savez(
    folder + ".npz",
    queries=retriever.encode_query(texts),
    passages=retriever.encode_document(texts),
    scores=reranker.predict([(texts[query], texts[passage]) for query, passage in pairs]),
)
"""

needs_vnni = pytest.mark.skipif(not has_vnni(), reason="this processor has no AVX512-VNNI")

needs_interpreter = pytest.mark.skipif(
    not INTERPRETER, reason="SENTENCE_TRANSFORMERS_ONNX names no Python with sentence-transformers and optimum-onnx"
)


@pytest.fixture(scope="module")
def bundle(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Two towers of unequal weights, and a re-ranker far from its start."""
    folder = tmp_path_factory.mktemp("onnx") / "bundle"
    untied = retriever(tiny_model, towers="untied", query_length=32)
    save_bundle(folder, untied, reranker(tiny_model, pooling="mean"), {})
    return Bundle.load(folder)


@pytest.fixture(scope="module")
def exported(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(bundle, tmp_path_factory.mktemp("onnx") / "out", int8=has_vnni()).folder


def vectors_of(ours: Bundle) -> dict[str, Any]:
    ids = ours.retriever.tokenize(TEXTS)
    return {
        "queries": ours.retriever.encode(ids, "query", precision="fp32"),
        "passages": ours.retriever.encode(ids, "passage", precision="fp32"),
        "scores": ours.reranker.score(ids, ids, np.array(PAIRS), precision="fp32"),
    }


def states_of(graph: Path, batch: Any) -> Any:
    session = onnxruntime.InferenceSession(graph)
    names = [each.name for each in session.get_inputs()]
    feed = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "token_type_ids": batch.type_ids}
    return session.run(["last_hidden_state"], {name: feed[name].numpy() for name in names})[0]


# What is written


def test_the_graphs_give_the_vectors_and_scores_of_the_bundle(bundle: Bundle, exported: Path) -> None:
    """By ONNX Runtime on padded batches of all texts, pooled by hand in float64."""
    expected = vectors_of(bundle)
    ours = bundle.retriever
    ids = ours.tokenize(TEXTS)
    sides: dict[Tower, tuple[str, str]] = {
        "query": ("queries", "query_0_Transformer"),
        "passage": ("passages", "document_0_Transformer"),
    }
    for tower, (kind, folder) in sides.items():
        batch = ours.format.pad([ours.frame(each, tower) for each in ids])
        states = states_of(exported / "retriever" / folder / GRAPH, batch).astype(np.float64)
        mask = batch.attention_mask.numpy()[:, :, None]
        means = (states * mask).sum(1) / mask.sum(1)
        np.testing.assert_allclose(means / np.linalg.norm(means, axis=1, keepdims=True), expected[kind], atol=1e-5)
    framed = [bundle.reranker.frame(ids[query], ids[passage]) for query, passage in PAIRS]
    batch = bundle.reranker.format.pad([pair for pair, _ in framed], [start for _, start in framed])
    states = states_of(exported / "reranker" / GRAPH, batch).astype(np.float64)
    mask = batch.attention_mask.numpy()[:, :, None]
    means = (states * mask).sum(1) / mask.sum(1)
    head = bundle.reranker.head
    scores = means @ head.weight.detach().double().numpy()[0] + float(head.bias.detach())
    np.testing.assert_allclose(scores, expected["scores"], atol=1e-4)


def test_an_export_holds_no_other_weights_of_the_encoders(exported: Path) -> None:
    weights = sorted(str(path.relative_to(exported)) for path in exported.rglob("*.safetensors"))
    assert weights == ["reranker/2_Dense/model.safetensors"]
    for folder in ("retriever/query_0_Transformer", "retriever/document_0_Transformer", "reranker"):
        onnx.checker.check_model(exported / folder / GRAPH)
        assert {"config.json", "tokenizer.json"} <= {path.name for path in (exported / folder).iterdir()}


@needs_vnni
def test_the_graph_in_int8_is_smaller_and_gives_nearly_the_same_states(bundle: Bundle, exported: Path) -> None:
    ours = bundle.retriever
    batch = ours.format.pad([ours.frame(each, "passage") for each in ours.tokenize(TEXTS)])
    folder = exported / "retriever" / "document_0_Transformer"
    exact, found = states_of(folder / GRAPH, batch), states_of(folder / INT8_GRAPH, batch)
    real = batch.attention_mask.numpy() == 1
    cosines = torch.nn.functional.cosine_similarity(torch.from_numpy(exact[real]), torch.from_numpy(found[real]))
    assert cosines.min() > 0.98
    assert np.abs(exact - found)[real].max() > 1e-4, "this was not computed in bytes"
    products = [node.op_type for node in onnx.load(folder / INT8_GRAPH).graph.node if "MatMul" in node.op_type]
    assert len(products) == 16 and products.count("MatMul") == 4, "all but those of attention"


@needs_vnni
def test_a_calibrated_bundle_is_exported_in_the_bytes_that_it_computes_in(bundle: Bundle, tmp_path: Path) -> None:
    """Standard operators of static quantisation: the states of our own products in bytes, but for rounding."""
    calibrated = Bundle.load(shutil.copytree(bundle.folder, tmp_path / "bundle"))
    calibrated.calibrate([], [text for text in TEXTS if text])
    out = export(calibrated, tmp_path / "out", int8=True).folder
    ours = calibrated.retriever
    batch = ours.format.pad([ours.frame(each, "passage") for each in ours.tokenize(TEXTS)])
    folder, real = out / "retriever" / "document_0_Transformer", batch.attention_mask == 1
    exact, found = (torch.from_numpy(states_of(folder / name, batch))[real] for name in (GRAPH, INT8_GRAPH))
    # With attention in float32, as in the graph: bfloat16 differs from that as much as bytes do.
    own = packed(ours.passage_tower, torch.float32, ours.ranges["passage"])(batch)[real]
    distance = (found - exact).norm(dim=-1).mean()
    assert distance > 1e-3 and (found - own).norm(dim=-1).mean() < distance / 3
    assert torch.nn.functional.cosine_similarity(found, exact).min() > 0.98
    graph = onnx.load(folder / INT8_GRAPH).graph
    products = [node.op_type for node in graph.node]
    assert products.count("QuantizeLinear") == 8 and products.count("DequantizeLinear") == 16
    assert sum(each.data_type == onnx.TensorProto.INT8 and len(each.dims) == 2 for each in graph.initializer) == 8


def test_a_graph_that_pays_no_heed_to_the_mask_is_refused(tiny_model: Path, exported: Path, tmp_path: Path) -> None:
    """As one is that was traced on a batch without padding by an exporter that folds the mask away."""
    encoder = retriever(tiny_model).query_tower
    graph = tmp_path / "model.onnx"
    onnx_export.write_graph(Traceable(encoder), encoder, graph, has_types=True)
    assert check_graph(Traceable(encoder), graph) < 1e-5
    model = onnx.load(graph)
    for node in model.graph.node:
        for place, name in enumerate(node.input):
            if name == "attention_mask":
                node.input[place] = "ones"
    ones = onnx.helper.make_node("Add", ["token_type_ids", "one"], ["raised"])
    clipped = onnx.helper.make_node("Min", ["raised", "one"], ["ones"])
    model.graph.node.insert(0, clipped)
    model.graph.node.insert(0, ones)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(1), "one"))
    onnx.save(model, graph)
    with pytest.raises(TandemError, match="gives other states than torch"):
        check_graph(Traceable(encoder), graph)


def test_what_torch_cannot_write_is_one_sentence(tiny_bundle: Path, tmp_path: Path, monkeypatch: Any) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise torch.onnx.errors.OnnxExporterError("it broke.\nAnd so on.")

    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(
        TandemError, match=r"^torch cannot write a BertModel as ONNX \(it broke\); leave it in torch\.$"
    ):
        export(tiny_bundle, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_only_an_earlier_export_is_replaced(tiny_bundle: Path, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    for place in (tmp_path, tiny_bundle):
        with pytest.raises(TandemError, match="exists and is no earlier export"):
            export(tiny_bundle, place)
    earlier = tmp_path / "out" / "reranker" / GRAPH
    earlier.parent.mkdir(parents=True)
    earlier.write_text("")
    monkeypatch.setattr(onnx_export, "write_graph", lambda states, encoder, path, has_types: path.parent.mkdir())
    monkeypatch.setattr(onnx_export, "check_graph", lambda states, path: 0.0)
    export(tiny_bundle, tmp_path / "out")
    assert not earlier.exists() and (tmp_path / "out" / "retriever" / "modules.json").exists()


def test_a_missing_package_and_a_missing_instruction_are_one_sentence(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(onnx_export, "has_vnni", lambda: False)
        with pytest.raises(TandemError, match="lacks AVX512-VNNI"):
            export(tiny_bundle, tmp_path / "out", int8=True)
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    found = CliRunner().invoke(app, ["export", str(tiny_bundle), str(tmp_path / "out")])
    assert found.exit_code == 2
    assert "Exporting a bundle needs the package onnxscript" in found.output
    assert "pip install 'tandemqa[onnx]'" in found.output


@needs_interpreter
@pytest.mark.parametrize("file_name", [GRAPH, pytest.param(INT8_GRAPH, marks=needs_vnni)])
def test_sentence_transformers_gives_the_vectors_and_scores_of_the_bundle(
    bundle: Bundle, exported: Path, file_name: str
) -> None:
    expected = vectors_of(bundle)
    asked = json.dumps([str(exported), TEXTS, PAIRS, file_name])
    assert INTERPRETER
    subprocess.run([INTERPRETER, "-c", READER], input=asked, text=True, check=True, capture_output=True)
    found = np.load(f"{exported}.npz")
    if file_name == GRAPH:
        for name, values in expected.items():
            np.testing.assert_allclose(found[name], values, atol=1e-4)
    else:
        for name in ("queries", "passages"):
            assert np.sum(found[name] * expected[name], axis=1).min() > 0.98
        assert np.corrcoef(found["scores"], expected["scores"])[0, 1] > 0.98


# What is read


class Classifier(torch.nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Any, attention_mask: Any, token_type_ids: Any = None) -> Any:
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        return self.model(input_ids=input_ids, attention_mask=attention_mask, **types).logits


def as_graph_alone(folder: Path, **options: Any) -> Path:
    """A folder's classifier, all weights changed, with an ONNX graph by torch in the place of safetensors."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    torch.manual_seed(6)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder / "exact")
    batch = tensors(padded(model.config, 3, 11, has_types=model.config.model_type in ("bert", "electra")))
    names = list(INPUTS[: len(batch)])
    if options["dynamo"]:
        options["dynamic_shapes"] = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("length")},) * len(batch)
        options["external_data"] = False
    else:
        options["dynamic_axes"] = {name: {0: "batch", 1: "length"} for name in names}
    (folder / GRAPH).parent.mkdir()
    with onnx_export._quiet():
        torch.onnx.export(
            Classifier(model), batch, folder / GRAPH, input_names=names, output_names=["logits"], **options
        )
    (folder / "model.safetensors").unlink()
    return folder


def equal_weights(read: Any, folder: Path) -> None:
    """The encoder's parameters are those that were exported, to the last bit."""
    exact = AutoModel.from_pretrained(folder).state_dict()
    for name, parameter in read.encoder.state_dict().items():
        if "pooler" not in name:
            torch.testing.assert_close(parameter, exact[name], atol=0, rtol=0)


def test_an_export_is_read_back_exactly(tiny_bundle: Path, tmp_path: Path) -> None:
    """Of these models many parameters are equal, of which the graph keeps one."""
    out = export(tiny_bundle, tmp_path / "out").folder
    before = Bundle.load(tiny_bundle)
    tower, encoder = read_retriever(str(out / "retriever")), read_reranker(str(out / "reranker"))
    expected = vectors_of(before)
    for read, own in (
        (tower.query_tower, before.retriever.query_tower),
        (encoder.encoder, before.reranker.encoder),
        (encoder.head, before.reranker.head),
    ):
        for name, parameter in read.state_dict().items():
            if "pooler" not in name:
                torch.testing.assert_close(parameter, own.state_dict()[name], atol=0, rtol=0)
    found = vectors_of(Bundle(out, tower, encoder))
    assert encoder.config.pooling == before.reranker.config.pooling
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, atol=1e-5)


KINDS = ("bert", "roberta", "xlm-roberta", "electra", "distilbert")
OLDER = [(kind, {"dynamo": False, "opset_version": opset}) for kind in KINDS for opset in (14, 17)]
NEWER = [(kind, {"dynamo": True, "verbose": False}) for kind in KINDS[:2]]


@pytest.mark.parametrize(("kind", "options"), OLDER + NEWER)
def test_graphs_of_either_exporter_of_torch_are_read_exactly(
    kind: str, options: dict[str, Any], tiny_model: Path, bpe: Any, tmp_path: Path
) -> None:
    """Optimum uses the older one; in opset 14 a LayerNorm is in pieces."""
    folder = as_graph_alone(classifier(kind, tiny_model, bpe, tmp_path / "model"), **options)
    equal_weights(read_reranker(str(folder)), folder / "exact")


@pytest.fixture
def graph_alone(tiny_model: Path, bpe: Any, tmp_path: Path) -> Path:
    return as_graph_alone(classifier("bert", tiny_model, bpe, tmp_path / "model"), dynamo=False, opset_version=17)


def test_where_nodes_do_not_tell_their_module_the_names_of_parameters_do(graph_alone: Path) -> None:
    """As in graphs of torch before 1.13."""
    model = onnx.load(graph_alone / GRAPH)
    for number, node in enumerate(model.graph.node):
        node.name = f"{node.op_type}_{number}"
    onnx.save(model, graph_alone / GRAPH)
    equal_weights(read_reranker(str(graph_alone)), graph_alone / "exact")


def test_weights_beside_the_graph_are_read(graph_alone: Path) -> None:
    model = onnx.load(graph_alone / GRAPH)
    onnx.save(model, graph_alone / GRAPH, save_as_external_data=True, location="model.onnx_data", size_threshold=0)
    assert (graph_alone / GRAPH).stat().st_size < (graph_alone / f"{GRAPH}_data").stat().st_size
    equal_weights(read_reranker(str(graph_alone)), graph_alone / "exact")
    (graph_alone / f"{GRAPH}_data").unlink()
    with pytest.raises(TandemError, match="is damaged"):
        read_reranker(str(graph_alone))


def test_quantised_weights_are_refused(graph_alone: Path) -> None:
    quantise(graph_alone / GRAPH, graph_alone / INT8_GRAPH)
    (graph_alone / GRAPH).unlink()
    with pytest.raises(TandemError, match=f"{INT8_GRAPH} holds quantised weights, .* give the float model"):
        read_reranker(str(graph_alone))


def test_a_graph_that_computes_something_else_is_refused(graph_alone: Path) -> None:
    """All parameters are there, but attention is not BERT's."""
    model = onnx.load(graph_alone / GRAPH)
    softmax = next(node for node in model.graph.node if node.op_type == "Softmax")
    softmax.op_type = "Hardmax"
    onnx.save(model, graph_alone / GRAPH)
    with pytest.raises(TandemError, match="cannot be read exactly: with its weights torch gives other values"):
        read_reranker(str(graph_alone))


def test_a_graph_without_a_parameter_or_of_another_precision_is_refused(graph_alone: Path) -> None:
    model = onnx.load(graph_alone / GRAPH)
    node = next(node for node in model.graph.node if node.name == "/model/bert/encoder/layer.1/output/dense/MatMul")
    weight = next(each for each in model.graph.initializer if each.name == node.input[1])
    half = onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight).astype(np.float16), weight.name)
    weight.CopyFrom(half)
    onnx.save(model, graph_alone / GRAPH)
    with pytest.raises(TandemError, match=r"bert\.encoder\.layer\.1\.output\.dense\.weight is not in it as float32"):
        read_reranker(str(graph_alone))


def test_a_damaged_graph_is_one_sentence(graph_alone: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    (graph_alone / GRAPH).write_bytes(b"\x07" * 100)
    command = ["bundle", "--retriever", str(tiny_bundle), "--reranker", str(graph_alone)]
    found = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "bundle")])
    assert found.exit_code == 2 and "is damaged" in found.output
    assert not (tmp_path / "bundle").exists()


def test_safetensors_come_first(graph_alone: Path) -> None:
    shutil.copy(graph_alone / "exact" / "model.safetensors", graph_alone)
    (graph_alone / GRAPH).write_bytes(b"no graph")
    equal_weights(read_reranker(str(graph_alone)), graph_alone / "exact")


WRITER = """
import sys
from optimum.onnxruntime import ORTModelForFeatureExtraction
ORTModelForFeatureExtraction.from_pretrained(sys.argv[1], export=True).save_pretrained(sys.argv[1] + "/onnx")
"""


@needs_interpreter
def test_graphs_of_optimum_are_read_exactly(tiny_model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    assert INTERPRETER
    subprocess.run([INTERPRETER, "-c", WRITER, str(folder)], check=True, capture_output=True)
    (folder / "model.safetensors").unlink()
    found, exact = read_retriever(str(folder)), read_retriever(str(tiny_model))
    ids = exact.tokenize(TEXTS)
    expected = exact.encode(ids, "passage", precision="fp32")
    np.testing.assert_allclose(found.encode(ids, "passage", precision="fp32"), expected, atol=1e-6)
