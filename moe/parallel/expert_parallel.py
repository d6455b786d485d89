"""Expert parallelism: each rank of a group holds some of the experts, and tokens travel to them and back.

Rows are sorted by (destination, place of the expert there); what arrives lies by (source, expert) and is read in expert order
by index alone. Weights travel with the rows, so that what comes home is weighted and only has to be added up. Every rank takes
part in every exchange, tokens or none.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn.functional import pad

from moe.errors import ConfigError, RankMismatch
from moe.kernels.auto import sort
from moe.kernels.reference import Rows
from moe.kernels.sort import Sorted, permuted
from moe.parallel.collectives import exchange, exchange_into
from moe.parallel.host_copy import to_device, to_host
from moe.parallel.in_flight import Outgoing, Route, start_combine, start_dispatch, wait_combine, wait_dispatch
from moe.parallel.placement import Placement, choices, even
from moe.routers.base import Routing
from moe.shapes import Float, Int


class Places(NamedTuple):
    """What a rank has to know of a placement to send its rows."""

    digest: int
    here: int  # experts that this rank holds
    width: int  # experts of the rank with the most
    number: Int[Tensor, " e"]  # of ranks among which an expert's rows are split; one more entry for drops
    keys: Int[Tensor, "e n"]  # rank * width + place of the expert there, of each of them


class Told(NamedTuple):
    """Counts of one call by rank."""

    out: Int[Tensor, "r c"]  # to each rank, on the host
    came: Int[Tensor, "r c"]  # from each, on the host
    there: Int[Tensor, "r c"]  # from each, on the device

    def split(self, widths: list[int]) -> list[Told]:
        """Those of each of several calls, whose rows lie side by side."""
        return [Told(*parts) for parts in zip(*(counts.split(widths, 1) for counts in self), strict=True)]


# A way to exchange tokens: yields a row of integers for each rank, is sent those of the others, and yields what is to be sent.
Exchange = Generator[Any, Any, None]


class AllToAll:
    """The dispatcher of a layer whose experts are shared out over `group`.

    how: "rows" sends a token to a rank once for each of its experts there, "tokens" only once; both wait for the device once
    a call, in `tell`, because the host has to know how many. "fixed" sends buffers of a fixed size and does not wait; what finds
    no room is lost, and `overflowed` says so: a step that saw it is void, and has to be run again with `exact` set.
    room: of "fixed", size of a buffer as a multiple of a rank's even share.
    """

    def __init__(
        self,
        layer: int,
        num_experts: int,
        group: Any,
        *,
        how: str = "rows",
        room: float = 2.0,
        node: Sequence[int] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.layer, self.num_experts, self.group, self.how, self.room, self.device = layer, num_experts, group, how, room, device
        self.ranks, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self.node = np.array(node if node is not None else [0] * self.ranks)
        self.exact = False
        self.overflowed: Tensor | None = None
        self.unchecked: list[Tensor] = []
        self.calls = 0
        # Asked with the rows [E] that this rank has for each expert, once every call: the placement of this call alone;
        # and told of it once all ranks are known to have been given the same one.
        self.ask: Callable[[Tensor], Placement] | None = None
        self.agreed: Callable[[Placement], None] = lambda placement: None
        # For what else travels, so that nobody's tokens wait behind it: called before tokens leave, and in the backward pass once
        # their gradients are back.
        self.leaving: Callable[[], None] = lambda: None
        self.returned: Callable[[], None] = lambda: None
        self.place(even(num_experts, self.ranks))

    def place(self, placement: Placement) -> None:
        """From now on experts are where `placement` says; tokens go to the nearest holder, evenly where there are several."""
        self.placement = self.given = placement
        self.now = self.ahead = self._places(placement)

    def _places(self, placement: Placement) -> Places:
        held = [placement.held(rank) for rank in range(self.ranks)]
        width = max(map(len, held))
        at = [{expert: place for place, expert in enumerate(experts)} for experts in held]
        keys = [[rank * width + at[rank][e] for rank in ranks] for e, ranks in enumerate(choices(placement, self.rank, self.node))]
        keys.append([self.ranks * width])  # of drops
        number = [len(row) for row in keys]
        return Places(
            _digest((self.layer, placement.digest, self.how, self.room)),
            len(held[self.rank]),
            width,
            to_device(number, self.device),
            to_device([row + [0] * (max(number) - len(row)) for row in keys], self.device),
        )

    def dispatch(self, x: Float[Tensor, "t d"], routing: Routing) -> tuple[Rows, Route]:
        (out,) = self.prepare(x, routing)
        x, values, under_way = start_dispatch(out)
        return wait_dispatch(x, values, out, under_way), out.route

    def prepare(self, x: Float[Tensor, "t d"], routing: Routing, chunks: int = 1) -> list[Outgoing]:
        """What is to be sent, in contiguous chunks of the tokens; all their counts are exchanged at once.

        Of a router without a fan-out, the list of assignments is cut instead: its chunks may name the same tokens.
        """
        if self.ask is not None:
            self.given = self.ask(_counted(routing.expert, self.num_experts + 1)[:-1])
            self.now = self.ahead if self.given is self.placement else self._places(self.given)
        fixed = self.how == "fixed" and not self.exact
        exchange = _fixed if fixed else _once if self.how == "tokens" else _each
        steps = [exchange(self, *part) for part in self._cut(x, routing, self._keys(routing.expert), chunks)]
        counts = [next(step) for step in steps]
        widths = [each.shape[1] for each in counts]
        answer = (self.sealed if fixed else self.tell)(torch.cat(counts, 1))
        of_chunks = answer.split(widths, 1) if isinstance(answer, Tensor) else answer.split(widths)
        self.leaving()
        return [step.send(of_chunk) for step, of_chunk in zip(steps, of_chunks, strict=True)]

    def _cut(self, x: Tensor, routing: Routing, key: Tensor, chunks: int) -> list[tuple[Tensor, Routing, Tensor, Sorted]]:
        """Tokens, routing, keys and their order, of each chunk; one sort by (chunk, key) orders all of them."""
        keys, k = self.ranks * self.now.width, routing.fan_out
        if chunks == 1:
            return [(x, routing, key, sort(key, keys))]
        whole = len(x) if k else len(key)
        ends = [whole * number // chunks for number in range(chunks + 1)]
        tokens = [end - begin for begin, end in pairwise(ends)]
        rows = [count * (k or 1) for count in tokens]
        by_chunk = [part + number * (keys + 1) for number, part in enumerate(key.split(rows))]
        order, position, counts = sort(torch.cat(by_chunk), chunks * (keys + 1))
        found, scales = [], [None] * chunks if routing.gradient_scale is None else routing.gradient_scale.split(rows)
        parts = (routing.token, routing.expert, routing.weight, key, order, position)
        vectors, kept = x.split(tokens) if k else [x] * chunks, counts.view(chunks, keys + 1)[:, :keys]
        for number, (token, expert, weight, of_key, lies, at) in enumerate(zip(*(part.split(rows) for part in parts), strict=True)):
            first = ends[number] * (k or 1)
            part = routing._replace(token=token - ends[number] if k else token, expert=expert, weight=weight, gradient_scale=scales[number])
            found.append((vectors[number], part, of_key, Sorted(lies - first, at - first, kept[number])))
        return found

    def _keys(self, expert: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
        """Of each row, destination * width + place of its expert there."""
        number, keys = self.now.number, self.now.keys
        if keys.shape[1] == 1:
            return keys[expert, 0]
        counts = _counted(expert, len(number))
        before = counts.cumsum(0) - counts
        among = sort(expert, self.num_experts).position - before[expert]
        return keys[expert, (among + self.rank) % number[expert]]

    def combine(self, y: Float[Tensor, "m d"], ticket: Route) -> Float[Tensor, "t d"]:
        rows, under_way = start_combine(y, ticket)
        return wait_combine(rows, ticket, under_way)

    def tell(self, counts: Int[Tensor, "r c"]) -> Told:
        """A row of counts to each rank: what went out, and what came in. Waits for the device: the one wait of a call."""
        sent = self._with_seal(counts)
        came = exchange(sent, [1] * self.ranks, [1] * self.ranks, self.group, "counts")
        out, theirs = to_host(torch.stack([sent, came])).unbind()
        for rank, (digest, calls) in enumerate(theirs[:, -2:].tolist()):
            self.check([rank, digest, calls, self.now.digest, self.calls])
        if self.given is not self.placement:
            self.agreed(self.given)
        return Told(out[:, :-2], theirs[:, :-2], came[:, :-2])

    def by_rank(self, counts: Int[Tensor, " n"]) -> Int[Tensor, "r E"]:
        """Counts by place as a row for each rank, as long under any placement: ranks with different ones have to hear of it."""
        return pad(counts.view(self.ranks, self.now.width), (0, self.num_experts - self.now.width))

    def sealed(self, rows: Int[Tensor, "r c"]) -> Int[Tensor, "r c"]:
        """A row of integers from each rank for one to each, still on the device; for the seals that come along see `astray`."""
        sent = self._with_seal(rows)
        theirs = exchange(sent, [1] * self.ranks, [1] * self.ranks, self.group, "counts")
        self.unchecked.append(torch.cat([theirs[:, -2:], sent[:, -2:]], 1))
        return theirs[:, :-2]

    def _with_seal(self, rows: Int[Tensor, "r c"]) -> Int[Tensor, "r c+2"]:
        """The rows, and behind each a digest of placement and layer, and the number of the call.

        Ranks out of step would compute wrong numbers silently. Fills take their value along with the launch, so nothing waits.
        """
        self.calls += 1
        return torch.cat([rows, rows.new_full((self.ranks, 1), self.now.digest), rows.new_full((self.ranks, 1), self.calls)], 1)

    def astray(self) -> Int[Tensor, "5"]:
        """What `check` has to look at for all calls since the last time, on the device."""
        seals = torch.cat(self.unchecked) if self.unchecked else torch.zeros(1, 4, dtype=torch.int64, device=self.device)
        self.unchecked = []
        first = (seals[:, :2] != seals[:, 2:]).any(1).int().argmax(0, keepdim=True)  # 0 if none differs
        return torch.cat([first, seals.index_select(0, first)[0]])

    def check(self, seal: Sequence[int] | None = None) -> None:
        """Raise RankMismatch if `seal` is of a rank out of step: its number, its digest and calls, and this rank's.

        Without one, that of `astray` is read: waits for the device.
        """
        number, digest, calls, own_digest, own_calls = to_host(self.astray()).tolist() if seal is None else seal
        if (digest, calls) != (own_digest, own_calls):
            what = "another placement or layer" if digest != own_digest else f"call {calls}"
            raise RankMismatch(
                f"rank {number % self.ranks} of the expert group sends tokens for {what} where rank {self.rank} is at call "
                f"{own_calls}; ranks must run the same layers in the same order: start all of them anew with the same recipe"
            )


def _each(to: AllToAll, x: Tensor, routing: Routing, key: Tensor, by_key: Sorted) -> Exchange:
    """One vector a row."""
    order, position, counts = by_key
    told = yield to.by_rank(counts)
    send, receive = told.out.sum(1).tolist(), told.came.sum(1).tolist()
    token, slots = routing.token[order[: sum(send)]], None
    if routing.fan_out is not None:  # drops, which sort last, become "none"
        slots = position.clamp(max=sum(send)).view(-1, routing.fan_out)
    route = Route(token, slots, len(x), send, receive, to.group, returned=to.returned)

    def arrived(x: Tensor, values: Tensor) -> Rows:
        into, place, held = sort(_experts(told.there, sum(receive)), to.now.width)
        return _rows(x, into, permuted(values, into, place), held[: to.now.here], place[:, None], routing)

    yield Outgoing(x, _values(routing, order[: sum(send)], position), route, send, receive, arrived)


def _once(to: AllToAll, x: Tensor, routing: Routing, key: Tensor, by_key: Sorted) -> Exchange:
    """One vector for all rows of a token that go to the same rank.

    Vectors are numbered by (destination, token). All rows are looked at, drops too, because how many there are is not known yet:

        table[destination, token]     1 where the token has a row for that rank; drops have a row of the table of their own
        running sum of it, less 1     the number of that vector
    """
    order, position, counts = by_key
    ranks, tokens = to.ranks, max(len(x), 1)
    destination = key[order] // to.now.width  # `ranks` for drops, which sort last
    pair = destination * tokens + routing.token[order]
    table = pair.new_zeros((ranks + 1) * tokens).scatter_(0, pair, 1)
    vector = (table.cumsum(0) - 1)[pair]
    vectors = table.view(ranks + 1, tokens)[:ranks].sum(1)
    told = yield torch.cat([to.by_rank(counts), vectors[:, None]], 1)
    send, receive = told.out[:, -1].tolist(), told.came[:, -1].tolist()
    rows_out, rows_in = told.out[:, :-1].sum(1).tolist(), told.came[:, :-1].sum(1).tolist()
    kept = order[: sum(rows_out)]
    vector, destination = vector[: len(kept)], destination[: len(kept)]
    slots = _distinct(vector, position, routing.fan_out, sum(send))
    token = vector.new_empty(sum(send)).scatter_(0, vector, routing.token[kept])
    route = Route(token, slots, len(x), send, receive, to.group, returned=to.returned)
    mine = vector - (vectors.cumsum(0) - vectors)[destination]  # which of the vectors that its rank gets
    among = mine.new_empty(sum(rows_in))
    under_way = exchange_into(among, mine, rows_out, rows_in, to.group, "counts"), mine  # which must exist until it has arrived

    def arrived(x: Tensor, values: Tensor) -> Rows:
        under_way[0].wait()
        came, of_rank = told.there[:, :-1], told.there[:, -1]
        index = among + _repeated(of_rank.cumsum(0) - of_rank, came.sum(1), sum(rows_in))
        into, at, held = sort(_experts(came, sum(rows_in)), to.now.width)
        return _rows(x, index[into], permuted(values, into, at), held[: to.now.here], None, routing)

    yield Outgoing(x, _values(routing, kept, position), route, rows_out, rows_in, arrived)


def _fixed(to: AllToAll, x: Tensor, routing: Routing, key: Tensor, by_key: Sorted) -> Exchange:
    """Buffers of one size for all ranks, which hold as many tokens each; free places count as dropped rows."""
    if routing.fan_out is None:
        raise ConfigError(
            "parallel.exchange=fixed needs a router that gives every token as many experts; choose parallel.exchange=rows or tokens"
        )
    order, position, counts = by_key
    room = max(1, int(to.room * len(order) / to.ranks + 0.999))
    loads = counts.view(to.ranks, to.now.width).sum(1)
    full = (loads > room).any()
    to.overflowed = full if to.overflowed is None else to.overflowed | full
    destination = key[order] // to.now.width  # `ranks` for drops
    among = torch.arange(len(order), device=x.device) - (loads.cumsum(0) - loads)[destination.clamp(max=to.ranks - 1)]
    places = to.ranks * room
    place = torch.where((destination < to.ranks) & (among < room), destination * room + among, places)

    def placed(values: Tensor, empty: float) -> Tensor:
        return values.new_full((places + 1, *values.shape[1:]), empty).index_copy(0, place, values)[:places]

    slots = place[position].view(-1, routing.fan_out)
    equal = [room] * to.ranks
    # free places are filled with the first token, which costs no copy of x with a row of zeros behind it
    route = Route(placed(routing.token[order], 0), slots, len(x), equal, equal, to.group, returned=to.returned)
    expert = yield placed(key[order] % to.now.width, to.now.width).view(to.ranks, room)

    def arrived(x: Tensor, values: Tensor) -> Rows:
        into, at, held = sort(expert.flatten(), to.now.width)
        return _rows(x, into, permuted(values, into, at), held[: to.now.here], at[:, None], routing)

    yield Outgoing(x, placed(_values(routing, order, position), 0), route, equal, equal, arrived)


def _values(routing: Routing, order: Tensor, position: Tensor) -> Float[Tensor, "n c"]:
    """What travels with each row beside its vector."""
    columns = [routing.weight] if routing.gradient_scale is None else [routing.weight, routing.gradient_scale.to(routing.weight.dtype)]
    return permuted(torch.stack(columns, 1), order, position)


def _rows(x: Tensor, index: Tensor, values: Tensor, counts: Tensor, slots: Tensor | None, routing: Routing) -> Rows:
    """Rows in expert order."""
    return Rows(x, index, values[:, 0], counts, slots, None if routing.gradient_scale is None else values[:, 1])


def _experts(came: Int[Tensor, "r c"], total: int) -> Int[Tensor, " n"]:
    """The expert, by its place here, of each of the `total` rows that came; `came` counts by source and place."""
    return _repeated(torch.arange(came.shape[1], device=came.device).repeat(len(came)), came.flatten(), total)


def _repeated(values: Int[Tensor, " m"], times: Int[Tensor, " m"], total: int) -> Int[Tensor, " n"]:
    """values[i] times[i] times each; told their sum, the device need not be asked."""
    return values.repeat_interleave(times, output_size=total)


def _distinct(vector: Tensor, position: Tensor, fan_out: int | None, none: int) -> Int[Tensor, "t k"] | None:
    """Of each token the vectors that carry it, each once; `none` in place of repeats and drops."""
    if fan_out is None:
        return None
    of_row = torch.cat([vector, vector.new_full((len(position) - len(vector),), none)])
    slots = of_row[position].view(-1, fan_out).sort(1).values
    repeated = torch.zeros_like(slots, dtype=torch.bool)
    repeated[:, 1:] = slots[:, 1:] == slots[:, :-1]
    return slots.masked_fill(repeated, none)


def _counted(expert: Int[Tensor, " n"], experts: int) -> Int[Tensor, " e"]:
    """Rows of each expert."""
    return torch.zeros(experts, dtype=torch.int64, device=expert.device).scatter_add_(0, expert, torch.ones_like(expert))


def _digest(key: object) -> int:
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "big") >> 1
