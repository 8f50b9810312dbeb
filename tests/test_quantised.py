"""Products in bytes are those of float64 on the same bytes; the encoder made of them is nearly the one in float32."""

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_bundle import reranker, retriever
from test_packed import KIN, batch_of, bert, roberta

from tandemqa.data.dataset import load_dataset
from tandemqa.encoders import backbone
from tandemqa.encoders.backbone import for_inference, hidden_states
from tandemqa.encoders.bundle import Bundle, save_bundle
from tandemqa.encoders.calibration import RANGES
from tandemqa.encoders.cross import CrossEncoder
from tandemqa.encoders.dense import Dense
from tandemqa.encoders.dual import DualEncoder
from tandemqa.encoders.inputs import TokenBatch
from tandemqa.encoders.packed import NEVER, Attention, fused, packed, unfused
from tandemqa.encoders.quantised import (
    Int8Feedforward,
    Int8Linear,
    SmoothedLinear,
    has_int8,
    has_vnni,
    measure_ranges,
)
from tandemqa.errors import TandemError
from tandemqa.index import build
from tandemqa.index.index import Index
from tandemqa.search.searcher import Searcher

needs_int8 = pytest.mark.skipif(not has_int8(), reason="this processor has no AVX2")


def activations(rows: int, size: int) -> torch.Tensor:
    """Unequal channels, one of them far off."""
    torch.manual_seed(2)
    x = torch.randn(rows, size) * torch.linspace(0.1, 2, size) + torch.randn(size)
    x[:, 3] = 20 + 8 * torch.rand(rows)
    return x


def range_of(x: torch.Tensor) -> torch.Tensor:
    return torch.stack([x.amin(0), x.amax(0)])


@pytest.fixture(
    params=[
        64,
        pytest.param(127, marks=pytest.mark.skipif(not has_vnni(), reason="this processor has no AVX512-VNNI")),
    ]
)
def most(request: Any, monkeypatch: pytest.MonkeyPatch) -> int:
    """The largest byte of a weight: without VNNI, whose products are right with it too, and with it."""
    monkeypatch.setattr("tandemqa.encoders.quantised.has_vnni", lambda: request.param == 127)
    return int(request.param)


def by_hand(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, ranges: torch.Tensor, most: int
) -> torch.Tensor:
    """The product of quantised activations and weights in float64: SmoothQuant with alpha 0.8 on centred channels."""
    x, weight, (low, high) = x.double(), weight.double(), ranges.double()
    middle, half = (low + high) / 2, (high - low) / 2
    factor = half**0.8 / weight.abs().amax(0) ** 0.2
    step = factor * (half / factor).max() / 127
    q = ((x - middle) / step).round().clamp(-128, 127)
    smoothed = weight * step
    scale = smoothed.abs().amax(1, keepdim=True) / most
    return q @ ((smoothed / scale).round() * scale).T + weight @ middle + bias.double()


@needs_int8
def test_a_product_is_that_of_its_bytes(most: int) -> None:
    x, weight, bias = activations(40, 24), torch.randn(16, 24), torch.randn(16)
    linear = SmoothedLinear(weight, bias, range_of(x))
    found, expected = linear(x, torch.float32).double(), by_hand(x, weight, bias, range_of(x), most)
    # A byte on the edge of two may fall to either side; nearly none does.
    assert ((found - expected).abs() < 1e-4).double().mean() > 0.95
    exact = x.double() @ weight.double().T + bias.double()
    assert (found - exact).norm() < 0.02 * (exact - exact.mean(0)).norm()


@needs_int8
@pytest.mark.usefixtures("most")
@pytest.mark.parametrize("byte", [0, 255])
@pytest.mark.parametrize("zero", [0, 128])
def test_the_largest_bytes_do_not_overflow(byte: int, zero: int) -> None:
    weight = torch.ones(16, 64) * torch.tensor([1.0, -1.0]).repeat(8)[:, None]
    linear = Int8Linear(weight, torch.zeros(16), torch.ones(64), torch.zeros(64), zero)
    found = linear(torch.full((32, 64), byte, dtype=torch.uint8), torch.float32)
    torch.testing.assert_close(found, (64 * (byte - zero) * weight[:, 0]).expand(32, 16), rtol=1e-6, atol=0)


@needs_int8
def test_what_lies_beyond_the_ranges_is_cut_off() -> None:
    x, weight, bias = activations(40, 24), torch.randn(16, 24), torch.zeros(16)
    ranges = range_of(x)
    linear = SmoothedLinear(weight, bias, ranges)
    beyond = linear.bytes_of(x * 1000)
    assert set(beyond[:, 3].tolist()) == {255}
    assert beyond.dtype == torch.uint8


@needs_int8
@pytest.mark.parametrize("variant", ["none", "tanh"])
def test_neurons_that_reach_far_do_not_spoil_the_rest(variant: str) -> None:
    torch.manual_seed(3)
    widen, narrow = torch.nn.Linear(24, 192), torch.nn.Linear(192, 24)
    x = torch.randn(400, 24)
    with torch.no_grad():
        widen.weight[5] *= 40  # reaches about 60, the others about 2
        wide = torch.nn.functional.gelu(widen(x), approximate="tanh" if variant == "tanh" else "none")
        exact = narrow(wide)
        assert wide[:, 5].max() > 10 * wide[:, 6:].max()
        feedforward = Int8Feedforward(widen, narrow, range_of(x), range_of(wide), variant)
        error = (feedforward(x) - exact).square().mean().sqrt()
        # The error of one step for all: rounding is uniform in a step, and each output sums 192 weights of the size
        # 1 / sqrt(3 · 192), so the error is step / sqrt(12) / sqrt(3).
        of_one_step = wide.max() / 255 / 6
    assert error < of_one_step / 2


def measured(model: Any, batch: TokenBatch) -> dict[str, torch.Tensor]:
    return measure_ranges(model, [batch], hidden_states)


def test_ranges_are_those_of_real_tokens() -> None:
    model, batch = bert(), batch_of([9, 4, 6])
    ranges = measured(model, batch)
    assert ranges.keys() == {f"{n}.{name}" for n in range(3) for name in ("read", "gather", "widen", "narrow")}
    states = model(
        batch.input_ids, batch.attention_mask, batch.type_ids, output_hidden_states=True
    ).hidden_states  # what each layer reads
    real = batch.attention_mask == 1
    for number in range(3):
        torch.testing.assert_close(ranges[f"{number}.read"], range_of(states[number][real].detach()))
    assert all(not layer._forward_pre_hooks for layer in model.modules())


@needs_int8
@pytest.mark.parametrize("kind", ["bert", "roberta", "xlm-roberta", "camembert"])
@torch.no_grad()
def test_states_differ_by_rounding_to_bytes_alone(kind: str) -> None:
    model = bert() if kind == "bert" else roberta(kind)
    batch = batch_of([9, 4, 6], types=kind == "bert")
    real = batch.attention_mask == 1
    expected = hidden_states(model, batch)[real]
    found = packed(model, torch.float32, measured(model, batch))(batch)[real]
    # Each of three layers adds four roundings to about 1/127 of a range.
    assert torch.nn.functional.cosine_similarity(found, expected).min() > 0.99
    assert (found - expected).abs().max() > 1e-4, "this was not computed in bytes"


@needs_int8
@torch.no_grad()
def test_changed_weights_are_packed_anew() -> None:
    model, batch = bert(), batch_of([9, 4])
    ranges = measured(model, batch)
    encoder = packed(model, torch.float32, ranges)
    assert packed(model, torch.float32, ranges) is encoder
    before = encoder(batch)
    model.encoder.layer[2].output.LayerNorm.bias.add_(1.0)
    after = packed(model, torch.float32, ranges)
    assert after is not encoder
    torch.testing.assert_close(after(batch)[0], before[0] + 1.0, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", [fused, unfused])
@pytest.mark.parametrize("far", [0.0, 300.0, -300.0])
@pytest.mark.parametrize("padded", [False, True])
def test_attention_is_exact_whatever_the_scores(form: Attention, far: float, padded: bool) -> None:
    torch.manual_seed(4)
    query, key, value = torch.randn(3, 3, 2, 5, 8)
    query[..., 0], key[..., 0] = 1.0, far + torch.randn(3, 2, 5)  # moves all scores of a row by about the same
    real = torch.ones(3, 1, 1, 5, dtype=torch.bool)
    real[1, ..., 3:] = real[2, ..., 1:] = not padded
    read = torch.stack([query, key, value]).permute(1, 3, 0, 2, 4).reshape(15, 48)
    scores = ((query.double() @ key.double().mT) * np.log(2)).masked_fill(~real, -np.inf)
    expected = (scores.softmax(-1) @ value.double()).transpose(1, 2).reshape(15, 16)
    mask = torch.where(real, 0.0, NEVER).expand(3, 2, 1, 5).reshape(6, 1, 5) if padded else None
    found = form(read, 3, 2, mask)
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=1e-4)


def test_what_int8_is_not_made_for_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TandemError, match="which this is not"):
        for_inference(bert(hidden_act="relu"), "int8", {})
    monkeypatch.setattr("tandemqa.encoders.backbone.has_int8", lambda: False)
    with pytest.raises(TandemError, match="AVX2 and later"):
        for_inference(bert(), "int8", {})


@needs_int8
def test_a_model_that_was_not_calibrated_is_refused(tiny_bundle: Path) -> None:
    bundle = Bundle.load(tiny_bundle)
    with pytest.raises(TandemError, match="holds no int8"):
        bundle.at("int8")
    with pytest.raises(TandemError, match="not calibrated"):
        bundle.retriever.encode(bundle.retriever.tokenize(["owls"]), "query", precision="int8")


def pair(kind: str, model: Path, bpe: Any, folder: Path) -> tuple[DualEncoder, CrossEncoder]:
    """Two models of this kind with random weights."""
    if kind in KIN:
        make, config = KIN[kind]
        torch.manual_seed(6)
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
        encoder = make(config(vocab_size=len(bpe), initializer_range=0.3, max_position_embeddings=514, **sizes))
        encoder.save_pretrained(folder)
        bpe.save_pretrained(folder)
        model = folder
    both = retriever(model, towers="untied" if kind == "untied" else "shared"), reranker(model)
    if kind == "dense":
        for encoder in both:
            encoder.dense.append(Dense(torch.nn.Linear(32, 32), "tanh"))
    return both


@needs_int8
@pytest.mark.parametrize("kind", ["untied", "dense", *KIN])
def test_every_kind_of_pair_computes_in_bytes(
    kind: str, tiny_model: Path, bpe: Any, tiny_dataset: Path, tmp_path: Path
) -> None:
    made = save_bundle(tmp_path / "bundle", *pair(kind, tiny_model, bpe, tmp_path / "model"), {})
    index = Index.build(made.folder, tiny_dataset, tmp_path / "index", precision="int8")
    dataset, bundle = load_dataset(tiny_dataset), Bundle.load(made.folder)
    texts, questions = [passage.full for passage in dataset.passages], list(dataset.queries.values())
    sides: dict[Any, Any] = {"passage": texts, "query": questions}
    exact = {
        side: bundle.retriever.encode(bundle.retriever.tokenize(sides[side]), side, precision="fp32")
        for side in sides
    }
    # What is kept of the ranges is what was measured: what is read again computes what the index holds.
    in_bytes = bundle.at("int8").retriever
    found = {side: in_bytes.encode(in_bytes.tokenize(sides[side]), side) for side in sides}
    np.testing.assert_allclose(index.vectors_of(index.rows), found["passage"], atol=1e-3)
    for side in sides:
        assert np.sum(found[side] * exact[side], axis=1).min() > 0.97
        assert np.abs(found[side] - exact[side]).max() > 1e-3, "this was not computed in bytes"
    same = all(
        torch.equal(low, high) for low, high in zip(*(r.values() for r in in_bytes.ranges.values()), strict=True)
    )
    assert same == (kind != "untied")
    pairs: Any = np.array([(number, row) for number in range(8) for row in range(40)])
    ids = bundle.reranker.tokenize(questions), bundle.reranker.tokenize(texts)
    scores, rounded = (bundle.reranker.score(*ids, pairs, precision=precision) for precision in ("fp32", "int8"))
    assert np.corrcoef(scores, rounded)[0, 1] > 0.98 and np.abs(scores - rounded).max() > 1e-3
    assert len(Searcher(index).search("why do prices rise")) == 5


@needs_int8
def test_an_index_remembers_its_precision_and_the_bundle_its_ranges(
    tiny_bundle: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, folder)
    early = Bundle.load(folder)
    index = Index.build(folder, tiny_dataset, tmp_path / "index", precision="int8")
    assert (folder / RANGES).exists()
    assert index.load_bundle(early).calibration == index.about["calibration"]
    searcher = Searcher(index)
    assert (searcher.bundle.retriever.precision, searcher.bundle.reranker.precision) == ("int8", "int8")
    assert searcher.search("why do prices rise").hits
    # The vectors of the index are those of the same bytes, and near those of float32.
    texts = [passage.full for passage in load_dataset(tiny_dataset).passages]
    retriever = Bundle.load(folder).retriever
    ids = retriever.tokenize(texts)
    stored = index.vectors_of(index.rows)
    np.testing.assert_allclose(stored, retriever.encode(ids, "passage", precision="int8"), atol=1e-3)
    exact = retriever.encode(ids, "passage", precision="fp32")
    assert np.sum(stored * exact, axis=1).min() > 0.98
    assert np.abs(stored - exact).max() > 2e-3
    added = index.add([{"_id": "new", "title": "", "text": texts[0]}])
    np.testing.assert_allclose(added.vectors_of(added.rows)[-1], stored[0], atol=1e-3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backbone, "has_int8", lambda: False)
        with pytest.raises(TandemError, match=r"was built with int8\. This processor .* Or build it again"):
            index.load_bundle()
    Bundle.load(folder).calibrate([], texts[:3])
    with pytest.raises(TandemError, match=r"int8\.safetensors .* made anew; build it again: .* --precision int8$"):
        index.load_bundle()
    (folder / "int8.safetensors").unlink()
    with pytest.raises(TandemError, match=r"int8\.safetensors .* is gone; build it again: .* --precision int8$"):
        index.load_bundle()


@needs_int8
def test_two_first_builds_at_once_share_their_ranges(
    tiny_bundle: Path, tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, folder)
    data = tmp_path / "data"
    data.mkdir()
    (data / "corpus.jsonl").write_text('{"_id": "only", "text": "Ranges of these words are others."}\n')
    both, texts, read = threading.Barrier(2, timeout=2), build._texts, []

    def slow(folder: Path) -> tuple[list[str], list[str]]:
        """Texts to calibrate on, once both builds want some, or one alone has waited for the other."""
        read.append(folder)
        with suppress(threading.BrokenBarrierError):
            both.wait()
        return texts(folder)

    monkeypatch.setattr(build, "_texts", slow)
    with ThreadPoolExecutor(2) as pool:
        builds = [
            pool.submit(Index.build, folder, corpus, tmp_path / f"index-{number}", precision="int8")
            for number, corpus in enumerate((tiny_dataset, data))
        ]
        indexes = [each.result() for each in builds]
    assert len(read) == 1
    for index in indexes:
        assert index.load_bundle().calibration == index.about["calibration"]


@needs_int8
def test_calibrating_needs_no_questions_and_is_read_back(tiny_bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, folder)
    bundle = Bundle.load(folder)
    bundle.calibrate([], ["Basalt is a dark rock.", "Whales breathe air and must come up."])
    again = Bundle.load(folder)
    assert again.at("int8").calibration == bundle.at("int8").calibration is not None
    assert not Bundle.load(tiny_bundle).calibrated
    assert again.calibrated
    pairs: Any = np.array([[0, 0], [1, 1]])
    ids = bundle.reranker.tokenize(["a dark rock", "whales"])
    np.testing.assert_array_equal(
        again.reranker.score(ids, ids, pairs, precision="int8"),
        bundle.reranker.score(ids, ids, pairs, precision="int8"),
    )
    save_file({"reranker.0.read": torch.zeros(2, 32)}, folder / RANGES)
    with pytest.raises(TandemError, match=f"{RANGES} is damaged"):
        Bundle.load(folder)
    (folder / RANGES).write_bytes(b"no such thing")
    with pytest.raises(TandemError, match=f"{RANGES} is damaged"):
        Bundle.load(folder)
