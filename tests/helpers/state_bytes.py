"""Where the words of a saved state are, and its checksum, computed as the library does."""

from __future__ import annotations

import struct

import numpy as np

FACTOR = np.uint64(0x9E3779B97F4A7C15)


def _step(lane: np.ndarray, word: np.ndarray) -> np.ndarray:
    mixed = (lane ^ word) * FACTOR
    return mixed << np.uint64(29) | mixed >> np.uint64(35)


def checksum(data: bytes) -> bytes:
    """Of all bytes in front of it; in a file, of what is behind the tokens and then of what is not."""
    with np.errstate(over="ignore"):
        lanes = [_step(np.uint64(0), FACTOR)]
        for _ in range(7):
            lanes.append(_step(lanes[-1], FACTOR))
        current = np.array(lanes)
        padded = data + bytes(64 - len(data) % 64)
        for block in np.frombuffer(padded, np.uint64).reshape(-1, 8):
            current = _step(current, block)
        result = np.uint64(len(data))
        for lane in current:
            result = _step(result, lane)
        return int(result ^ result >> np.uint64(32)).to_bytes(8, "little")


class StateBytes:
    """A state of a cache of one stream that holds n_tokens of one sequence, `front` bytes of llama.cpp's in front."""

    def __init__(self, data: bytes, *, whole: bool, tables: bool, n_tokens: int) -> None:
        self.data, self.tables = data, tables
        self.streams = 4 + int.from_bytes(data[:4], "little") if whole else 8
        self.tag = self.streams + 4
        self.declared = self.tag + 48
        self.count = self.declared + 8 if tables else self.streams + 4
        assert self.int_at(self.count) == n_tokens
        self.cells = self.count + 4
        self.cell_size = 28 if tables else 12
        self.layers = self.cells + n_tokens * self.cell_size

    def int_at(self, offset: int) -> int:
        return int.from_bytes(self.data[offset : offset + 4], "little", signed=True)

    def sequence_at(self, cell: int) -> int:
        """Offset of the sequence id of a cell."""
        return self.cells + (cell + 1) * self.cell_size - 4

    def changed(self, offset: int, format: str, value: object) -> bytes:
        """The state with another value there, and the checksum that belongs to it."""
        word = struct.pack(format, value)
        data = self.data[:offset] + word + self.data[offset + len(word) :]
        return data[:-8] + checksum(data[:-8]) if self.tables else data
