"""Fewer or more experts: a `Mapping` from old to new ones, which weights, router rows, biases and moments all follow.

Exact, to rounding: keeping all in any order; cloning each of E experts m times with k becoming m * k (`cloned_router`), which for
combine weights that are neither renormalised nor a softmax needs the down-projections divided by m, and for a softmax the bias of
its selection; merging such clones again with k divided by m. Cloning some more often than others, or with k as it was, is not:
the selection counts clones as rivals, and noise on their rows only chooses among equals. Merging different experts and pruning are
approximations, to be measured.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe.errors import ConfigError
from moe.kernels.reference import ACTIVATIONS
from moe.model.initialise import stream
from moe.model.transformer import Transformer
from moe.routers.base import Tokens
from moe.shapes import Float, Int
from moe.surgery.clusters import groups_by_likeness
from moe.surgery.routers import hidden_states, weights_of

# What a router holds that has one row an expert; anything else of these routers does not depend on the experts.
ROUTER_ROWS = {
    "top_k": ("weight", "bias"),
    "noisy_top_k": ("weight", "noise_weight"),
    "expert_choice": ("weight",),
    "sinkhorn": ("weight",),
    "base": ("weight",),
    "sparse_ot": ("weight",),
    "sigma": ("weight",),
    "sparse_mixer": ("weight",),
    "dense_to_sparse": ("weight", "bias"),
    "remoe": ("weight",),
    "avg_k": (),
}
_CHUNK = 1 << 22  # numbers held in float64 at a time


@dataclass(frozen=True)
class Mapping:
    """Each new expert as a weighted sum of old ones; `order`: the channels of each old one in the order in which they are summed."""

    weight: Float[Tensor, "new old"]  # float64
    order: Int[Tensor, "old f"] | None = None

    @property
    def new(self) -> int:
        return self.weight.shape[0]

    @property
    def old(self) -> int:
        return self.weight.shape[1]

    @property
    def copies(self) -> int | None:
        """How many new experts each old one has become, if every new one is an old one and all have equally many; else None."""
        counts = (self.weight == 1).sum(0)
        one_hot = bool(((self.weight == 1).sum(1) == 1).all()) and int((self.weight != 0).sum()) == self.new
        return int(counts[0]) if one_hot and counts.unique().numel() == 1 else None

    def expert(self, new: int, read: Callable[[int], Tensor], channels: int | None = None) -> Tensor:
        """One new expert's tensor (matrix, row or bias) from those of old experts, read one at a time.

        channels: the dimension along which the tensor has channels, if it has.
        """
        sources = self.weight[new].nonzero().flatten().tolist()
        if len(sources) == 1 and self.weight[new, sources[0]] == 1:
            return self._ordered(sources[0], read(sources[0]), channels)
        total, dtype = None, torch.float32
        for old in sources:
            tensor = read(old)
            dtype = tensor.dtype
            part = self._ordered(old, tensor, channels).to(torch.promote_types(dtype, torch.float32)) * self.weight[new, old].item()
            total = part if total is None else total + part
        assert total is not None
        return total.to(dtype)

    def stack(self, old: Float[Tensor, "old *rest"], channels: int | None = None) -> Float[Tensor, "new *rest"]:
        """A stack of tensors, one an expert; `channels` counts the dimensions of one of them."""
        new = old.new_empty(self.new, *old.shape[1:])
        for e in range(self.new):
            new[e] = self.expert(e, old.__getitem__, channels)
        return new

    def _ordered(self, old: int, tensor: Tensor, channels: int | None) -> Tensor:
        return tensor if self.order is None or channels is None else tensor.index_select(channels, self.order[old])


def keep(experts: Sequence[int], of: int) -> Mapping:
    """Those experts alone, in this order."""
    if wrong := [e for e in experts if not 0 <= e < of]:
        raise ConfigError(f"expert {wrong[0]} of {of} is none to keep; choose from 0 to {of - 1}")
    if twice := [e for e in experts if experts.count(e) > 1]:
        raise ConfigError(f"expert {twice[0]} is named {experts.count(twice[0])} times among those to keep; name it once")
    return Mapping(torch.eye(of, dtype=torch.float64)[list(experts)])


def clone(experts: int, to: int, load: Float[Tensor, " E"] | None = None) -> Mapping:
    """Each expert as often as goes evenly, the busiest (or first) ones once more; an expert's clones are neighbours."""
    if to < experts:
        raise ConfigError(f"{experts} experts do not grow to {to}; choose at least {experts}, or merge them")
    counts = torch.full((experts,), to // experts)
    busiest = torch.arange(experts) if load is None else load.double().argsort(dim=0, descending=True, stable=True)
    counts[busiest[: to % experts]] += 1
    return Mapping(torch.eye(experts, dtype=torch.float64).repeat_interleave(counts, 0))


def merge(groups: Sequence[Sequence[int]], load: Float[Tensor, " E"] | None = None, order: Int[Tensor, "old f"] | None = None) -> Mapping:
    """Each group's mean, weighted by the experts' loads where given; see `merged_like` for groups."""
    experts = sum(len(group) for group in groups)
    share = torch.ones(experts, dtype=torch.float64) if load is None else load.double()
    weight = torch.zeros(len(groups), experts, dtype=torch.float64)
    for new, group in enumerate(groups):
        members = torch.tensor(group)
        parts = share[members] if share[members].sum() > 0 else torch.ones(len(group), dtype=torch.float64)
        weight[new, members] = parts / parts.sum()
    return Mapping(weight, order)


def merged_like(likeness: Float[Tensor, "E E"], to: int, load: Float[Tensor, " E"] | None = None) -> Mapping:
    """The mapping to `to` experts that joins those most alike, weighted by load."""
    if not 1 <= to <= len(likeness):
        raise ConfigError(f"{len(likeness)} experts do not merge into {to}; choose from 1 to {len(likeness)}")
    return merge(groups_by_likeness(likeness, to), load)


@torch.no_grad()
def merged_by_outputs(model: Transformer, ids: Int[Tensor, "b s"], to: int) -> dict[int, Mapping]:
    """For each sparse layer the mapping that joins experts whose outputs are most alike on a text, weighted by load there.

    Outputs do not tell in which order channels stand, so each expert's are first put into that of its group's first.
    """
    found = {}
    for layer, hidden in hidden_states(model, ids).items():
        if layer not in (routers := model.routers()):
            continue
        experts = model.layers[layer].get_submodule("moe.experts")
        up, down = experts.get_parameter("up"), experts.get_parameter("down")
        if not 1 <= to <= len(up):
            raise ConfigError(f"{len(up)} experts do not merge into {to}; choose from 1 to {len(up)}")
        groups = groups_by_likeness(output_likeness(zip(up, down, strict=True), hidden, model.settings.activation), to)
        load = routers[layer](hidden, Tokens.of(hidden)).load(len(up))
        found[layer] = merge(groups, load, aligned(groups, up, down))
    return found


class Cloned(NamedTuple):
    """What it takes for cloned experts to be the old layer."""

    router: dict[str, Any]
    down: float  # factor on the experts' down-projections
    bias: float  # factor on the bias that the selection adds to scores


def cloned_router(router: dict[str, Any], copies: int | None) -> Cloned:
    """The router, and the factors, with which experts cloned so often (see `Mapping.copies`) are the old layer."""
    weights = weights_of(router)
    if copies is None or weights == "sparse_mixer" or router.get("groups", 1) > 1 or "k" not in router:
        raise ConfigError(
            "only experts that are all cloned equally often, under a router that weighs k of them at once and without groups, keep the "
            "layer's function; choose a multiple of the experts there are, or accept a measured difference"
        )
    # a softmax is shared out among clones, and its bias with it; a sigmoid is each clone's own
    bias = 1 / copies if router.get("score", "softmax") == "softmax" else 1.0
    return Cloned(router | {"k": router["k"] * copies}, 1 / copies if weights == "sigmoid" else 1.0, bias)


def parted_rows(rows: Float[Tensor, "E d"], mapping: Mapping, *, std: float, seed: int, layer: int) -> Float[Tensor, "E d"]:
    """Rows of cloned experts with noise on every clone but an expert's first, so that training can tell them apart."""
    first = torch.zeros(mapping.new, dtype=torch.bool).index_fill(0, mapping.weight.argmax(0), True)
    draw = torch.randn(rows.shape, generator=torch.Generator().manual_seed(stream(seed, layer, "parted")))
    noisy = rows.to(torch.promote_types(rows.dtype, torch.float32)) + std * draw
    return torch.where(first[:, None], rows, noisy.to(rows.dtype))


def remapped(name: str, tensor: Tensor, mapping: Mapping, router: str) -> Tensor:
    """A tensor of one of our MoE layers, or a moment of it, after the mapping; `name` ends as in "layers.0.moe.experts.up"."""
    if router not in ROUTER_ROWS:
        raise ConfigError(
            f"the state of router.name={router} is not one row an expert, so that experts cannot be taken away or added; "
            f"this is possible with {', '.join(ROUTER_ROWS)}"
        )
    found = re.search(r"(?:^|\.)moe\.(experts|router)\.(\w+)$", name)
    if found is None:
        return tensor
    part, own = found.groups()
    if part == "experts":
        return mapping.stack(tensor, {"up": 1, "down": 1}[own])
    return mapping.stack(tensor) if own in ROUTER_ROWS[router] else tensor


def layer_of(name: str) -> int | None:
    """The layer whose mapping a tensor of a state follows; None: it follows none."""
    found = re.search(r"(?:^|\.)layers\.(\d+)\.moe\.(?:experts|router)\.\w+$", name)
    return int(found[1]) if found else None


def weight_likeness(*stacks: Float[Tensor, "E *rest"]) -> Float[Tensor, "E E"]:
    """Cosine between the experts' weights, all matrices together; blind to channels in another order (see `align`)."""
    experts = len(stacks[0])
    inner = torch.zeros(experts, experts, dtype=torch.float64)
    for stack in stacks:
        for part in stack.flatten(1).split(max(1, _CHUNK // experts), 1):
            part = part.double()
            inner += part @ part.T
    return _cosine(inner)


@torch.no_grad()
def output_likeness(
    experts: Iterable[tuple[Float[Tensor, "g f d"], Float[Tensor, "d f"]]], x: Float[Tensor, "t d"], activation: str
) -> Float[Tensor, "E E"]:
    """Mean cosine between what the experts make of the same vectors, x; the experts are (up, down), one read at a time."""
    outputs = []
    for up, down in experts:
        hidden = [x @ rows.to(x.dtype).T for rows in up]
        act = ACTIVATIONS[activation](hidden[0])
        y = (act * hidden[1] if len(hidden) == 2 else act) @ down.to(x.dtype).T
        outputs.append(torch.nn.functional.normalize(y.double(), dim=-1))
    y = torch.stack(outputs)
    return torch.einsum("atd,btd->ab", y, y) / len(x)


def align(
    up: Float[Tensor, "g f d"], down: Float[Tensor, "d f"], up_other: Float[Tensor, "g f d"], down_other: Float[Tensor, "d f"]
) -> Int[Tensor, " f"]:
    """The order of another expert's channels that is most like this one's (a Hungarian assignment, cubic in f)."""
    from scipy.optimize import linear_sum_assignment

    inner = torch.einsum("gfd,ghd->fh", up.double(), up_other.double()) + down.double().T @ down_other.double()
    return torch.from_numpy(linear_sum_assignment(inner.numpy(), maximize=True)[1])


def aligned(groups: Sequence[Sequence[int]], up: Float[Tensor, "E g f d"], down: Float[Tensor, "E d f"]) -> Int[Tensor, "E f"]:
    """For each expert the order of channels most like those of its group's first: for `merge`."""
    order = torch.arange(up.shape[2]).repeat(len(up), 1)
    for first, *others in groups:
        for e in others:
            order[e] = align(up[first], down[first], up[e], down[e])
    return order


def _cosine(inner: Float[Tensor, "E E"]) -> Float[Tensor, "E E"]:
    length = inner.diagonal().sqrt().clamp(min=1e-300)
    return inner / (length[:, None] * length)
