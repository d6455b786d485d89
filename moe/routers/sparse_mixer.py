"""SparseMixer: experts are sampled, and the router's gradient accounts for what sampling another would have done."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from moe.errors import ConfigError
from moe.kernels.product import linear
from moe.routers import losses, noise
from moe.routers.base import DRAWS_NOISE, Router, Routing, Tokens, best, full_precision
from moe.routers.draw import Law
from moe.shapes import Bool, Float, Int


class Estimator(NamedTuple):
    """How the output of a sampled expert is scaled so that one evaluation estimates the gradient of the expectation.

    The gradient of sum_i p_i L(p_i f_i) has a selection term, sum_i (L(p_i f_i) - L(0)) dp_i, and a backpropagation term;
    scaling the output at random takes a step of an ODE solver along c -> L(c p f).
    """

    full: float  # chance that the scale is 1; it always is for the expert that would have won without sampling
    reduced: float  # the scale otherwise
    pull: float  # factor on the router's gradient, whatever the scale
    experts: Literal["pull", "scale"]  # the factor on the experts' gradient
    masked_balance: bool  # whether the balance loss looks at the probabilities of the candidates alone


ESTIMATORS = {
    "v1": Estimator(1 / 2, 1 / 2, 2.0, "scale", masked_balance=True),
    "v2": Estimator(1 / 4, 1 / 3, 1.0, "pull", masked_balance=False),
    "v2_code": Estimator(1 / 4, 1 / 3, 1.0, "scale", masked_balance=False),
    "v2_star": Estimator(5 / 8, 1 / 3, 2.0, "pull", masked_balance=False),
}


class Pick(NamedTuple):
    """One more expert for each token, and what the choice was made with."""

    expert: Int[Tensor, "t 1"]
    probability: Float[Tensor, "t 1"]
    scale: Float[Tensor, "t 1"]
    candidates: Float[Tensor, "t E"]  # probabilities, 0 for those that are masked


def scaled(probability: Float[Tensor, "t k"], scale: Float[Tensor, "t k"], estimator: Estimator) -> tuple[Tensor, Tensor | None]:
    """Weights, scale * probability, whose gradient is the estimator's, and a factor on the gradient of the rows."""
    if estimator.experts == "scale":
        return _Pull.apply(probability, scale, estimator.pull), None
    # a row's gradient times pull / scale reaches the experts as pull * probability, and the probability as pull
    return scale * probability, estimator.pull / scale


class _Pull(torch.autograd.Function):
    """scale * probability with the gradient of pull * probability."""

    @staticmethod
    def forward(ctx, probability, scale, pull):
        ctx.pull = pull
        return scale * probability

    @staticmethod
    def backward(ctx, grad):
        return ctx.pull * grad, None, None


class SparseMixer(Router):
    """Sample each token's experts from a softmax over those that jitter could make the best (Liu et al., 2023 and 2024).

    estimator: "v1" steps by the mid-point rule: exact where the loss is quadratic in the expert's output. "v2" (GRIN) uses
        Heun's third-order rule and estimates the selection term alone, which its authors found to be a mistake and kept;
        "v2_star" is their correction, exact where the loss is cubic. Both promises are for samples other than the winner.
        "v2_code" is v2 as released (PhiMoE): experts learn from the scaled output, where the paper has the whole of it.
    k: the draw is made k times, each among the experts that are left, with their own mask and softmax; weights are not
        renormalised.
    jitter: an expert is a candidate if multiplying the logits by up to 1 ± jitter could make it win; 0 leaves the winner
        and its exact ties alone.
    mask: z* - z <= 2 jitter max(|z|, z*) ("code"), or jitter (|z| + |z*|) ("paper"); z* is the best logit.
    input_jitter: in training, multiply the router's input by U(1 - input_jitter, 1 + input_jitter).
    output_scale: "learned" puts a learned factor on each feature of the experts' output, at first 1 (v1's omega).
    balance_loss, balance_scope: the Switch loss of the sampled loads, counted over the call or the global batch.

    Evaluation takes the best experts, unscaled. Padding gets expert E and weight 0, and no part in anything else.
    """

    eager = DRAWS_NOISE

    omega: Tensor | None

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        *,
        k: int = 2,
        estimator: Literal["v1", "v2", "v2_code", "v2_star"] = "v2",
        jitter: float = 0.1,
        mask: Literal["code", "paper"] = "code",
        input_jitter: float = 0.0,
        output_scale: Literal["none", "learned"] = "none",
        balance_loss: float = 0.01,
        balance_scope: Literal["micro", "global"] = "global",
    ) -> None:
        super().__init__(d_model, num_experts)
        if not 1 <= k <= num_experts:
            raise ConfigError(f"a router cannot choose k={k} of {num_experts} experts; choose router.k from 1 to {num_experts}")
        if jitter < 0:
            raise ConfigError(f"jitter={jitter} would leave no candidate; choose router.jitter of at least 0")
        if not 0 <= input_jitter < 1:
            raise ConfigError(
                f"input_jitter={input_jitter} would turn inputs around; choose router.input_jitter from 0 up to, but not including, 1"
            )
        if balance_loss < 0:
            raise ConfigError(f"balance_loss={balance_loss} would work against balance; choose router.balance_loss of at least 0")
        self.k, self.estimator, self.jitter, self.mask = k, estimator, jitter, mask
        self.input_jitter, self.balance_loss, self.balance_scope = input_jitter, balance_loss, balance_scope
        self.weight = nn.Parameter(torch.empty(num_experts, d_model))
        self.register_parameter("omega", nn.Parameter(torch.empty(d_model)) if output_scale == "learned" else None)
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        """Small normal weights, output scales of 1."""
        nn.init.normal_(self.weight, std=std)
        if self.omega is not None:
            nn.init.ones_(self.omega)

    def initial_law(self, name: str, shape: Sequence[int], layers: int) -> Law | None:
        return Law("constant", 1) if name == "router.omega" else None

    def forward(self, x: Float[Tensor, "t d"], tokens: Tokens) -> Routing:
        if self.input_jitter and self.training:
            draw = noise.uniform(self.stream, tokens.step, tokens.index, self.d_model)
            x = full_precision(x) * (1 + self.input_jitter * (2 * draw - 1))
        logits = linear(x, self.weight)
        picks, left = [], logits
        for j in range(self.k):
            # each draw is a stream of its own
            picks.append(self._pick(left, logits.detach(), tokens, self.stream + 2 * j + 1))
            left = left.scatter(1, picks[-1].expert, -torch.inf)

        valid = tokens.valid[:, None]
        chosen, weight, scale = (torch.cat([pick[i] for pick in picks], 1) for i in range(3))
        estimator, gradient_scale = ESTIMATORS[self.estimator], None
        if self.training:
            weight, gradient_scale = scaled(weight, scale, estimator)
        probability = torch.where(valid, picks[0].candidates if estimator.masked_balance else logits.softmax(-1), 0)
        with torch.no_grad():
            stats = {
                "probability": probability.sum(0),
                "entropy": losses.entropy(probability).sum(),
                "confidence": probability.amax(-1).sum(),
                "z": torch.where(tokens.valid, losses.z(logits), 0).sum(),
            }
        expert = torch.where(valid, chosen, self.num_experts)
        routing = Routing.per_token(expert, torch.where(valid, weight, 0), stats=stats)
        routing = routing._replace(
            gradient_scale=None if gradient_scale is None else gradient_scale.flatten(),
            output_scale=None if self.omega is None else full_precision(self.omega),
        )
        if not self.training or not self.balance_loss:
            return routing
        load = routing.load(self.num_experts)
        if self.balance_scope == "global":
            load, _ = self.batch_counts(load, tokens.valid.sum())
        return routing._replace(loss=self.balance_loss * losses.balance(load, probability.sum(0)))

    def _pick(self, left: Float[Tensor, "t E"], logits: Float[Tensor, "t E"], tokens: Tokens, stream: int) -> Pick:
        """Choose one more expert of those whose logits are left: not -inf."""
        masked = left.masked_fill(~self._candidate(left.detach(), logits), -torch.inf)
        candidates, winner = masked.softmax(-1), best(masked.detach(), 1)
        if not self.training:
            return Pick(winner, candidates.gather(1, winner), torch.ones_like(masked[:, :1]), candidates)
        estimator = ESTIMATORS[self.estimator]
        # the best of logits plus Gumbel noise is a sample from their softmax
        expert = best(masked.detach() + noise.gumbel(stream, tokens.step, tokens.index, self.num_experts), 1)
        full = (expert == winner) | (noise.uniform(stream + 1, tokens.step, tokens.index, 1) < estimator.full)
        scale = torch.ones_like(masked[:, :1]).masked_fill(~full, estimator.reduced)
        return Pick(expert, candidates.gather(1, expert), scale, candidates)

    def _candidate(self, left: Float[Tensor, "t E"], logits: Float[Tensor, "t E"]) -> Bool[Tensor, "t E"]:
        # products, not ratios, and "not above": the best logit stays where all are zero, and so does a NaN
        top = left.amax(-1, keepdim=True)
        if self.mask == "paper":
            return ~(top - logits > self.jitter * (logits.abs() + top.abs()))
        return ~(top - logits > 2 * self.jitter * torch.maximum(logits.abs(), top))
