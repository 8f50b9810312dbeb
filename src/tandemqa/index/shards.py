"""Vectors in more files than a process may have open."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt


class Shards(Sequence[npt.NDArray[Any]]):
    """Arrays in `.npy` files, each memory-mapped when it is asked for, for as long as it is in use: every map takes a
    file handle."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    @overload
    def __getitem__(self, number: int) -> npt.NDArray[Any]: ...

    @overload
    def __getitem__(self, number: slice) -> "Shards": ...

    def __getitem__(self, number: int | slice) -> "npt.NDArray[Any] | Shards":
        if isinstance(number, slice):
            return Shards(self.files[number])
        array: npt.NDArray[Any] = np.load(self.files[number], mmap_mode="r", allow_pickle=False)
        return array
