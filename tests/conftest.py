"""A tiny model, a tiny dataset and a tiny bundle, all made here: the tests need no network."""

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# A machine that is busy is no defect.
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")

# The models of the tests are so small that a second thread only costs; set before torch is imported.
os.environ["OMP_NUM_THREADS"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The test that trains a pair comes first: it takes longest, and other processes run the rest beside it."""
    items.sort(key=lambda item: item.path.name != "test_end_to_end.py")


# title, text, and the questions that the passage answers
CORPUS = [
    ("Basalt", "Basalt is a dark rock that forms when lava cools quickly at the surface.",
     ["which stone comes from fast cooling lava"]),
    ("Granite", "Granite cools slowly deep below ground, so its crystals grow large enough to see.",
     ["why can I see crystals in granite"]),
    ("Tides", "The pull of the moon raises the sea twice a day; the sun adds a smaller share.",
     ["what makes the sea rise and fall", "does the sun have a part in tides"]),
    ("Sourdough", "Wild yeast and bacteria live in a starter of flour and water and make the bread rise.",
     ["how does bread rise without bought yeast"]),
    ("", "A knife with a thin edge cuts tomatoes cleanly; a dull one crushes them.",
     ["why does my knife squash tomatoes"]),
    ("Bicycle chain", "A chain wears by stretching; it is worn when twelve links exceed 308 millimetres.",
     ["when should a bike chain be changed"]),
    ("Spoke", "The spokes of a wheel are laced under tension, so the rim hangs from the hub.", []),
    ("Chess opening", "In the Sicilian Defence black answers the king's pawn with that of the queen's bishop.",
     ["how does black reply in the Sicilian"]),
    ("Castling", "The king moves two squares towards a rook, which jumps over it; neither may have moved.",
     ["may I castle after moving my king"]),
    ("Violin", "A violin has four strings tuned in fifths: G, D, A and E.", ["how does one tune a violin"]),
    ("Piano", "Felt hammers strike the strings of a piano; pedals lift the dampers.", ["how do pianos sound"]),
    ("Cello", "The cello sounds an octave below the viola and stands on a spike.", []),
    ("Ants", "Ants lay a trail of scent so that others find the food they have met.", ["how do ants find food"]),
    ("Bees", "A bee tells the direction of flowers by a dance whose angle is measured from the sun.",
     ["what does the dance of a bee mean"]),
    ("Owls", "Soft fringes on the feathers let an owl fly without a sound.", ["why are owls so quiet in flight"]),
    ("Whales", "Whales breathe air and must come up; a sperm whale stays below for an hour.",
     ["how long can a whale stay under water"]),
    ("Camel", "The hump of a camel stores fat, not water.", ["is there water in the hump of a camel"]),
    ("Lighthouse", "A lens of stepped rings sends the light of a small lamp far out over the sea.",
     ["how is a small lamp seen from far away"]),
    ("Suspension bridge", "Two main cables carry the deck and hand its weight to towers and anchors.",
     ["what carries the deck of a suspension bridge"]),
    ("Arch", "Every stone of an arch presses on its neighbours; the keystone closes it.", []),
    ("Glass", "Sand, soda and lime are melted together to make window glass.", ["what is window glass made of"]),
    ("Paper", "Wood is cooked until its fibres part; they are spread on a sieve, pressed and dried.",
     ["how does wood become paper"]),
    ("Ink", "Iron gall ink darkens on the page as it meets the air.", ["why does old ink turn darker"]),
    ("Printing", "Gutenberg cast single letters of metal that could be used again on another page.",
     ["what was new in the printing of Gutenberg"]),
    ("Vaccination", "A harmless part of a germ teaches the body to know the germ before it comes.",
     ["how does a vaccine protect the body"]),
    ("Fever", "A raised temperature slows many germs and hurries the body's defence.", ["what good is a fever"]),
    ("Blood groups", "Red cells carry marks, A, B, both or none, and foreign marks are attacked.",
     ["why must the blood group fit"]),
    ("Insulin", "Insulin lets cells take sugar from the blood.", ["what does insulin do with sugar"]),
    ("Volcano", "Magma that holds much gas bursts out; thin magma flows quietly.", ["why do some volcanoes explode"]),
    ("Earthquake", "Two plates stick, bend and slip at once, and the ground shakes.", ["why does the ground shake"]),
    ("Rainbow", "Drops bend sunlight twice and turn it back once, each colour at its own angle.",
     ["where do the colours of a rainbow come from"]),
    ("Snow", "Crystals of ice grow six arms because water molecules join at that angle.",
     ["why has a snowflake six arms"]),
    ("Café", "The naïve visitor to a Viennese café orders “a coffee”; the waiter asks which of thirty.",
     ["what should I order in Vienna"]),
    ("東京", "東京 (Tokyo) is the capital of Japan; it was called Edo until 1868.", ["what was Tokyo called before"]),
    ("Parliament", "A bill is read three times before the house votes on it.", ["how often is a bill read"]),
    ("Inflation", "When more money chases the same goods, prices rise.", ["why do prices rise"]),
    ("Compound interest", "Interest that is left in the account earns interest of its own.",
     ["why does money in the bank grow faster and faster"]),
    ("Sorting", "Merge sort cuts a list in halves, sorts each and joins them in order.", ["how do I sort a list"]),
    ("Hash table", "A hash table finds a key in constant time by computing its place.", ["what finds a key fast"]),
    ("Recursion", "A function that calls itself needs a case in which it does not. " * 40,
     ["when does a function stop calling itself"]),
]  # fmt: skip
QUERIES = [(text, row) for row, (_, _, questions) in enumerate(CORPUS) for text in questions]

# Every stage there is, on a corpus of forty passages.
WHOLE = [
    "data.questions=12",
    "data.unlabelled=6",
    "warm_retriever.epochs=1",
    "warm_retriever.batch_lists=4",
    "warm_retriever.negatives=bm25",
    "warm_retriever.retriever_rate=0.00003",
    "mine.depth=20",
    "mine.source=fused",
    "warm_lists.size=3",
    "warm_lists.depth=20",
    "warm_reranker.epochs=3",
    "warm_reranker.batch_lists=4",
    "lists.size=4",
    "lists.depth=20",
    "lists.denoised_share=0.5",
    "lists.thresholds=quantile",
    "lists.low=0.5",
    "joint.batch_lists=4",
    "joint.validate_steps=3",
    "joint.patience=2",
    "joint.validation_questions=6",
    "joint.validation_passages=30",
    "refresh_steps=2",
    "rounds=2",
    "evaluation.depth=10",
]


@pytest.fixture(scope="session", autouse=True)
def surroundings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or fills the user's cache, or asks a hub."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TANDEMQA_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of two layers, 32 wide, with random weights and a WordPiece vocabulary that knows the tiny texts."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizer

    text = " ".join([f"{title} {text}" for title, text, _ in CORPUS] + [text for text, _ in QUERIES]).lower()
    letters = sorted(set(text) - {" "})
    words = sorted(set(re.findall(r"[a-z]{2,}", text)))[::2]  # the other half is cut into pieces
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters), *words]
    folder = tmp_path_factory.mktemp("tiny") / "model"
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokens),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        initializer_range=0.2,  # at the usual 0.02 all texts would have nearly the same vector
    )
    BertModel(config).save_pretrained(folder)
    BertTokenizer(vocab={token: number for number, token in enumerate(tokens)}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def bpe() -> Any:
    """A byte-level tokeniser as RoBERTa's, trained on the tiny texts."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import RobertaTokenizer

    trained = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trained.train_from_iterator([text for _, text, _ in CORPUS], vocab_size=400, special_tokens=special)
    state = json.loads(trained.to_str())["model"]
    return RobertaTokenizer(vocab=state["vocab"], merges=[tuple(pair) for pair in state["merges"]])


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 passages and 38 questions in BEIR layout: of five, three to train on, one for dev, one for test."""
    folder = tmp_path_factory.mktemp("tiny") / "dataset"
    (folder / "qrels").mkdir(parents=True)
    with (folder / "corpus.jsonl").open("w", encoding="utf-8") as file:
        for row, (title, text, _) in enumerate(CORPUS):
            file.write(json.dumps({"_id": f"p{row}", "title": title, "text": text}) + "\n")
    with (folder / "queries.jsonl").open("w", encoding="utf-8") as file:
        for number, (text, _) in enumerate(QUERIES):
            file.write(json.dumps({"_id": f"q{number}", "text": text}) + "\n")
    splits: dict[str, list[str]] = {"train": [], "dev": [], "test": []}
    for number, (_, row) in enumerate(QUERIES):
        split = ("train", "dev", "train", "test", "train")[number % 5]
        splits[split].append(f"q{number}\tp{row}\t1\n")
    for split, lines in splits.items():
        (folder / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(lines))
    return folder


@pytest.fixture(scope="session")
def tiny_bundle(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of two untrained tiny models; tests that change its files work on a copy."""
    import torch

    from tandemqa.encoders.bundle import save_bundle
    from tandemqa.encoders.cross import CrossEncoder, RerankerConfig
    from tandemqa.encoders.dual import DualEncoder, RetrieverConfig
    from tandemqa.recipe.config import Recipe

    recipe = Recipe(retriever=RetrieverConfig(model=str(tiny_model)), reranker=RerankerConfig(model=str(tiny_model)))
    folder = tmp_path_factory.mktemp("tiny") / "bundle"
    torch.manual_seed(1)
    reranker = CrossEncoder.load(recipe.reranker)
    torch.nn.init.normal_(reranker.head.weight)
    about = {"recipe": recipe.model_dump(), "started_from": str(tiny_model)}
    save_bundle(folder, DualEncoder.load(recipe.retriever), reranker, about)
    return folder


def whole(model: Path, *more: str) -> Any:
    """The recipe `WHOLE` of these base models, with more settings."""
    from tandemqa.recipe.config import load_recipe

    return load_recipe("quick", [*WHOLE, f"retriever.model={model}", f"reranker.model={model}", *more])


@pytest.fixture(scope="session")
def finished(tiny_model: Path, tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of every stage there is; tests that change its files work on a copy."""
    from tandemqa.recipe.train import train

    run = tmp_path_factory.mktemp("chain") / "run"
    train(tiny_dataset, run, whole(tiny_model))
    return run


@pytest.fixture(scope="session")
def texts(tiny_dataset: Path, tiny_model: Path) -> Any:
    """The questions and passages of the tiny dataset as token ids."""
    from tandemqa.data.dataset import load_dataset
    from tandemqa.encoders.dual import DualEncoder, RetrieverConfig
    from tandemqa.training.batch import Texts

    dataset = load_dataset(tiny_dataset)
    retriever = DualEncoder.load(RetrieverConfig(model=str(tiny_model)))
    queries = retriever.tokenize(list(dataset.queries.values()))
    return Texts(queries, retriever.tokenize([passage.full for passage in dataset.passages]))


@pytest.fixture
def float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exact comparisons need full precision."""
    monkeypatch.setattr("tandemqa.encoders.backbone.has_bfloat16", lambda device: False)


@pytest.fixture
def models(tiny_model: Path) -> Any:
    """An untrained pair without dropout."""
    import torch

    from tandemqa.encoders.cross import CrossEncoder, RerankerConfig
    from tandemqa.encoders.dual import DualEncoder, RetrieverConfig

    torch.manual_seed(5)
    retriever = DualEncoder.load(RetrieverConfig(model=str(tiny_model)))
    reranker = CrossEncoder.load(RerankerConfig(model=str(tiny_model), head_dropout=0.0, pair_length=48))
    return retriever, reranker


@pytest.fixture(scope="session")
def lists() -> Any:
    """Ten lists of five passages, two of them short, with passages that stand in several."""
    import numpy as np

    from tandemqa.lists.build import NO_PASSAGE, TrainingLists

    generator = np.random.default_rng(2)
    passages = np.stack([generator.permutation(40)[:5] for _ in range(10)]).astype(np.int32)
    passages[3, 3:] = NO_PASSAGE
    passages[7, 2:] = NO_PASSAGE
    passages[4, 0] = passages[5, 2]
    return TrainingLists(np.arange(10, dtype=np.int32), passages)


def counted_steps(patch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of the steps that are made from here on."""
    from tandemqa.training import loop

    made, whole = [], loop._step

    def step(*arguments: Any) -> Any:
        made.append(arguments[-1])
        return whole(*arguments)

    patch.setattr(loop, "_step", step)
    return made


def held_at_most_by(run: Callable[[], object]) -> int:
    """The most bytes that backward passes have in store at a time while `run` runs."""
    import torch

    alive, most = [0], [0]

    class Held:
        def __init__(self, tensor: Any) -> None:
            self.tensor, self.size = tensor, tensor.numel() * tensor.element_size()
            alive[0] += self.size
            most[0] = max(most[0], alive[0])

        def __del__(self) -> None:
            alive[0] -= self.size

    with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
        run()
    return most[0]
