"""All-to-alls in chunks that overlap with routed experts (`parallel.overlap`): while one chunk's experts compute, others travel.

The tokens of a layer are cut into contiguous chunks, whose counts are exchanged at once. With two of them:

    host order    D1 D2 | wait D1  E1  C1 | wait D2  E2  C2 | wait C1  wait C2
    computes            |         [--E1--]|         [--E2--]|
    network      [-D1--][-D2--]           [-C1--]           [-C2--]

    D dispatch, E experts, C combine. All dispatches start first: one communicator runs in order, and a combine is not ready before.

The backward pass is the mirror image, because each all-to-all is two nodes of autograd (`in_flight`) and autograd runs what was
recorded last first: gradients of C2 and C1 leave, E2 computes while those of C1 travel, gradients of D2 travel while E1 computes.

Experts are called once with all chunks, so that their weights are gathered once, by FSDP's hooks or by FSSDP. Each chunk adds its
part to the weights' gradients, the last chunk first: the same sum as in one piece but for the order of its terms, and the same bits
every time. Under activation checkpointing, the recomputation sends again the combine of every chunk but the last, which one piece
does not need: it would know only after the last chunk's experts that nothing more is asked for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe.model.experts import Part
from moe.model.moe_layer import MoELayer
from moe.parallel.expert_parallel import AllToAll
from moe.parallel.in_flight import InFlight, Outgoing, start_combine, start_dispatch, wait_combine, wait_dispatch
from moe.routers.base import Routing
from moe.shapes import Float


class Overlap:
    """The `pipeline` seam of a layer whose experts are sharded over ranks."""

    def __init__(self, chunks: int) -> None:
        self.chunks = chunks

    def __call__(self, layer: MoELayer, x: Float[Tensor, "t d"], routing: Routing) -> Float[Tensor, "t d"]:
        to, see = layer.dispatcher, layer.observer
        assert isinstance(to, AllToAll)
        with see.stage("dispatch"):
            chunks = [Chunk(layer, out) for out in to.prepare(see.border(x, "dispatch", None), routing, self.chunks)]
            for chunk in chunks[1:]:  # the first chunk's gradients are the last to be back
                chunk.out = chunk.out._replace(route=chunk.out.route._replace(returned=lambda: None))
            parts = [chunk.start() for chunk in chunks]
            parts[0] = parts[0]._replace(inputs=(see.border(parts[0].inputs[0], "experts", "dispatch"), *parts[0].inputs[1:]))
        sums = layer.experts(parts)
        sums[-1] = see.border(sums[-1], "combine", "experts")
        with see.stage("combine"):
            outputs = [chunk.finish(y) for chunk, y in zip(chunks, sums, strict=True)]
            whole = torch.cat(outputs) if routing.fan_out is not None else torch.stack(outputs).sum(0)
        return see.border(whole, None, "combine")


class Chunk:
    """Some of a layer's tokens on their way to the experts and back."""

    def __init__(self, layer: MoELayer, out: Outgoing) -> None:
        self.layer, self.out = layer, out
        self.back: InFlight

    def start(self) -> Part:
        """Send the tokens."""
        x, values, under_way = start_dispatch(self.out)

        def rows(x: Tensor, values: Tensor):
            found = wait_dispatch(x, values, self.out, under_way)
            self.layer.observer.dispatched(found)
            return found

        return Part((x, values), rows, self.send_back)

    def send_back(self, y: Float[Tensor, "m d"]) -> Float[Tensor, "s d"]:
        """Send the experts' outputs to the tokens."""
        rows, self.back = start_combine(y, self.out.route)
        return rows

    def finish(self, rows: Float[Tensor, "s d"]) -> Float[Tensor, "t d"]:
        """The chunk's outputs, once they are here."""
        return wait_combine(rows, self.out.route, self.back)
