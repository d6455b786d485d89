"""Compile every shipped configuration ahead of time, and read from the machine code what no test of numbers sees. Needs no GPU.

    python tests/kernels/compile_gate.py [--fast] [--update] [--table FILE] [CASE...]

A CASE is a part of the names printed; --fast leaves out what differs little; --update writes golden_sm.json. A program of its
own, because a process in which Triton interprets cannot compile. What is compiled is what `moe.kernels.tune` launches.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":  # before Triton is imported, and for the workers
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime.jit import JITFunction

from moe.kernels.triton_configs import SHARED_KIB, SHIPPED, Config, Shape, read
from moe.kernels.triton_softmax import loss_and_gradient
from moe.kernels.triton_sort import sort
from moe.kernels.triton_split import stacked
from moe.kernels.triton_tiles import tile_map, tiles
from moe.kernels.triton_top_k import top_k
from moe.kernels.tune import STARTS, problems

GOLDEN = Path(__file__).with_name("golden_sm.json")
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
DTYPES = {2: (torch.bfloat16, torch.float16), 4: (torch.float32,)}
KINDS: dict[str, Callable[[Shape], Shape]] = {
    "": lambda shape: shape,
    "ungated": lambda shape: shape._replace(gated=False),
    "without keeping": lambda shape: shape._replace(keep=False),
    "of any fan-out": lambda shape: shape._replace(fixed=False),
    "scaled": lambda shape: shape._replace(scaled=True),
    "added": lambda shape: shape._replace(main_grad=torch.float32),
}
AFFECTED = {  # kernels that differ
    "ungated": ("up", "down_dgrad"),
    "without keeping": ("up",),
    "of any fan-out": ("combine",),
    "scaled": ("down_dgrad",),
    "added": ("wgrad",),
}


def decide(experts: int, k: int, biased: bool) -> None:
    """The router's choice and its gradient."""
    logits = torch.empty(512, experts, device="meta", requires_grad=True)
    valid, bias = torch.empty(512, dtype=torch.bool, device="meta"), torch.empty(experts, device="meta") if biased else None
    chosen = top_k(logits, valid, bias, k, not biased, 1.0)
    torch.autograd.backward([chosen.weight.sum(), chosen.probability.sum(), chosen.z])


PLANS = {  # kernels that have no configurations
    "sort": lambda: sort(torch.empty(65536, dtype=torch.int64, device="meta"), 512),
    "cross entropy": lambda: loss_and_gradient(
        torch.empty(64, 151936, device="meta"), torch.empty(64, dtype=torch.int64, device="meta"), torch.bfloat16
    ),
    "top-k": lambda: decide(128, 8, False),
    "biased top-k": lambda: decide(512, 16, True),
    "split": lambda: stacked(torch.empty(4096, 128, device="meta"), (0, 1, 2, 1, 2, 2), 1),
    "tile map": lambda: tiles(torch.empty(512, dtype=torch.int64, device="meta"), 65536, 128),
}
PRODUCTS = ("up", "down", "down_dgrad", "up_dgrad", "wgrad")
# Instructions, by what they are: products on tensor cores or without, copies that run beside them, private memory
MMA = {80: r"HMMA", 89: r"HMMA", 90: r"HGMMA", 100: r"UTC\w*MMA"}
COUNTED = {"copies": r"LDGSTS|UTMALDG", "local": r"STL|LDL"}
# The same in PTX, where loops still have names
PRODUCT = r"wgmma\.mma_async|mma\.sync|tcgen05\.mma|fma\.rn\.f32"
COPY = r"cp\.async\.commit_group|cp\.async\.bulk\.tensor"
WAIT = r"cp\.async\.wait_group\s+(\d+)"
UNFINISHED = r"wgmma\.wait_group\.sync\.aligned\s+[1-9]|tcgen05\.mma"  # the product of a step runs on while the next begins
BUFFERS = r"ttg\.local_alloc : \(\) -> !ttg\.memdesc<(\d+)x[\dx]+x(?:bf16|f16|f32)"  # in TTGIR
ADVICE = r"(?:Potential Performance Loss|warning).*"  # of ptxas: "wgmma.mma_async instructions are serialized due to …"
_MANY = 20  # cases
PER_SM = {80: (164, 64), 89: (100, 48), 90: (228, 64), 100: (228, 64)}  # KiB of shared memory, 1 of them a block's own; warps


class Case(NamedTuple):
    """A kernel of one kind of expert, for one architecture and dtype, in one shipped configuration; None if it has none."""

    kernel: str
    kind: str
    arch: int
    dtype: torch.dtype
    config: Config | None

    @property
    def name(self) -> str:
        start = f"sm_{self.arch} {self.kernel}{' ' * bool(self.kind)}{self.kind}"
        if self.config is None:
            return start
        m, n, k, warps, stages, _, tma, persistent = self.config
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{start} {dtype} {m}x{n}x{k} w{warps} s{stages}{' tma' * tma}{' persistent' * persistent}"


def cases(table: Path, fast: bool) -> list[Case]:
    """Every configuration of a table, and where tuning begins; fast: of each product on Hopper the one for most rows, in bfloat16."""
    entries = read(table.read_bytes(), str(table))
    if fast:
        first = {e.kernel: e.config for e in reversed(entries) if e.arch == 90 and e.itemsize == 2 and e.kernel in PRODUCTS}
        return [Case(kernel, "", 90, torch.bfloat16, first[kernel]) for kernel in sorted(first)]
    found = [Case(name, "", arch, torch.bfloat16, None) for arch in SHARED_KIB for name in PLANS]
    for entry in entries:
        kinds = [kind for kind in KINDS if not kind or entry.kernel in AFFECTED[kind]]
        found += [Case(entry.kernel, kind, entry.arch, dtype, entry.config) for dtype in DTYPES[entry.itemsize] for kind in kinds]
    if table == SHIPPED:
        found += [Case(kernel, "", 90, torch.bfloat16, config) for kernel, configs in STARTS.items() for config in configs]
    return list(dict.fromkeys(found))


def launch(case: Case) -> None:
    """Call what a case names on tensors without memory."""
    if case.config is None:
        PLANS[case.kernel]()
        return
    for problem in problems(KINDS[case.kind](Shape(dtype=case.dtype)), torch.device("meta")):
        if problem.kernel == case.kernel:
            problem.prepare(case.config)()


def compile(case: Case) -> dict[str, dict[str, Any]]:
    """Figures of each kernel that a case launches."""
    made = {}

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        kernel: Any = run(self, *args, grid=grid, warmup=True, **kwargs)
        if case.config is not None and self is tile_map:  # has a case of its own
            return
        names = [kernel.metadata.name, *(f"{kernel.metadata.name} {i}" for i in range(2, 9))]
        name = next(name for name in names if made.get(name) in (None, kernel))
        made[name] = kernel

    run = JITFunction.run
    JITFunction.run = compile_only
    absent: Any = _Absent(case.arch)
    triton.runtime.driver.set_active(absent)
    try:
        launch(case)
    finally:
        JITFunction.run = run
    return {name: figures(kernel, case.arch) for name, kernel in made.items()}


def variants(arch: int = 90) -> dict[str, int]:
    """How many variants of each kernel are compiled for token counts that differ: without one, by Triton's own key.

    The tensors lie in memory, because their addresses are part of the key: a pointer's kernel is compiled for multiples of 16 or not.
    """
    keys: dict[str, set[str]] = {}

    def bind_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        *_, binder = self.device_caches[arch]
        keys.setdefault(f"{self.fn.__name__} {kwargs.get('GATHER_LEFT', '')}".strip(), set()).add(
            str(binder(*args, **kwargs, debug=False)[1:])
        )

    run = JITFunction.run
    JITFunction.run = bind_only
    absent: Any = _Absent(arch)
    triton.runtime.driver.set_active(absent)
    try:
        for tokens in range(16, 144, 16):  # a slot more each time
            for problem in problems(Shape(d=32, f=16, experts=3, k=1, tokens=tokens), torch.device("cpu")):
                problem.prepare(Config(16, 512, 16, 4, 1) if problem.kernel == "combine" else Config(16, 16, 16, 4, 3))()
    finally:
        JITFunction.run = run
    return {name: len(found) for name, found in keys.items()}


class _Absent:
    """The driver of a GPU that is not there."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # kernels are kept by device

    def get_current_stream(self, device: int) -> int:
        return 0


def figures(kernel: Any, arch: int) -> dict[str, Any]:
    """What the compiler's outputs say about a kernel: see `code`, `pipeline`, `blocks`."""
    found = code(kernel.asm["cubin"], arch) | {"shared": kernel.metadata.shared}
    found |= pipeline(kernel.asm["ttgir"], kernel.asm["ptx"])
    return found | {"blocks": blocks(arch, found, kernel.metadata.num_warps), "advice": advice(kernel.asm["ptx"], arch)}


@functools.cache
def code(cubin: bytes, arch: int) -> dict[str, int]:
    """Registers of a thread, bytes of stack, and numbers of instructions, by the tools that Triton brings."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        code = subprocess.run([TOOLS / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True).stdout
    instructions = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)", code, re.MULTILINE)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    assert instructions, code
    counts = {key: sum(bool(re.fullmatch(pattern, word)) for word in instructions) for key, pattern in COUNTED.items()}
    mma = sum(bool(re.fullmatch(MMA[arch], word)) for word in instructions)
    return {"registers": int(found[1]), "stack": int(found[2]), "instructions": len(instructions), "mma": mma, **counts}


def pipeline(ttgir: str, ptx: str) -> dict[str, Any]:
    """Buffers of a tile in shared memory, steps whose copies are under way while the product loop waits, and the product's shape.

    With 4 buffers on Hopper, step i waits for tile i; copies of two more steps are under way, and the product of step i - 1
    may still read the fourth buffer (`cp.async.wait_group 4` with two copies a step):

        tile     i - 1         i          i + 1       i + 2
                 multiplied    awaited    copied      copied        ahead = 2
    """
    buffers = min((int(number) for number in re.findall(BUFFERS, ttgir)), default=0)
    loop = product_loop(ptx)
    waits = [int(number) for number in re.findall(WAIT, loop)]
    if waits:
        ahead = min(waits) // max(len(re.findall(r"cp\.async\.commit_group", loop)), 1)
    elif re.search(r"cp\.async\.bulk\.tensor", loop):  # by TMA alone: barriers of single buffers, which name no number
        ahead = buffers - 1 - bool(re.search(UNFINISHED, loop))
    else:
        ahead = 0
    shapes = {shape: int(width) for shape, width in re.findall(r"mma(?:_async)?\.sync\.aligned\.(m\d+n(\d+)k\d+)", loop)}
    return {"buffers": buffers, "ahead": ahead, "shape": max(shapes, key=lambda shape: shapes[shape], default="")}


def product_loop(ptx: str) -> str:
    """The shortest loop that multiplies and copies; empty if there is none."""
    lines, labels, loops = ptx.splitlines(), {}, []
    for i, line in enumerate(lines):
        if label := re.match(r"(\$L__BB\w+):", line):
            labels[label[1]] = i
        elif (target := re.search(r"\bbra(?:\.uni)?\s+(\$L__BB\w+);", line)) and target[1] in labels:
            loops.append("\n".join(lines[labels[target[1]] : i]))
    return min((loop for loop in loops if re.search(PRODUCT, loop) and re.search(COPY, loop)), key=len, default="")


def blocks(arch: int, found: dict[str, Any], warps: int) -> int:
    """Thread blocks that a multiprocessor holds at once: by registers (65,536, eight a thread at a time), shared memory and warps."""
    shared, most_warps = PER_SM[arch]
    by_registers = 65536 // (-(-max(found["registers"], 1) // 8) * 8 * 32 * warps)
    return min(by_registers, shared * 1024 // (found["shared"] + 1024), most_warps // warps)


@functools.cache
def advice(ptx: str, arch: int) -> str:
    """What ptxas warns of."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        suffix = "a" if arch >= 90 else ""
        command = [get_ptxas(arch).path, "-v", f"--gpu-name=sm_{arch}{suffix}", file.name, "-o", os.devnull]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return "; ".join(re.findall(ADVICE, log))


def faults(case: Case, made: dict[str, dict[str, Any]]) -> list[str]:
    """What is wrong with a case, in sentences."""
    wrong = []
    for name, found in made.items():
        if found["stack"] or found["local"]:
            wrong.append(
                f"{name} keeps values in local memory ({found['stack']} bytes of stack, {found['local']} loads and stores); "
                "take more warps, a smaller tile, or an epilogue in more pieces"
            )
        if found["shared"] > SHARED_KIB[case.arch] * 1024:
            wrong.append(f"{name} needs {found['shared'] / 1024:.0f} KiB of shared memory; take fewer stages or a smaller tile")
        if found["advice"]:
            wrong.append(f"{name}: ptxas warns: {found['advice']}")
    if case.kernel in PRODUCTS:
        if case.dtype != torch.float32 and not any(found["mma"] for found in made.values()):
            wrong.append(f"no {MMA[case.arch]}: nothing is multiplied on tensor cores")
        if not any(found["copies"] for found in made.values()):
            wrong.append("no asynchronous copy: loads wait for products; are widths known to be multiples of 16?")
        multiplying = {name: found for name, found in made.items() if found["buffers"]}
        for name, found in multiplying.items():
            if found["ahead"] < 1:
                wrong.append(f"{name} has {found['buffers']} buffers and waits for all copies in every step; take more stages")
            if (case.kernel, case.arch, case.dtype.itemsize) == ("down_dgrad", 90, 2) and found["blocks"] < 2:  # its epilogue is long
                wrong.append(f"{name} runs one block a multiprocessor with {found['registers']} registers; take a smaller tile")
        if not multiplying:
            wrong.append("no buffer in shared memory: the product loop is not pipelined")
    return [f"{case.name}: {sentence}" for sentence in wrong]


def differences(golden: dict[str, Any], made: dict[str, Any]) -> list[str]:
    """What changed since golden_sm.json was written, a line a kernel; cases that were not compiled now are left out."""
    lines = []
    for case, kernels in made.items():
        for name in sorted(kernels.keys() | golden.get(case, {}).keys()):
            old, new = golden.get(case, {}).get(name), kernels.get(name)
            if old != new:
                changed = new and old and ", ".join(f"{key} {old.get(key)} → {new[key]}" for key in new if old.get(key) != new[key])
                lines.append(f"{case} [{name}]: {changed or ('new' if new else 'gone')}")
    return lines


def _compiled(case: Case) -> tuple[str, dict[str, dict[str, Any]], list[str]]:
    try:
        made = compile(case)
    except Exception as error:  # of a compiler: anything
        return case.name, {}, [f"{case.name}: does not compile: {type(error).__name__}: {str(error).splitlines()[-1:]}"]
    return case.name, made, faults(case, made)


def _all(chosen: list[Case]) -> Iterator[tuple[str, dict[str, dict[str, Any]], list[str]]]:
    """What comes of each case; many are shared between two processes, whose imports take seconds."""
    if len(chosen) < _MANY:
        yield from map(_compiled, chosen)
        return
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        yield from pool.map(_compiled, chosen)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--fast", action="store_true")
    parser.add_argument("--update", action="store_true")
    parser.add_argument("--table", type=Path, default=SHIPPED)
    parser.add_argument("parts", nargs="*", metavar="CASE")
    asked = parser.parse_args()
    chosen = [case for case in cases(asked.table, asked.fast) if all(part in case.name for part in asked.parts)]
    wrong, made = [], {}
    for name, kernels, complaints in _all(chosen):
        made[name] = kernels
        wrong += complaints
        for kernel, found in kernels.items():
            print(f"{name} [{kernel}]: " + ", ".join(f"{key} {value}" for key, value in found.items()), flush=True)
    several = {name: number for name, number in variants().items() if number > 1}
    wrong += [f"{name}: {number} variants are compiled for 8 token counts; align its pointers" for name, number in several.items()]
    print(*wrong, sep="\n", file=sys.stderr)
    return finish(made, wrong, update=asked.update)


def finish(made: dict[str, Any], wrong: list[str], *, update: bool) -> int:
    """Compare with golden_sm.json, or write it; the exit code."""
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {"triton": triton.__version__, "cases": {}}
    if update:
        shipped = {case.name for case in cases(SHIPPED, fast=False)}
        kept = {name: kernels for name, kernels in golden["cases"].items() if name in shipped}
        lines = [f"  {json.dumps(name)}: {json.dumps(kernels)}" for name, kernels in sorted((kept | made).items())]
        GOLDEN.write_text(f'{{"triton": "{triton.__version__}", "cases": {{\n' + ",\n".join(lines) + "\n}}\n")
    elif golden["triton"] != triton.__version__:
        print(f"not compared with golden_sm.json, which is of triton {golden['triton']}; this is {triton.__version__}")
    elif changed := differences(golden["cases"], made):
        print(*changed, sep="\n", file=sys.stderr)
        print("the machine code changed; if that is meant: python tests/kernels/compile_gate.py --update", file=sys.stderr)
        return 1
    return 1 if wrong or not made else 0


if __name__ == "__main__":
    sys.exit(main())
