"""Buckets of gradients: an all-reduce starts after every stream that wrote into its bucket, in whatever order gradients arrive."""

from __future__ import annotations

import random

import pytest
import torch

from moe.engines import ddp


class Stream:
    """A stream as a vector clock: how far it, and every stream that it has waited for, had come."""

    def __init__(self, number: int) -> None:
        self.number, self.seen = number, {number: 0}

    def write(self) -> int:
        self.seen[self.number] += 1
        return self.seen[self.number]

    def wait_stream(self, other: Stream) -> None:
        self.seen = {n: max(self.seen.get(n, 0), other.seen.get(n, 0)) for n in self.seen.keys() | other.seen.keys()}


class World:
    """A lane of small buckets over two ranks, its streams, and what each all-reduce had waited for when it started."""

    def __init__(self, monkeypatch, streams: int) -> None:
        self.streams, self.started = [Stream(n) for n in range(streams)], []
        self.now = self.streams[0]
        monkeypatch.setattr(ddp, "_BUCKET_BYTES", 64)
        monkeypatch.setattr(ddp, "current_stream", lambda device: self.now)
        monkeypatch.setattr(ddp.dist, "get_rank", lambda group: 0)
        monkeypatch.setattr(ddp.dist, "get_world_size", lambda group: 2)
        monkeypatch.setattr(ddp.dist, "all_reduce", self.all_reduce)
        parameters = [torch.zeros(8) for _ in range(12)]
        self.lane = ddp.Lane([(p, p) for p in parameters], None)
        self.wrote = {id(bucket.sum): [] for bucket in self.lane.buckets}

    def all_reduce(self, x, group, async_op):
        self.started.append((id(x), dict(self.now.seen)))

    def backward(self, order: list) -> None:
        self.lane.expect()
        for bucket, p, stream in order:
            self.now = stream
            self.wrote[id(bucket.sum)].append((stream.number, stream.write()))
            bucket.arrived(p)
            self.lane.start()
        self.now = self.streams[0]


@pytest.mark.parametrize("streams", [2, 3])
@pytest.mark.parametrize("seed", range(12))
def test_an_all_reduce_starts_after_every_writer_of_its_bucket(monkeypatch, seed, streams):
    world, chance = World(monkeypatch, streams), random.Random(seed)
    for _ in range(2):  # windows: nothing of one is forgotten or taken for the next one's
        order = [(bucket, p, chance.choice(world.streams)) for bucket in world.lane.buckets for p, _ in bucket.pairs]
        chance.shuffle(order)
        world.backward(order)
        assert [bucket for bucket, _ in world.started] == [id(bucket.sum) for bucket in world.lane.buckets]
        for bucket, seen in world.started:
            assert len(world.wrote[bucket]) == 2
            assert all(seen.get(stream, 0) >= at for stream, at in world.wrote[bucket]), world.wrote[bucket]
            world.wrote[bucket].clear()
        world.started.clear()
