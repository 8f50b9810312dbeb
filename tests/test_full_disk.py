"""A disk without room, or one that may not be written: one sentence, exit code 2, nothing half-written."""

import errno
import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_cli import fails, run

from tandemqa.errors import TandemError
from tandemqa.files import explained, save_array
from tandemqa.index.index import Index
from tandemqa.index.lexical import LexicalIndex
from tandemqa.index.update import add_passages, delete_passages

PAGE = 4096
NEW = "".join(f'{{"_id": "n{number}", "text": "{"an owl and a bee " * 300}"}}\n' for number in range(10))


class SmallDisk:
    """A file system in memory whose size and permissions can be changed at any time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if refused := self._mount("size=64m"):
            pytest.skip(f"a small disk needs the permission to mount one: {refused}")

    @property
    def used(self) -> int:
        """Pages that hold something."""
        state = os.statvfs(self.folder)
        return state.f_blocks - state.f_bfree

    def resize(self, pages: int) -> None:
        assert not self._mount("remount", f"size={pages * PAGE}")

    def read_only(self) -> None:
        assert not self._mount("remount", "ro")

    def _mount(self, *options: str) -> str:
        """What the system says against it."""
        command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(self.folder)]
        done = subprocess.run(command, capture_output=True, text=True)
        return done.stderr.strip() or "refused" if done.returncode else ""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    if shutil.which("mount") is None:
        pytest.skip("a small disk needs the command mount")
    folder = tmp_path / "disk"
    folder.mkdir()
    yield SmallDisk(folder)
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture(scope="module")
def index(tiny_bundle: Path, tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of two segments."""
    folder = tmp_path_factory.mktemp("full") / "index"
    Index.build(tiny_bundle, tiny_dataset, folder).close()
    add_passages(folder, [{"_id": "a", "text": "an owl"}])
    return folder


@pytest.fixture
def new(tmp_path: Path) -> Path:
    (tmp_path / "new.jsonl").write_text(NEW)
    return tmp_path / "new.jsonl"


@pytest.fixture
def making(tiny_model: Path, tiny_bundle: Path, tiny_dataset: Path) -> dict[str, list[object]]:
    """Commands that make something, without the place for it."""
    settings = ["warm_lists.size=2", "lists.size=3", "evaluation.depth=5"]
    settings += [f"retriever.model={tiny_model}", f"reranker.model={tiny_model}"]
    options = [word for setting in settings for word in ("--set", setting)]
    return {
        "index": ["index", tiny_bundle, tiny_dataset, "--out"],
        "convert": ["convert", tiny_dataset, "--out"],
        "bundle": ["bundle", "--retriever", tiny_bundle, "--reranker", tiny_bundle, "--out"],
        "train": ["train", tiny_dataset, *options, "--out"],
    }


def changing(index: Path, new: Path, bundle: Path) -> dict[str, list[object]]:
    return {
        "add": ["add", index, new, "--bundle", bundle],
        "delete": ["delete", index, *(f"p{number}" for number in range(30))],
        "compact": ["compact", index],
    }


def content(folder: Path) -> list[tuple[str, list[int]]]:
    """The passages of an index, with their tokens."""
    index = Index.open(folder)
    rows = index.rows.tolist()
    held = [
        (passage.full, index.tokens[row].tolist())
        for row, passage in zip(rows, index.passages.rows(rows), strict=True)
    ]
    index.close()
    return held


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("index", [1, 12, 21, 26, 31, 34, 36]),
        ("convert", [1, 3, 5]),
        ("bundle", [1, 20, 40, 50, 70, 104, 107]),
        ("train", [1, 26, 101, 201, 226, 326]),
    ],
)
def test_what_does_not_fit_on_a_disk_is_not_there_and_the_same_command_goes_on_when_it_has_grown(
    disk: SmallDisk, making: dict[str, list[object]], name: str, sizes: list[int]
) -> None:
    out = disk.folder / "out"
    made = out / "bundle" if name == "train" else out
    for pages in sizes:
        disk.resize(pages)
        line = fails(*making[name], out)
        assert line.startswith(f"Error: The disk is full: {out}") and "partial" not in line
        assert line.endswith(" was not written; free some space and run the command again.")
        assert not made.exists() and not list(disk.folder.rglob("*.partial/*.partial"))
    disk.resize(2000)
    assert run(*making[name], out).exit_code == 0 and made.exists()
    assert [path.name for path in disk.folder.iterdir()] == ["out"]


@pytest.mark.parametrize("name", ["add", "delete", "compact"])
def test_a_change_that_does_not_fit_leaves_the_index_as_it_was(
    disk: SmallDisk, index: Path, new: Path, tiny_bundle: Path, name: str
) -> None:
    own = Path(shutil.copytree(index, disk.folder / "index"))
    command = changing(own, new, tiny_bundle)[name]
    before, failures = content(own), 0
    for more in (0, 1, 3, 6, 12, 18, 24, 36):
        disk.resize(disk.used + more)
        result = run(*command)
        if result.exit_code == 0:
            break
        failures += 1
        assert result.exit_code == 2 and result.stdout == ""
        line = f"Error: The disk is full: {own} was not written; free some space and run the command again."
        assert result.stderr.splitlines()[-1] == line
        assert content(own) == before
    else:
        disk.resize(2000)
        assert run(*command).exit_code == 0
    assert failures >= (1 if name == "delete" else 3)
    changed = content(own)
    assert len(changed) == len(before) + {"add": 10, "delete": -30, "compact": 0}[name]
    assert len(list((own / "segments").iterdir())) == {"add": 3, "delete": 2, "compact": 1}[name]


def test_a_reader_that_finds_no_room_for_its_books_says_so(
    disk: SmallDisk, index: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    own = Path(shutil.copytree(index, tmp_path / "index"))
    reader = Index.open(own)
    delete_passages(own, "p1")  # stays in SQLite's log for as long as there is a reader
    copy = Path(shutil.copytree(own, disk.folder / "index", ignore=shutil.ignore_patterns("*-shm")))
    reader.close()
    disk.resize(disk.used)
    line = fails("search", copy, "owls", "--bundle", tiny_bundle)
    assert line.startswith(f"Error: The passages {copy}/passages.sqlite could not be read (")
    assert line.endswith("); see that the disk is sound and has room, and give the command again.")
    disk.resize(2000)
    assert run("search", copy, "owls", "--bundle", tiny_bundle).exit_code == 0
    assert len(Index.open(copy)) == 40


def test_a_disk_that_may_not_be_written_is_named(
    disk: SmallDisk, making: dict[str, list[object]], index: Path, new: Path, tiny_bundle: Path, tiny_dataset: Path
) -> None:
    own = Path(shutil.copytree(index, disk.folder / "index"))
    disk.read_only()
    for command in making.values():
        assert fails(*command, disk.folder / "out").startswith(f"Error: No permission to write {disk.folder / 'out'}")
    for command in changing(own, new, tiny_bundle).values():
        assert fails(*command).startswith(f"Error: No permission to write {own}; choose another place or change")
    runs = ["evaluate", tiny_bundle, tiny_dataset, "--run-dir", disk.folder / "runs"]
    assert fails(*runs).startswith(f"Error: No permission to write {disk.folder / 'runs'}")
    assert run("search", own, "owls", "--bundle", tiny_bundle).exit_code == 0


def test_an_index_does_not_take_the_place_of_a_mounted_disk(
    disk: SmallDisk, tiny_bundle: Path, tiny_dataset: Path
) -> None:
    line = fails("index", tiny_bundle, tiny_dataset, "--out", disk.folder)
    assert (
        line
        == f"Error: {disk.folder} is where a disk is mounted, and is replaced as a whole; name a folder inside it."
    )
    assert not list(disk.folder.parent.glob(".*.partial"))


@pytest.mark.parametrize("pages", [0, 4])
def test_a_cache_that_cannot_be_kept_is_named(
    disk: SmallDisk, tiny_bundle: Path, tiny_dataset: Path, monkeypatch: pytest.MonkeyPatch, pages: int
) -> None:
    monkeypatch.setenv("TANDEMQA_CACHE", str(disk.folder / "cache"))
    if pages:
        disk.resize(pages)
    else:
        disk.read_only()
    line = fails("evaluate", tiny_bundle, tiny_dataset)
    if pages:
        assert line.startswith(f"Error: The disk is full: {disk.folder / 'cache'}")
    else:
        assert line.startswith(f"Error: No permission to write {disk.folder / 'cache'}")
        assert line.endswith("; set TANDEMQA_CACHE to another place or change its permissions.")


@pytest.mark.parametrize("count", [10, 1000, 1020, 1030, 5000])
def test_an_array_is_whole_or_not_there(disk: SmallDisk, count: int) -> None:
    disk.resize(1)
    array = np.arange(count, dtype=np.int32)
    try:
        save_array(disk.folder / "a.npy", array)
    except TandemError as error:
        assert "The disk is full" in str(error) and list(disk.folder.iterdir()) == [] and count >= 1000
    else:
        np.testing.assert_array_equal(np.load(disk.folder / "a.npy"), array)


def test_a_bm25_index_is_whole_or_not_there(disk: SmallDisk) -> None:
    index = LexicalIndex.build(f"word{number} word{number // 2}" for number in range(700))
    needed = 0
    for pages in range(1, 40):
        disk.resize(pages)
        try:
            index.save(disk.folder / "bm25")
        except TandemError as error:
            assert "The disk is full" in str(error) and list(disk.folder.iterdir()) == []
        else:
            needed = pages
            break
    assert needed > 5
    assert LexicalIndex.load(disk.folder / "bm25", mapped=True).search(["word300"], 1)[0].tolist() == [[300]]


# Without a disk of one's own


@pytest.mark.parametrize("limit", [0, 100, 5_000, 20_000])
@pytest.mark.parametrize("name", ["index", "convert", "bundle", "add"])
def test_a_file_that_the_system_ends_is_not_there(
    making: dict[str, list[object]], index: Path, new: Path, tiny_bundle: Path, tmp_path: Path, name: str, limit: int
) -> None:
    """The system refuses what goes beyond `limit` bytes of any file, in whatever language it is written."""
    own = Path(shutil.copytree(index, tmp_path / "index"))
    command = changing(own, new, tiny_bundle)["add"] if name == "add" else [*making[name], tmp_path / "out"]
    before = content(own)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        result: Any = run(*command)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    if (name, limit) != ("convert", 20_000):
        place = own if name == "add" else tmp_path / "out"
        assert result.exit_code == 2 and result.stdout == ""
        assert result.stderr.splitlines()[-1].startswith(f"Error: {place} could not be written: ")
    assert content(own) == before and (tmp_path / "out").exists() == (result.exit_code == 0)


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (
            OSError(errno.ENOSPC, "x"),
            "The disk is full: {} was not written; free some space and run the command again.",
        ),
        (OSError(errno.EDQUOT, "x"), "The disk quota is used up: {} was not written; free some space and run the"),
        (OSError(errno.EROFS, "x"), "No permission to write {}; choose another place or change its permissions."),
        (OSError("1100 requested and 992 written"), "The disk is full: {} was not written"),  # numpy
        (Exception("No space left on device (os error 28)"), "The disk is full: {} was not written"),  # tokenizers
        (OSError("odd"), "{} could not be written: odd; choose another place."),
    ],
)
def test_each_failure_has_its_sentence_which_names_the_outermost_place(
    error: Exception, sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(TandemError) as told, explained(tmp_path / "out"), explained(tmp_path / "out" / "part"):
        raise error
    assert str(told.value).startswith(sentence.format(tmp_path / "out"))


@pytest.mark.parametrize("error", [TandemError("as it is (os error 28)"), ValueError("ours"), KeyboardInterrupt()])
def test_any_other_error_is_left_as_it_is(error: BaseException, tmp_path: Path) -> None:
    with pytest.raises(type(error)) as told, explained(tmp_path / "out"), explained(tmp_path / "out" / "part"):
        raise error
    assert told.value is error
