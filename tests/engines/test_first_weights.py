from __future__ import annotations

import json
from importlib.util import find_spec

import pytest
import torch

from moe.config import load
from moe.routers import draw as drawing
from moe.train.loop import train as run
from tests.engines.tiny_job import batch, engine, model, whole
from tests.workers import run_ranks

SIGMA = {"name": "sigma", "k": 2}  # laws of its own for routers and experts, one over whole rows
COMET = {"name": "local_search", "router": {"name": "comet", "k": 2}}


def parameters(rank, world, cases):
    found = []
    for case in cases:
        job = engine(**case)
        state = whole(job.canonical_state())
        found.append({name: state[f"model.{name}"] for name in job.shapes} if rank == 0 else None)
    return found


def alone(**shape):
    built = model(**shape).to_empty(device="cpu")
    built.initialise(0)
    return dict(built.named_parameters())


def check(world, cases):
    for case, found in zip(cases, run_ranks(world, parameters, cases, timeout=120)[0], strict=True):
        shape = {key: case[key] for key in ("router", "experts", "width") if key in case}
        dtype = {"float64": torch.float64}.get(case.get("dtype", "float64"), torch.float32)
        wanted = alone(**shape)
        assert found.keys() == wanted.keys()
        for name, value in found.items():
            assert value.dtype == dtype
            assert torch.equal(value, wanted[name].to(dtype)), (world, case, name)


def test_every_layout_begins_with_the_weights_of_one_process():
    # six experts are cut into three and three over two ranks, and along their width over four
    fsdp = {"name": "fsdp2", "dtype": "float32"}
    check(2, [{"router": router, "expert_ranks": ranks} for router in (SIGMA, COMET) for ranks in (1, 2)] + [fsdp | {"router": SIGMA}])
    check(
        4,
        [
            {"dtype": "bfloat16", "expert_ranks": 2},
            {"copies": {"policy": "cost"}, "expert_ranks": 2, "router": COMET},
            fsdp,
            fsdp | {"router": SIGMA, "expert_ranks": 2},
            fsdp | {"replicas": 2, "dtype": "bfloat16"},
            fsdp | {"replicas": 2, "expert_ranks": 2, "router": SIGMA},
        ],
    )
    check(3, [fsdp | {"router": SIGMA}, fsdp | {"experts": 4, "width": 6}])  # matrices of 16 rows: six, six and four


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")
@pytest.mark.slow
def test_deepspeed_begins_with_the_weights_of_one_process():
    zero = [{"name": "deepspeed", "dtype": "float32", "zero": stage} for stage in range(4)]
    check(2, [*zero, zero[1] | {"expert_ranks": 2, "router": SIGMA}])


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_an_engine_without_weights_refuses_to_use_them(name):
    for message in run_ranks(1, without, name)[0]:
        assert "first_weights=False" in message


def without(rank, world, name):
    said, job = [], engine(name, first_weights=False)
    for use in (lambda: job.step(batch(0), 0, 1e-3), lambda: job.evaluate(batch(0), 0)):
        try:
            use()
        except RuntimeError as error:
            said.append(str(error))
    given = engine(name)
    job.load_canonical(whole(given.canonical_state()))
    one, other = (made.step(batch(0), 0, 1e-3).loss.item() for made in (job, given))
    assert one == other
    return said if len(said) == 2 else ["neither was refused"]


RECIPE = """
model: {layers: 2, d_model: 16, heads: 2, moe: {experts: 4, d_expert: 8, router: %s}}
data: {sequence: 16, sources: [{name: text, paths: ["%s"]}], validation: 0.3}
train: {steps: 4, batch: 2}
schedule: {name: constant}
evaluate: {every: 4, sequences: 2, sample_tokens: 0}
checkpoint: {every: 2, mode: blocking}
parallel: {device: cpu}
"""


@pytest.fixture
def begin(tmp_path):
    """Runs a recipe; gives its losses, and the elements drawn for it by parameter."""
    for number in range(8):
        (tmp_path / f"{number}.txt").write_text(f"def f{number}(x):\n    return x * {number}\n" * 40)

    def start(name, *changes, router="{name: dselect_k}"):
        file = tmp_path / "recipe.yaml"
        file.write_text(RECIPE % (router, tmp_path / "*.txt"))
        drawn, own = {}, drawing.draw_

        def counted(target, law, key, box, shape):
            drawn[key[1]] = drawn.get(key[1], 0) + target.numel()
            own(target, law, key, box, shape)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("moe.model.initialise.draw_", counted)
            run(load([file], [f"run.folder={tmp_path / name}", *changes]))
        rows = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        return {row["step"]: row["loss"] for row in rows if "loss" in row}, drawn

    return start


def test_nothing_is_drawn_where_a_checkpoint_is_loaded(begin):
    losses, drawn = begin("whole", "log.every=1")
    with torch.device("meta"):
        shapes = model({"name": "dselect_k"}, experts=4, width=8)
    assert set(drawn) == {name for name, _ in shapes.named_parameters()}
    begin("cut", "log.every=1", "train.steps=2")
    again, drawn = begin("cut", "log.every=1")
    assert drawn == {}
    assert again == losses


def test_of_a_model_that_is_named_only_what_its_folder_lacks_is_drawn(begin, tmp_path):
    begin("origin", "train.steps=1")
    _, drawn = begin("on", f"init.from={tmp_path / 'origin'}", "train.steps=1")
    assert drawn == {}
    # a folder of weights that knows nothing of a router's biases, as surgery writes them
    lacking = lack(tmp_path / "origin" / "weights", "_bias")
    assert len(lacking) == 4
    _, drawn = begin("fresh", f"init.from={tmp_path / 'origin'}", "train.steps=1")
    assert set(drawn) == lacking


def lack(folder, ending):
    """Take tensors out of a folder of weights; gives their names."""
    from safetensors.torch import load_file, save_file

    gone = set()
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        gone |= {name for name in tensors if name.endswith(ending)}
        save_file({name: tensor for name, tensor in tensors.items() if not name.endswith(ending)}, file)
    return gone
