"""What was read already, in memory that does not grow with the length of the texts."""

from array import array
from hashlib import blake2b


class Ledger:
    """A number of 32 bits for each of many names, in 16 to 32 bytes a name and, while it grows, half as much again.

    A name is kept as its 8-byte digest alone. That two of ten million names share one happens once in 300,000 times.
    """

    def __init__(self) -> None:
        self._count = 0
        self._keys, self._numbers = _slots(1024)

    def __len__(self) -> int:
        return self._count

    def get(self, name: str) -> int | None:
        """The number of `name`; None if it was never noted."""
        slot = self._slot(digest(name))
        return self._numbers[slot] if self._keys[slot] else None

    def note(self, name: str, number: int) -> int | None:
        """Note `number` for a new name; for a name noted before, return the number it has, which stays."""
        key = digest(name)
        slot = self._slot(key)
        if self._keys[slot]:
            return self._numbers[slot]
        self._keys[slot], self._numbers[slot] = key, number
        self._count += 1
        if self._count * 4 > len(self._keys) * 3:
            self._grow()
        return None

    def replace(self, name: str, number: int) -> None:
        """Give a name noted before another number."""
        self._numbers[self._slot(digest(name))] = number

    def _slot(self, key: int) -> int:
        """Where `key` stands or, if it is new, may stand: the first such slot from its low bits on."""
        keys, last = self._keys, len(self._keys) - 1
        slot = key & last
        while keys[slot] and keys[slot] != key:
            slot = (slot + 1) & last
        return slot

    def _grow(self) -> None:
        old = zip(self._keys, self._numbers, strict=True)
        self._keys, self._numbers = _slots(2 * len(self._keys))
        for key, number in old:
            if key:
                slot = self._slot(key)
                self._keys[slot], self._numbers[slot] = key, number


def _slots(count: int) -> tuple["array[int]", "array[int]"]:
    """`count` empty slots, a power of two, of 12 bytes each."""
    return array("Q", [0]) * count, array("i", [0]) * count


def digest(text: str) -> int:
    """64 bits of a hash of `text`, never 0."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big") or 1
