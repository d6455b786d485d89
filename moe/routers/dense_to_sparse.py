"""Dense-to-sparse gate: all experts at first, fewer as a temperature falls, one in the end (EvoMoE)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe.errors import ConfigError
from moe.kernels.product import linear
from moe.routers import losses, noise
from moe.routers.base import COUNTS_ROWS, Router, Routing, Tokens, best, full_precision
from moe.shapes import Float

ACTIVATIONS = {"sigmoid": torch.sigmoid, "tanh": torch.tanh, "gelu": F.gelu}


class DenseToSparse(Router):
    """Keep the experts whose share of a softmax at a falling temperature is above a threshold (Nie et al., 2021).

    temperature_start, temperature_end, decay, decay_steps: the temperature falls from one to the other over so many steps
        from `dense_steps` on, by the same amount ("linear") or factor ("exponential") a step. It is a function of the step alone.
    dense_steps: leading steps in which all experts count with their plain softmax, without a loss.
    top_1_step: from this step on only the best expert counts, with its plain softmax (Switch); null: never in training.
    noise: "gumbel" draws the softmax's sample anew for each token and step; "none" is the deterministic gate.
    selection: experts whose share is above `threshold`, or the "best" alone.
    threshold: must be below 1 / experts, so that a token always has one.
    weight: what a kept expert counts: its share of the sample at the temperature, or of the plain softmax without noise.
    activation: put on the linear scores, and a learned bias after it (Nguyen et al., 2024): with the identity, "none", the
        temperature and the slopes of the gate cannot be told apart from data.
    evaluation: the best expert alone ("top_1"), or all ("dense"), with the plain softmax; with an activation or without
        noise the softmax is at `temperature_end`.
    balance_loss: coefficient of E * sum_i (share of tokens that keep i) * (mean weight of i), over the global batch.

    Rows are as many as there are kept experts, and the host waits for their number once a call.
    """

    eager = COUNTS_ROWS
    bias: Tensor | None
    evaluation: Literal["top_1", "dense"]

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        *,
        temperature_start: float = 1.0,
        temperature_end: float = 0.5,
        decay: Literal["linear", "exponential"] = "linear",
        decay_steps: int = 1000,
        dense_steps: int = 0,
        top_1_step: int | None = None,
        noise: Literal["gumbel", "none"] = "gumbel",
        selection: Literal["threshold", "best"] = "threshold",
        threshold: float = 0.001,
        weight: Literal["sample", "softmax"] = "sample",
        activation: Literal["none", "sigmoid", "tanh", "gelu"] = "none",
        evaluation: Literal["top_1", "dense"] = "top_1",
        balance_loss: float = 0.01,
    ) -> None:
        super().__init__(d_model, num_experts)
        self.temperature_start, self.temperature_end = temperature_start, temperature_end
        self.decay, self.decay_steps, self.dense_steps, self.top_1_step = decay, decay_steps, dense_steps, top_1_step
        self.noise, self.selection, self.threshold, self.counted = noise, selection, threshold, weight
        self.activation, self.evaluation, self.balance_loss = activation, evaluation, balance_loss
        self._check()
        self.fan_out_varies = dense_steps > 0 or (selection == "threshold" and top_1_step != 0)
        self.weight = nn.Parameter(torch.empty(num_experts, d_model))
        self.register_parameter("bias", None if activation == "none" else nn.Parameter(torch.empty(num_experts)))
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        """Small normal weights, no bias."""
        nn.init.normal_(self.weight, std=std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def temperature(self, step: int) -> float:
        """Temperature of the softmax in a step."""
        start, end = self.temperature_start, self.temperature_end
        progress = min(max((step - self.dense_steps) / self.decay_steps, 0.0), 1.0)
        return start + progress * (end - start) if self.decay == "linear" else start * (end / start) ** progress

    def phase(self, step: int) -> Literal["dense", "sparse", "top_1"]:
        """Which experts count in a step."""
        if not self.training:
            return self.evaluation
        if self.top_1_step is not None and step >= self.top_1_step:
            return "top_1"
        return "dense" if step < self.dense_steps else "sparse"

    def forward(self, x: Float[Tensor, "t d"], tokens: Tokens) -> Routing:
        logits, phase = self._scores(x), self.phase(tokens.step)
        # a caller who generates knows of no step
        temperature = self.temperature(tokens.step) if self.training and phase != "top_1" else self.temperature_end
        plain = (logits if self.noise == "gumbel" else logits / temperature).softmax(-1)
        share = plain
        if phase == "sparse" and self.noise == "gumbel":
            sample = noise.gumbel(self.stream, tokens.step, tokens.index, self.num_experts)
            share = ((logits + sample) / temperature).softmax(-1)
        valid = tokens.valid[:, None]
        probability, weight = torch.where(valid, plain, 0), share if self.counted == "sample" else plain
        with torch.no_grad():
            stats = {
                "probability": probability.sum(0),
                "entropy": losses.entropy(probability).sum(),
                "confidence": probability.amax(-1).sum(),
            }
        if phase == "top_1" or (phase == "sparse" and self.selection == "best"):
            chosen = best(share.detach(), 1)
            weight = torch.where(valid, weight.gather(1, chosen), 0)
            routing = Routing.per_token(torch.where(valid, chosen, self.num_experts), weight, stats=stats)
            mass = torch.zeros_like(probability).scatter(1, chosen, weight)
        else:
            # "not below": a NaN is kept, and seen
            kept = torch.ones_like(valid) if phase == "dense" else ~(share.detach() <= self.threshold)
            mass = torch.where(kept & valid, weight, 0)
            routing = Routing.dense(mass, stats=stats)
        if not self.training or phase == "dense" or not self.balance_loss:
            return routing
        load, count = self.batch_counts(routing.load(self.num_experts), tokens.valid.sum())
        mass = mass if phase == "sparse" else probability  # from then on it is the Switch loss
        return routing._replace(loss=self.balance_loss * losses.usage(load, count, mass.sum(0)))

    def _scores(self, x: Float[Tensor, "t d"]) -> Float[Tensor, "t E"]:
        logits = linear(x, self.weight)
        return logits if self.bias is None else ACTIVATIONS[self.activation](logits) + full_precision(self.bias)

    def _check(self) -> None:
        start, end, experts = self.temperature_start, self.temperature_end, self.num_experts
        if not 0 < end <= start < torch.inf:
            raise ConfigError(
                f"a temperature cannot fall from {start} to {end}; choose router.temperature_start, and router.temperature_end "
                "above 0 and no higher"
            )
        if self.decay_steps < 1:
            raise ConfigError(f"decay_steps={self.decay_steps} leaves no step to cool in; choose router.decay_steps of at least 1")
        if self.dense_steps < 0:
            raise ConfigError(f"dense_steps={self.dense_steps} is not a number of steps; choose router.dense_steps of at least 0")
        if self.top_1_step is not None and self.top_1_step < self.dense_steps:
            raise ConfigError(
                f"top_1_step={self.top_1_step} comes before the end of the dense steps; "
                f"choose router.top_1_step of at least {self.dense_steps}"
            )
        if not 0 <= self.threshold < 1 / experts:
            raise ConfigError(
                f"threshold={self.threshold} may keep none of {experts} experts; choose router.threshold from 0 up to, but not "
                f"including, {1 / experts:g}"
            )
        if self.balance_loss < 0:
            raise ConfigError(f"balance_loss={self.balance_loss} would work against balance; choose router.balance_loss of at least 0")
