"""What a training says of its steps: `log.jsonl`, and the same numbers for TensorBoard where that is wanted."""

import json
from pathlib import Path
from typing import Any

from tandemqa.extras import needed
from tandemqa.files import explained, whole_file


def summary_writer() -> Any:
    """The class that writes what TensorBoard reads; a `TandemError` where the package is missing."""
    needed("tensorboard", "tensorboard", "The setting tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter


class TrainingLog:
    """A line of `folder/log.jsonl` for each step; with `tensorboard`, its numbers in `folder/tensorboard` too.

    Lines of steps from `first` on were lost with an interruption and will be made again: they are dropped, and
    TensorBoard is told to drop them. Made by the main process only.
    """

    def __init__(self, folder: Path, first: int, tensorboard: bool = False) -> None:
        self.path = folder / "log.jsonl"
        self.board = summary_writer()(str(folder / "tensorboard"), purge_step=first) if tensorboard else None
        if self.path.exists():
            lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)[:first]
            with whole_file(self.path) as partial:
                partial.write_text("".join(lines), encoding="utf-8")

    def write(self, record: dict[str, float]) -> None:
        """Add what is to be known of a step; `record["step"]` is its number."""
        with explained(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        self.plot(int(record["step"]), record)

    def plot(self, step: int, record: dict[str, float], group: str = "") -> None:
        """Show numbers in TensorBoard alone, under their names behind that of their group."""
        if self.board is None:
            return
        with explained(self.path.parent / "tensorboard"):
            for name in record.keys() - {"step"}:
                self.board.add_scalar(group + name, record[name], step)
            self.board.flush()

    def close(self) -> None:
        """Let go of TensorBoard's file."""
        if self.board is not None:
            self.board.close()
