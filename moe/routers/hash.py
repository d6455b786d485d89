"""Hash routing: a fixed table says which experts a token id goes to, and nothing about routing is learned."""

from __future__ import annotations

import heapq
import json
import math
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from moe.errors import ConfigError
from moe.routers.base import Router, Routing, Tokens, full_precision
from moe.routers.capacity import Capacity
from moe.routers.noise import bits
from moe.shapes import Float, Int
from moe.tables import nearest

_TABLES = ("random", "balanced", "clustered")


class Hash(Router):
    """Send each token to the k experts that a table has for its id, with weight 1 / k (Roller et al., 2021).

    table: "random" gives every expert equally many ids, another draw in every layer. By `frequency`, "balanced" hands out ids
        from the most frequent to the rarest, each to the experts with the fewest tokens so far, and "clustered" gives an
        expert ids that are about equally frequent, with as many tokens as the others as far as single ids allow. Else the path of a .json
        file: a list of experts by token id or, for k > 1, of lists of k experts.
    frequency: path of a .json file, a list of how often each token id occurs.
    vocab: number of token ids; null: the model's.
    capacity_factor, drop, capacity_group, capacity_multiple: see `Capacity`; None drops nothing.

    The files are read when training starts or goes on; the table is part of checkpoints, and the one that a run began with is
    the one it keeps.
    """

    table: Tensor | None

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        *,
        k: int = 1,
        table: str = "random",
        frequency: str | None = None,
        vocab: int | None = None,
        capacity_factor: float | None = None,
        drop: Literal["order", "priority", "weight"] = "order",
        capacity_group: int | Literal["sequence"] = "sequence",
        capacity_multiple: int = 1,
    ) -> None:
        super().__init__(d_model, num_experts)
        self.k, self.kind, self.frequency, self.vocab = k, table, frequency, vocab
        self.capacity = Capacity.of(num_experts, capacity_factor, drop, capacity_group, capacity_multiple)
        self._check()
        self.register_buffer("table", None)
        if vocab is not None:
            self.set_vocabulary(vocab)

    def set_vocabulary(self, vocab: int) -> None:
        if self.vocab not in (None, vocab):
            raise ConfigError(
                f"the hash router was made for vocab={self.vocab} token ids and the model has {vocab}; leave router.vocab out"
            )
        self.vocab = vocab
        self.table = torch.empty(vocab, self.k, dtype=torch.int64)
        if not self.table.is_meta:
            self.reset_buffers()

    def reset_buffers(self) -> None:
        """Make the table, or read it."""
        if self.table is None or self.vocab is None:
            return
        if self.kind == "random":
            table = random_table(self.vocab, self.num_experts, self.k, self.stream)
        elif self.kind not in _TABLES:
            table = self._read_table(self.kind)
        else:
            assert self.frequency is not None
            counts = self._read_counts(self.frequency)
            table = (balanced_table if self.kind == "balanced" else clustered_table)(counts, self.num_experts, self.k)
        self.table.copy_(table)

    def forward(self, x: Float[Tensor, "t d"], tokens: Tokens) -> Routing:
        if self.table is None:
            raise ConfigError("the hash router does not know how many token ids there are; give router.vocab")
        valid = tokens.valid[:, None]
        weight = torch.full((len(x), self.k), 1 / self.k, dtype=full_precision(x[:0]).dtype, device=x.device)
        expert = torch.where(valid, self.table[tokens.id], self.num_experts)
        routing = Routing.per_token(expert, torch.where(valid, weight, 0))
        return routing if self.capacity is None else self.capacity(routing, tokens)

    def _read_table(self, path: str) -> Int[Tensor, "v k"]:
        entries = _read(path, "table", self.vocab)
        rows = [entry if isinstance(entry, list) else [entry] for entry in entries]
        for token, row in enumerate(rows):
            if len(row) != self.k or not all(_is_count(e) and e < self.num_experts for e in row):
                raise ConfigError(
                    f"router.table={path} has {json.dumps(entries[token])} for token id {token}; "
                    f"write {'an expert' if self.k == 1 else f'a list of {self.k} experts'} from 0 to {self.num_experts - 1}"
                )
            if len(set(row)) < self.k:
                raise ConfigError(f"router.table={path} names an expert twice for token id {token}; write {self.k} different ones")
        return torch.tensor(rows)

    def _read_counts(self, path: str) -> list[int]:
        counts = _read(path, "frequency", self.vocab)
        for token, count in enumerate(counts):
            if not _is_count(count):
                raise ConfigError(f"router.frequency={path} has {json.dumps(count)} for token id {token}; write a count of at least 0")
        return counts

    def _check(self) -> None:
        if not 1 <= self.k <= self.num_experts:
            raise ConfigError(
                f"a router cannot choose k={self.k} of {self.num_experts} experts; choose router.k from 1 to {self.num_experts}"
            )
        if self.vocab is not None and self.vocab < 1:
            raise ConfigError(f"vocab={self.vocab} is no number of token ids; leave router.vocab out")
        if self.kind not in _TABLES and not self.kind.endswith(".json"):
            raise ConfigError(
                f"router.table={self.kind} is neither a kind of table nor a .json file; {nearest(self.kind, [*_TABLES, 'a .json file'])}"
            )
        counted = self.kind in ("balanced", "clustered")
        if counted and self.frequency is None:
            raise ConfigError(
                f"table={self.kind} needs to know how often each token id occurs; give router.frequency, a .json file of counts"
            )
        if not counted and self.frequency is not None:
            raise ConfigError(
                f"frequency={self.frequency} has no effect with table={self.kind}; choose router.table=balanced, or leave it out"
            )


def random_table(vocab: int, num_experts: int, k: int, stream: int) -> Int[Tensor, "v k"]:
    """k different experts for each id, each expert as often as any other, up to one."""
    # so many ids at a time take all experts equally often: k neighbours each on a circle that is shuffled anew
    size = num_experts // math.gcd(num_experts, k)
    rank = bits(stream, 0, torch.arange(vocab), 1)[:, 0].argsort(stable=True).argsort(stable=True)
    circle = bits(stream, 1, torch.arange(-(-vocab // size)), num_experts).argsort(dim=-1, stable=True)
    place = ((rank % size)[:, None] * k + torch.arange(k)) % num_experts
    return circle[rank // size].gather(1, place)


def balanced_table(counts: list[int], num_experts: int, k: int) -> Int[Tensor, "v k"]:
    """Ids from the most frequent to the rarest, each to the k experts with the fewest tokens so far, the lowest among equals.

    An id that does not occur counts as if it did once, so that rare ids spread too.
    """
    experts = [(0, expert) for expert in range(num_experts)]
    table: list[list[int]] = [[]] * len(counts)
    for token in _falling(counts):
        emptiest = [heapq.heappop(experts) for _ in range(k)]
        table[token] = [expert for _, expert in emptiest]
        for load, expert in emptiest:
            heapq.heappush(experts, (load + max(counts[token], 1), expert))
    return torch.tensor(table)


def clustered_table(counts: list[int], num_experts: int, k: int) -> Int[Tensor, "v k"]:
    """Ids from the most frequent to the rarest, cut into E runs of as equal token counts as ids allow; then the k - 1 runs that follow."""
    total, seen = sum(max(count, 1) for count in counts), 0
    first = [0] * len(counts)
    for token in _falling(counts):
        weight = max(counts[token], 1)
        first[token] = (2 * seen + weight) * num_experts // (2 * total)  # where the middle of the id's tokens lies
        seen += weight
    return (torch.tensor(first)[:, None] + torch.arange(k)) % num_experts


def _falling(counts: list[int]) -> list[int]:
    """Token ids from the most frequent to the rarest, the lowest among equals."""
    return sorted(range(len(counts)), key=lambda token: -counts[token])


def _read(path: str, option: str, vocab: int | None) -> list[Any]:
    try:
        content = json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise ConfigError(f"router.{option}={path} does not exist; give the path of a .json file with an entry for each token id") from None
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"router.{option}={path} cannot be read as JSON ({error}); write a list with an entry for each token id"
        ) from None
    if not isinstance(content, list):
        raise ConfigError(f"router.{option}={path} does not hold a list; write one with an entry for each token id")
    if len(content) != vocab:
        raise ConfigError(
            f"router.{option}={path} has {len(content)} token ids and the vocabulary {vocab}; make the file with the model's tokenizer"
        )
    return content


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
