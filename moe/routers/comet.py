"""COMET: k binary trees whose leaves are the experts, and whose soft decisions become exactly hard."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moe.errors import ConfigError
from moe.kernels.product import linear
from moe.routers import losses
from moe.routers.base import COUNTS_ROWS, Router, Routing, Tokens, full_precision
from moe.routers.draw import Law
from moe.shapes import Bool, Float


class Gates(NamedTuple):
    """A routing before it becomes a list: what each expert counts for each token."""

    weight: Float[Tensor, "t E"]
    loss: Float[Tensor, ""]
    stats: dict[str, Tensor]


class Comet(Router):
    """Each of k trees leads a token to leaves; one softmax weighs the leaves that were reached in all trees (Ibrahim et al., 2023).

    k: trees. A token has at most k experts once every node on its ways has decided, and all of them at the start; trees that
        lead to the same expert add up.
    gamma: width of the band in which a node is undecided: outside, it sends a token to one side and has no gradient from it.
    entropy_loss: coefficient of the entropy of each tree's leaves, summed over trees: it drives nodes to decide. It works
        against no imbalance.

    Any number of experts from 2 on fills a tree. Rows are as many as there are weights that are not zero, so that experts
    which no tree leads to are not evaluated, and the host waits for their number once a call.
    """

    fan_out_varies = True
    eager = COUNTS_ROWS

    def __init__(self, d_model: int, num_experts: int, *, k: int = 2, gamma: float = 1.0, entropy_loss: float = 0.01) -> None:
        super().__init__(d_model, num_experts)
        check_selectors(num_experts, k, gamma, "a tree")
        if entropy_loss < 0:
            raise ConfigError(f"entropy_loss={entropy_loss} would keep trees undecided; choose router.entropy_loss of at least 0")
        self.k, self.gamma, self.entropy_loss = k, gamma, entropy_loss
        self.node = nn.Parameter(torch.empty(k, num_experts - 1, d_model))
        self.node_bias = nn.Parameter(torch.empty(k, num_experts - 1))
        self.leaf = nn.Parameter(torch.empty(k, num_experts, d_model))
        self.leaf_bias = nn.Parameter(torch.empty(k, num_experts))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform weights within gamma / 100 (nodes) and 0.05 (leaves), no biases."""
        nn.init.uniform_(self.node, -self.gamma / 100, self.gamma / 100)
        nn.init.uniform_(self.leaf, -0.05, 0.05)
        nn.init.zeros_(self.node_bias)
        nn.init.zeros_(self.leaf_bias)

    def initial_law(self, name: str, shape: Sequence[int], layers: int) -> Law | None:
        bound = {"router.node": self.gamma / 100, "router.leaf": 0.05}.get(name)
        return None if bound is None else Law("uniform", bound)

    def forward(self, x: Float[Tensor, "t d"], tokens: Tokens) -> Routing:
        return Routing.dense(*self.gates(x, tokens))

    def gates(self, x: Float[Tensor, "t d"], tokens: Tokens) -> Gates:
        """The decision, without the wait for the number of rows."""
        by_tree = (self.k, -1)
        score = linear(x, self.node.flatten(0, 1)).unflatten(-1, by_tree) + full_precision(self.node_bias)
        logits = linear(x, self.leaf.flatten(0, 1)).unflatten(-1, by_tree) + full_precision(self.leaf_bias)
        reach = leaf_reach(smooth_step(score, self.gamma))
        weight = torch.where(tokens.valid[:, None], joint_softmax(logits, reach), 0)
        loss = weight.new_zeros(())
        if self.training and self.entropy_loss:
            loss = self.entropy_loss * selector_entropy(reach, tokens.valid)
        return Gates(weight, loss, gate_statistics(weight))


def smooth_step(t: Float[Tensor, "*s"], gamma: float) -> Float[Tensor, "*s"]:
    """A cubic from exactly 0 at -gamma / 2 to exactly 1 at gamma / 2, flat outside."""
    u = (t / gamma + 0.5).clamp(0, 1)
    return u * u * (3 - 2 * u)


def leaf_reach(left: Float[Tensor, "*s nodes"]) -> Float[Tensor, "*s E"]:
    """Products along the ways from the root to each leaf of a tree, whose node i sends the share left[i] to its left child.

    Nodes are numbered as in a heap: 2i + 1 and 2i + 2 are the children of i, and leaf j is node E - 1 + j.
    """
    nodes, first = left.shape[-1], 0
    level = torch.ones_like(left[..., :1])
    shallow = level[..., :0]  # leaves one level above the deepest, which come first
    while first < nodes:
        width = level.shape[-1]
        parents = min(width, nodes - first)
        level, shallow = level[..., :parents], level[..., parents:]
        share = left[..., first : first + parents]
        level = torch.stack([level * share, level * (1 - share)], -1).flatten(-2)
        first += width
    return torch.cat([shallow, level], -1)


def joint_softmax(logits: Float[Tensor, "t k E"], reach: Float[Tensor, "t k E"]) -> Float[Tensor, "t E"]:
    """softmax(logits + log reach) over the leaves of all trees, summed over trees; a leaf out of reach gets exactly 0."""
    # below the smallest normal number 1 / reach, which is the logarithm's gradient, may be infinite
    reached = reach >= torch.finfo(reach.dtype).tiny
    log_reach = torch.where(reached, torch.where(reached, reach, 1).log(), -torch.inf)
    return (logits + log_reach).flatten(-2).softmax(-1).view_as(logits).sum(-2)


def selector_entropy(reach: Float[Tensor, "t k E"], valid: Bool[Tensor, " t"]) -> Float[Tensor, ""]:
    """Entropies of each selector's distribution over experts, summed over selectors and valid tokens."""
    return torch.where(valid, losses.entropy(reach).sum(-1), 0).sum()


def gate_statistics(weight: Float[Tensor, "t E"]) -> dict[str, Tensor]:
    """Sums over tokens of what tells how weights over all experts are doing; a token without weights adds nothing."""
    weight = weight.detach()
    return {
        "probability": weight.sum(0),
        "entropy": losses.entropy(weight).sum(),
        "confidence": weight.amax(-1).sum(),
        "demand": (weight != 0).sum(0),
    }


def check_selectors(num_experts: int, k: int, gamma: float, what: str) -> None:
    """Refuse numbers with which there is nothing to select; `what` selects."""
    if num_experts < 2:
        raise ConfigError(f"{what} over {num_experts} expert has nothing to decide; choose model.moe.experts=2 or more")
    if not 1 <= k <= num_experts:
        raise ConfigError(f"a router cannot choose k={k} of {num_experts} experts; choose router.k from 1 to {num_experts}")
    if not 0 < gamma < torch.inf:
        raise ConfigError(f"gamma={gamma} is not the width of a band; choose router.gamma above 0, such as 1.0")
