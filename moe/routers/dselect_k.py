"""DSelect-k: k selectors write an expert's number in smooth bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from moe.errors import ConfigError
from moe.kernels.product import linear
from moe.routers.base import COUNTS_ROWS, Router, Routing, Tokens, full_precision
from moe.routers.comet import Gates, check_selectors, gate_statistics, selector_entropy, smooth_step
from moe.routers.draw import Law
from moe.shapes import Float


class DSelectK(Router):
    """Weigh the choices of k selectors, each a product of smooth bits, by a softmax (Hazimeh et al., 2021).

    k: selectors. A token has at most k experts once every bit is 0 or 1, and all of them at the start.
    gating: bits and weights of the selectors depend on the token ("per_example"), or are the same for all ("static").
    gamma: width of the band in which a bit is undecided: outside, it is 0 or 1 and has no gradient.
    entropy_loss: coefficient of each selector's entropy over experts, summed over selectors: it drives bits to decide.
    validity_loss: coefficient of 1 / (1e-6 + a selector's sum over experts), summed over selectors, which keeps them from
        numbers that no expert has. Without a meaning, and not counted, where the number of experts is a power of two.

    Weights sum to less than 1 where selectors point at numbers that no expert has. Rows are as many as there are weights that
    are not zero, and the host waits for their number once a call.
    """

    eager = COUNTS_ROWS

    code_bias: Tensor | None
    selector_bias: Tensor | None
    fan_out_varies = True

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        *,
        k: int = 2,
        gating: Literal["per_example", "static"] = "per_example",
        gamma: float = 1.0,
        entropy_loss: float = 0.01,
        validity_loss: float = 1.0,
    ) -> None:
        super().__init__(d_model, num_experts)
        check_selectors(num_experts, k, gamma, "a selector")
        for option, value in (("entropy_loss", entropy_loss), ("validity_loss", validity_loss)):
            if value < 0:
                raise ConfigError(f"{option}={value} would reward what it is there to prevent; choose router.{option} of at least 0")
        self.k, self.gating, self.gamma = k, gating, gamma
        self.entropy_loss, self.validity_loss = entropy_loss, validity_loss
        self.bits = (num_experts - 1).bit_length()
        width = () if gating == "static" else (d_model,)
        self.code = nn.Parameter(torch.empty(k, self.bits, *width))
        self.selector = nn.Parameter(torch.empty(k, *width))
        per_example = gating == "per_example"
        self.register_parameter("code_bias", nn.Parameter(torch.empty(k, self.bits)) if per_example else None)
        self.register_parameter("selector_bias", nn.Parameter(torch.empty(k)) if per_example else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform within gamma / 100 (bits) and 0.05 (selectors), no biases."""
        nn.init.uniform_(self.code, -self.gamma / 100, self.gamma / 100)
        nn.init.uniform_(self.selector, -0.05, 0.05)
        for bias in (self.code_bias, self.selector_bias):
            if bias is not None:
                nn.init.zeros_(bias)

    def initial_law(self, name: str, shape: Sequence[int], layers: int) -> Law | None:
        bound = {"router.code": self.gamma / 100, "router.selector": 0.05}.get(name)
        return None if bound is None else Law("uniform", bound)

    def forward(self, x: Float[Tensor, "t d"], tokens: Tokens) -> Routing:
        return Routing.dense(*self.gates(x, tokens))

    def gates(self, x: Float[Tensor, "t d"], tokens: Tokens) -> Gates:
        """The decision, without the wait for the number of rows."""
        share, reach = self._select(x)
        weight = torch.where(tokens.valid[:, None], (share[..., None] * reach).sum(-2), 0)
        loss = weight.new_zeros(())
        if self.training and self.entropy_loss:
            loss = loss + self.entropy_loss * selector_entropy(reach, tokens.valid)
        if self.training and self.validity_loss and 1 << self.bits != self.num_experts:
            loss = loss + self.validity_loss * torch.where(tokens.valid, (1 / (1e-6 + reach.sum(-1))).sum(-1), 0).sum()
        return Gates(weight, loss, gate_statistics(weight))

    def _select(self, x: Float[Tensor, "t d"]) -> tuple[Float[Tensor, "t k"], Float[Tensor, "t k E"]]:
        """What each selector counts, and where it points."""
        if self.code_bias is None or self.selector_bias is None:
            share, reach = full_precision(self.selector).softmax(-1), self._reach(full_precision(self.code))
            return share.expand(len(x), -1), reach.expand(len(x), -1, -1)
        score = linear(x, self.code.flatten(0, 1)).unflatten(-1, (self.k, -1)) + full_precision(self.code_bias)
        return (linear(x, self.selector) + full_precision(self.selector_bias)).softmax(-1), self._reach(score)

    def _reach(self, score: Float[Tensor, "*s k bits"]) -> Float[Tensor, "*s k E"]:
        return code_reach(smooth_step(score, self.gamma))[..., : self.num_experts]


def code_reach(bits: Float[Tensor, "*s bits"]) -> Float[Tensor, "*s codes"]:
    """Product of the bits of every number, lowest bit first: bit t of number i is bits[t] if (i >> t) & 1, else 1 - bits[t]."""
    reach = torch.ones_like(bits[..., :1])
    for t in range(bits.shape[-1]):
        bit = bits[..., t : t + 1]
        reach = torch.cat([reach * (1 - bit), reach * bit], -1)
    return reach
