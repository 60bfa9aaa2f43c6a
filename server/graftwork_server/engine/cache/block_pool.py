"""The blocks of the KV cache by number and by what is in them; the keys by which they are found."""

from __future__ import annotations

import hashlib
import struct
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from graftwork_server.layers.attention.kv_cache import BLOCK_TOKENS


def root_key(digest: str | None, cache_salt: str, rope_regime: int = 0) -> bytes:
    """What the keys of all blocks of an adapter (None: the base) under a salt begin with. rope_regime: which rotary
    frequencies their keys were turned with (Sequence.rope_regime).

    The digest stands for the adapter's virtual tokens too: those of one digest are always the same.
    """
    who = b"base" if digest is None else b"adapter " + digest.encode()
    salt = cache_salt.encode()
    # Both lengths first: no two pairs of digest and salt give the same bytes.
    return hashlib.sha256(struct.pack("<QQQ", len(who), len(salt), rope_regime) + who + salt).digest()


def block_key(parent: bytes, tokens: Sequence[int]) -> bytes:
    """Key of a full block: SHA-256 of everything that its keys and values depend on.

    parent: key of the block before it, or root_key. tokens: its BLOCK_TOKENS token ids. A collision would show one
    sequence what another one read, so the hash must be one that nobody can steer.
    """
    return hashlib.sha256(parent + array("Q", tokens).tobytes()).digest()


class BlockPool:
    """Blocks by number: free ones, ones in use, and idle ones, which nobody uses but whose content is known by a key.

    A block is used by as many sequences as it stands in tables of. An idle one is found again by its key until its
    place is needed: least recently used ones go first, and of one sequence's the last ones first, as nobody finds what
    comes after a missing block.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._users = [0] * num_blocks
        self._key_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # least recently used first

    @property
    def free_blocks(self) -> int:
        """How many blocks can be handed out, idle ones included."""
        return len(self._free) + len(self._idle)

    def extend(self, block_table: list[int], tokens: int) -> bool:
        """Appends blocks until `tokens` tokens fit the table. Takes none and returns False if there are too few."""
        missing = -(-tokens // BLOCK_TOKENS) - len(block_table)
        if missing > self.free_blocks:
            return False
        for _ in range(missing):
            block = self._free.pop() if self._free else self._evict()
            self._users[block] = 1
            block_table.append(block)
        return True

    def share(self, block_table: list[int], keys: Iterable[bytes]) -> int:
        """Appends the blocks known by `keys`, up to the first key that is not known; returns how many."""
        shared = 0
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            self._users[block] += 1
            self._idle.pop(block, None)
            block_table.append(block)
            shared += 1
        return shared

    def cache(self, block: int, key: bytes) -> None:
        """Makes a block in use known by its key. Where another one is known by it already, that one stays."""
        if key not in self._block_of and block not in self._key_of:
            self._key_of[block] = key
            self._block_of[key] = block

    def forget(self, block_table: Sequence[int]) -> list[int]:
        """Nobody finds the blocks of a table from now on; returns those of them that no other table has."""
        for block in block_table:
            key = self._key_of.pop(block, None)
            if key is not None:
                del self._block_of[key]
        return [block for block in block_table if self._users[block] == 1]

    def release(self, block_table: list[int]) -> None:
        """Takes all blocks of a table back."""
        for block in reversed(block_table):
            self._users[block] -= 1
            if self._users[block] == 0:
                if block in self._key_of:
                    self._idle[block] = None
                else:
                    self._free.append(block)
        block_table.clear()

    def _evict(self) -> int:
        block, _ = self._idle.popitem(last=False)
        del self._block_of[self._key_of.pop(block)]
        return block
