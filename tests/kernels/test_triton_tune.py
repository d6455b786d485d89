"""The search for configurations: what it measures is what a layer launches, and what it finds is what runs read."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("triton", reason="Triton runs on Linux only")

from moe.errors import ConfigError
from moe.kernels import triton_configs, triton_mlp
from moe.kernels.reference import ExpertWeights, Rows
from moe.kernels.triton_configs import Config, Shape, choose, read, shipped
from moe.kernels.tune import STARTS, Problem, neighbours, problems, search, starts, tune, write

CPU = torch.device("cpu")
TINY = Shape(d=16, f=32, experts=2, k=2, tokens=4, dtype=torch.float32)


def distance(config: Config, wanted: Config) -> float:
    return 1 + sum(abs(a - b) for a, b in zip(config, wanted, strict=True))


def of(runs) -> list[Config]:
    """The configurations that runs were prepared with."""
    return [next(cell.cell_contents for cell in run.__closure__ if isinstance(cell.cell_contents, Config)) for run in runs]


def pretend(config: Config):
    if config.stages == 5:
        raise RuntimeError("PassManager::run failed")
    return lambda: config


def test_the_search_walks_from_shipped_configurations_to_the_fastest():
    start, other, wanted = Config(64, 64, 32, 4, 2), Config(64, 128, 32, 4, 4), Config(128, 32, 16, 8, 4, 4)
    problem = Problem("up", "up", 768, 2048, pretend)
    tried = search(problem, [start, other], lambda runs: [distance(config, wanted) for config in of(runs)])
    assert min(tried, key=lambda config: tried[config]) == wanted
    assert tried[start] == distance(start, wanted)
    assert {config.stages for config, time in tried.items() if time == float("inf")} == {5}, "what does not compile is passed over"


def test_the_search_ends_where_neighbours_are_as_fast():
    start = Config(64, 64, 32, 4, 2)
    tried = search(Problem("up", "up", 768, 2048, pretend), [start], lambda runs: [1.0] * len(runs))
    assert set(tried) == {start, *neighbours("up", start)}


def test_the_search_crosses_a_plateau_of_two_stages():
    """A buffer more for every two stages, as where a gather's index is copied ahead too: the next stage alone changes nothing."""
    start = Config(128, 256, 64, 8, 3)

    def timer(runs):
        return [2.0 - 0.3 * min(config.stages // 2, 3) + 0.5 * (config[:4] != start[:4]) for config in of(runs)]

    tried = search(Problem("wgrad", "wgrad", 768, 2048, lambda config: lambda: config), [start], timer)
    assert min(tried, key=lambda config: tried[config]).stages >= 5


def modelled(config: Config) -> float:
    """Time of a tile's element on a multiprocessor: what it reads, and the ends of tiles where no second block multiplies meanwhile."""
    held = config.BLOCK_M * config.BLOCK_N / (32 * config.warps)  # accumulators of a thread
    shared = 2 * config.stages * config.BLOCK_K * (config.BLOCK_M + config.BLOCK_N)
    if shared > 227 << 10:
        return float("inf")
    blocks = min((227 << 10) // (shared + 1024), 2 if held * config.warps <= 512 else 1)
    spilled = max(0.0, held - 128) / 128
    reads = 100 * (1 / config.BLOCK_M + 1 / config.BLOCK_N) * (2 if config.warps == 8 and config.BLOCK_N < 256 else 1)
    ends = 0.1 if config.persistent and config.stages >= 4 else 2.5 / blocks + 0.2 * config.persistent
    return (reads + ends + 0.05 * abs(config.group_m - 8)) * (1 + spilled)


@pytest.mark.parametrize("persistent", [False, True])
def test_starting_points_reach_what_single_steps_do_not(persistent):
    (first, *_) = [config for config in shipped("down", 90, 2) if config.BLOCK_N == 256]

    def timer(runs):
        return [modelled(config) if persistent or not config.persistent else 100.0 for config in of(runs)]

    def best(begin: list[Config]) -> Config:
        tried = search(Problem("down", "down", 2048, 768, lambda config: lambda: config), begin, timer)
        return min(tried, key=lambda config: tried[config])

    found = best(starts("down", 90, 2, first))
    assert best([first]) != found, "the model has a local optimum at the shipped configuration"
    assert found.persistent if persistent else (found.BLOCK_N, found.warps) == (128, 4)


def test_starting_points_are_for_half_precision_on_hopper_and_newer():
    (first, *others) = shipped("down", 80, 2)
    assert starts("down", 80, 2, first) == [first, *others]
    assert starts("down", 90, 4, first)[0] == first
    assert not any(config.tma for config in starts("down", 90, 4, first))
    for kernel, configs in STARTS.items():
        assert set(configs) <= set(starts(kernel, 90, 2, configs[0]))


@pytest.mark.slow
def test_every_kernel_of_a_layer_is_tuned_and_the_entries_are_found(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    triton_configs.use(b"")
    wanted, said = Config(64, 32, 32, 4, 3, 8), []
    entries = tune(TINY, CPU, lambda runs: [distance(config, wanted) for config in of(runs)], said.append)
    assert [e.kernel for e in entries] == ["up", "down", "combine", "down_dgrad", "up_dgrad", "wgrad", "wgrad"]
    assert {e.config for e in entries if e.kernel != "combine"} == {wanted}
    assert {(e.arch, e.itemsize, e.rows) for e in entries} == {(80, 4, 4)}
    assert len(said) == len(entries), "progress: a line a kernel"
    for entry in entries:
        assert choose(entries, [], entry.kernel, 80, entry.n, entry.k, 512, 4) == entry.config


def test_what_is_measured_is_what_a_layer_looks_up(monkeypatch):
    asked = set()
    lookup = triton_mlp.lookup
    monkeypatch.setattr(triton_mlp, "lookup", lambda *key: asked.add(key[:1] + key[2:4]) or lookup(*key))
    d, f, experts, k, tokens = TINY[:5]
    up, down = (torch.randn(size, requires_grad=True) for size in ((experts, 2, f, d), (experts, d, f)))
    index = torch.arange(tokens * k) // k
    rows = Rows(torch.randn(tokens, d, requires_grad=True), index, torch.ones(tokens * k), torch.tensor([3, 5]))
    triton_mlp.grouped_mlp(rows, ExpertWeights(up, down), "silu").square().sum().backward()
    assert asked == {(p.kernel, p.n, p.k) for p in problems(TINY, CPU)}


@pytest.mark.parametrize("kernel", triton_configs.KERNELS)
def test_neighbours_differ_in_one_thing_that_the_kernel_uses(kernel):
    (config, *_) = shipped(kernel, 90, 2)
    near = neighbours(kernel, config)
    assert near
    for other in near:
        (changed,) = [name for name in Config._fields if getattr(config, name) != getattr(other, name)]
        assert kernel != "combine" or changed in ("BLOCK_N", "warps")


def test_a_configuration_that_does_not_run_is_passed_over_unless_it_is_the_shipped_one(monkeypatch):
    calls = []

    def timer(runs):
        calls.append(len(runs))
        return [1.0] * len(runs)

    monkeypatch.setattr("moe.kernels.tune.up", lambda *_: (_ for _ in ()).throw(RuntimeError("PassManager::run failed")))
    with pytest.raises(ConfigError, match="up does not run here as BLOCK_M"):
        tune(TINY, CPU, timer, print)
    assert calls == []


def test_a_table_keeps_the_entries_of_other_shapes_and_says_where_it_is_from(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    path = tmp_path / "new" / "triton.json"
    first = triton_configs.Entry("up", 90, 2, 768, 2048, 512, Config(128, 128, 64, 8, 3, tma=True))
    write([first], path, CPU)
    write([first._replace(n=1024), first._replace(config=Config(64, 128, 64, 4, 3))], path, CPU)
    entries = read(path.read_bytes(), str(path))
    assert [(e.n, e.config.BLOCK_M) for e in entries] == [(1024, 128), (768, 64)]
    head = json.loads(path.read_text())
    assert head["device"] == "a GPU"
    assert {"triton", "date"} < head.keys()
    assert [p.name for p in path.parent.iterdir()] == ["triton.json"]
