"""Start fingerprint: ranks that would compute different things stop before they exchange anything.

On gloo ranks that disagree are not an error but wrong numbers.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import torch

import moe
from moe.errors import RankMismatch
from moe.parallel.mesh import Mesh

_SHOWN = 5  # differing keys in the message


def check_agreement(mesh: Mesh, facts: Mapping[str, str]) -> None:
    """Raise RankMismatch on every rank unless all have the same facts, code, versions and thread count.

    The message names each key that differs, with its values and their ranks.
    """
    mine = dict(facts) | environment()
    text = json.dumps(mine, sort_keys=True).encode()
    if len(set(mesh.gather(hashlib.sha256(text).digest()))) == 1:
        return
    everyone = [json.loads(other) for other in mesh.gather(text)]
    differing = []
    for key in sorted(set().union(*everyone)):
        holders = defaultdict(list)
        for rank, theirs in enumerate(everyone):
            holders[theirs.get(key, "absent")].append(rank)
        if len(holders) > 1:
            differing.append(f"{key} is " + " and ".join(f"{value} on {name_ranks(ranks)}" for value, ranks in holders.items()))
    more = f"; and {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else ""
    raise RankMismatch(f"ranks disagree: {'; '.join(differing[:_SHOWN])}{more}; give every rank the same files, arguments and versions")


def environment() -> dict[str, str]:
    """What beside the recipe decides the numbers that this rank computes."""
    return {
        "code": code_hash(Path(moe.__file__).parent),
        "moe": moe.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": str(torch.get_num_threads()),
    }


def code_hash(folder: Path) -> str:
    """Twelve hex digits of the Python files under a folder, names and contents."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(folder)}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:12]


def name_ranks(ranks: list[int]) -> str:
    """Ranks in words: "rank 2", or "ranks 0, 1, 3"."""
    shown = ", ".join(map(str, ranks[:8])) + (", …" if len(ranks) > 8 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"
