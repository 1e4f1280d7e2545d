"""(P) Keys of tables as words of 64 bits, and their hash.

A text key is its UTF-8 bytes, padded with NULs to the width of its table: so keys are compared as columns of integers,
and a key with a NUL in it is none. A number is the bits of its float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from node.kernel.types import Bools, Floats, Ints, Texts

Words: TypeAlias = NDArray[np.uint64]

_WORD_BYTES = 8
_MULTIPLIERS = tuple(np.uint64(value) for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def key_width(bytes_max: int) -> int:
    """Words of a key when the longest has so many bytes."""
    return max(1, -(-bytes_max // _WORD_BYTES))


def number_words(keys: Floats) -> Words:
    """uint64 [n, 1]; -0.0 is 0.0."""
    return np.ascontiguousarray(keys + 0.0).view(np.uint64).reshape(-1, 1)


def byte_words(keys: Sequence[bytes], width: int) -> Words:
    """uint64 [n, width] of keys of at most 8 * width bytes, none of them NUL."""
    padded = np.array(keys, dtype=f"S{width * _WORD_BYTES}")
    return padded.view(np.uint64).reshape(len(keys), width)


def texts_of(words: Words) -> list[bytes]:
    """The keys of `byte_words`."""
    padded = np.ascontiguousarray(words)
    found: list[bytes] = padded.view(f"S{padded.shape[1] * _WORD_BYTES}").reshape(-1).tolist()
    return found


def text_words(keys: Sequence[str], width: int) -> tuple[Words, Bools]:
    """uint64 [n, width], and which of them may be keys at all: not too long, without a NUL."""
    encoded = [key.encode("utf-8", "surrogatepass") for key in keys]
    longest = max(map(len, encoded), default=0)
    fits = np.ones(len(keys), np.bool_)
    if longest > width * _WORD_BYTES or any(b"\0" in key for key in encoded):
        good = [len(key) <= width * _WORD_BYTES and b"\0" not in key for key in encoded]
        fits = np.array(good, dtype=np.bool_)
        encoded = [key if whole else b"" for key, whole in zip(encoded, good, strict=True)]
    return byte_words(encoded, width), fits


def hashed(words: Words, seed: int) -> Words:
    """uint64 [n]: each key's words mixed in turn, as splitmix64 finishes a number (Steele, Lea, Flood 2014).

    Two keys of one table never share a hash: its seed is chosen so.
    """
    found = np.full(len(words), np.uint64(seed))
    with np.errstate(over="ignore"):
        for column in range(words.shape[1]):
            found ^= words[:, column]
            found += _MULTIPLIERS[0]
            found ^= found >> np.uint64(30)
            found *= _MULTIPLIERS[1]
            found ^= found >> np.uint64(27)
            found *= _MULTIPLIERS[2]
            found ^= found >> np.uint64(31)
    return found


def distinct_texts(keys: Texts) -> tuple[list[str], Ints]:
    """Each key once, and int64 [n] where each is among them; -1 for a missing one."""
    places: dict[str | None, int] = {}
    at = np.fromiter((places.setdefault(key, len(places)) for key in keys.tolist()), np.int64, len(keys))
    missing = places.pop(None, None)
    if missing is not None:
        at = np.where(at == missing, -1, at - (at > missing))
    return list(places), at  # type: ignore[arg-type]
