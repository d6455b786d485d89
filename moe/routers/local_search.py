"""COMET+: a permutation of the experts is learned beside another router's gate, and then kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe.choice import Entries
from moe.errors import ConfigError
from moe.kernels.product import linear
from moe.routers import ROUTERS, build
from moe.routers.base import COUNTS_ROWS, Router, Routing, Tokens
from moe.routers.comet import Comet, Gates, gate_statistics
from moe.routers.draw import Law
from moe.routers.dselect_k import DSelectK
from moe.shapes import Float, Int
from moe.tables import entry

WRAPPED = {name: ROUTERS[name] for name in ("comet", "dselect_k", "top_k", "hash")}
Wrapped = Annotated[dict[str, Any] | str, Entries(WRAPPED, "router that local_search can wrap", ("d_model", "num_experts"), None)]
_LITTLE = 1e-6  # share of a token's weight below which the relaxation has lost it


class LocalSearch(Router):
    """Look for the experts' best order around another router's decision (COMET+: Ibrahim et al., 2023).

    router: comet, dselect_k, top_k or hash, by name or as {name, options…}.
    steps: in so many first steps the wrapped router's weights are multiplied by a matrix R, a Sinkhorn relaxation of a
        permutation, and rescaled to the sum they had; nearly every expert then works for every token. After these steps, and
        always in evaluation, the permutation closest to R only renames the experts. 0: the permutation that a checkpoint
        brings, or none, is kept.
    temperature_start, temperature_end: the relaxation's temperature falls from one to the other, by the same factor a step.
    iterations_start, iterations_end: of the Sinkhorn scaling, rising by the same number a step; at these temperatures they do not
        converge, and R has exact columns only.
    entropy_loss: coefficient of the mean entropy of R's rows, as they are and scaled to sum to 1, while R is learned.

    `permutation[i]` is the expert that the wrapped router's i-th is. It follows R after every step that is applied, from R's
    sum over ranks, so that all of them keep the same. While R is learned, rows are as many as there are weights that are not
    zero (the host waits once a call for their number); balance losses of the wrapped router count the loads of its own decision over
    the call and all ranks, whatever the window; and what it learns from loads (a bias) waits.
    """

    eager = COUNTS_ROWS

    permutation: Tensor

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        *,
        router: Wrapped = "comet",
        steps: int = 1000,
        temperature_start: float = 1e-3,
        temperature_end: float = 1e-7,
        iterations_start: int = 20,
        iterations_end: int = 150,
        entropy_loss: float = 1e-4,
    ) -> None:
        super().__init__(d_model, num_experts)
        self.steps, self.entropy_loss = steps, entropy_loss
        self.temperature_start, self.temperature_end = temperature_start, temperature_end
        self.iterations_start, self.iterations_end = iterations_start, iterations_end
        self._check()
        self.router = _build(router, d_model, num_experts)
        self.fan_out_varies = steps > 0 or self.router.fan_out_varies
        self.k = getattr(self.router, "k", num_experts)  # once the permutation is found
        self.log_weights = nn.Parameter(torch.empty(num_experts, num_experts))
        self.register_buffer("permutation", torch.arange(num_experts))
        # R of the latest training call that was relaxed, until the step that it belongs to is applied
        self._relaxed: Tensor | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform logarithms within 0.05."""
        nn.init.uniform_(self.log_weights, -0.05, 0.05)

    def initial_law(self, name: str, shape: Sequence[int], layers: int) -> Law | None:
        if name == "router.log_weights":
            return Law("uniform", 0.05)
        return self.router.initial_law(name.removeprefix("router."), shape, layers)

    def set_vocabulary(self, vocab: int) -> None:
        self.router.set_vocabulary(vocab)

    def reset_buffers(self) -> None:
        self.permutation.copy_(torch.arange(self.num_experts))
        self.router.reset_buffers()

    def temperature(self, step: int) -> float:
        """Temperature of the relaxation in a step."""
        return self.temperature_start * (self.temperature_end / self.temperature_start) ** self._progress(step)

    def iterations(self, step: int) -> int:
        """Sinkhorn iterations in a step."""
        return round(self.iterations_start + self._progress(step) * (self.iterations_end - self.iterations_start))

    def forward(self, x: Float[Tensor, "t d"], tokens: Tokens) -> Routing:
        learning = self.training and tokens.step < self.steps
        self._lend_seams(learning)
        if learning:
            return self._relax(x, tokens)
        self._relaxed = None
        routing = self.router(x, tokens)
        label = F.pad(self.permutation, (0, 1), value=self.num_experts)
        routing = routing._replace(expert=label[routing.expert], stats={k: self._renamed(v) for k, v in routing.stats.items()})
        if not self.training:
            return routing
        # every parameter has a gradient in every step, on every rank alike
        return routing._replace(loss=routing.loss + 0 * self.log_weights.sum().to(routing.loss.dtype))

    def update(self, load: Int[Tensor, " E"], tokens: int) -> None:
        """Take the permutation closest to the step's R (Hungarian algorithm), or let the wrapped router learn."""
        if self._relaxed is None:
            self.router.update(load[self.permutation], tokens)
            return
        relaxed = self.total(self._relaxed).cpu().numpy()
        self.permutation.copy_(torch.from_numpy(_solver()(relaxed, maximize=True)[1]))
        self._relaxed = None

    def _progress(self, step: int) -> float:
        return min(step / max(self.steps - 1, 1), 1.0)

    def _lend_seams(self, learning: bool) -> None:
        """The wrapped router sees the ranks, and the window in its own order of experts."""
        router, order = self.router, self.permutation
        router.total, router.window, router.window_stats, router.window_complete = self.total, None, None, False
        if self.window is None or learning:
            return
        router.window, router.window_complete = self.window[order], self.window_complete
        if self.window_stats is not None:
            router.window_stats = {name: v[order] if v.shape == order.shape else v for name, v in self.window_stats.items()}

    def _renamed(self, value: Tensor) -> Tensor:
        return torch.empty_like(value).scatter_(0, self.permutation, value) if value.shape == self.permutation.shape else value

    def _relax(self, x: Float[Tensor, "t d"], tokens: Tokens) -> Routing:
        gates = self._gates(x, tokens)
        # float64: at the lowest temperatures the logits are of the order of a million
        log = sinkhorn(self.log_weights.double() / self.temperature(tokens.step), self.iterations(tokens.step))
        self._relaxed = log.detach().exp()
        weight = mix(gates.weight, log)
        loss = gates.loss
        if self.entropy_loss:
            disorder = _row_entropy(log) + _row_entropy(log.log_softmax(-1))
            loss = loss + (self.entropy_loss * disorder * tokens.valid.sum()).to(loss.dtype)
        return Routing.dense(weight, loss, gate_statistics(weight))

    def _gates(self, x: Float[Tensor, "t d"], tokens: Tokens) -> Gates:
        if isinstance(self.router, Comet | DSelectK):
            return self.router.gates(x, tokens)
        routing = self.router(x, tokens)
        weight = routing.weight.new_zeros(len(x), self.num_experts + 1)
        weight = weight.index_put((routing.token, routing.expert), routing.weight, accumulate=True)
        return Gates(weight[:, :-1], routing.loss, routing.stats)

    def _check(self) -> None:
        if self.steps < 0:
            raise ConfigError(f"steps={self.steps} is not a number of steps; choose router.steps of at least 0")
        if not 0 < self.temperature_end <= self.temperature_start < torch.inf:
            raise ConfigError(
                f"a temperature cannot fall from {self.temperature_start} to {self.temperature_end}; choose router.temperature_start, "
                "and router.temperature_end above 0 and no higher"
            )
        for option in ("iterations_start", "iterations_end"):
            if getattr(self, option) < 1:
                raise ConfigError(f"{option}={getattr(self, option)} relaxes nothing; choose router.{option} of at least 1")
        if self.entropy_loss < 0:
            raise ConfigError(f"entropy_loss={self.entropy_loss} would keep R undecided; choose router.entropy_loss of at least 0")
        if self.steps:
            _solver()  # before training, not after its first step


def sinkhorn(log: Float[Tensor, "E E"], iterations: int) -> Float[Tensor, "E E"]:
    """Logarithm of exp(log) with rows, then columns, scaled to sum to 1, so many times: columns are exact."""
    for _ in range(iterations):
        log = log - log.logsumexp(-1, keepdim=True)
        log = log - log.logsumexp(-2, keepdim=True)
    return log


def mix(weight: Float[Tensor, "t E"], log: Float[Tensor, "E E"]) -> Float[Tensor, "t E"]:
    """weight @ exp(log), rescaled to the sums that the rows of `weight` had.

    Where next to nothing is left of a row, because the scaling has not converged, rows of exp(log) are scaled to 1 first.
    """
    mixed = linear(weight, log.exp().to(weight.dtype).T)
    before, after = weight.sum(-1, keepdim=True), mixed.sum(-1, keepdim=True)
    left = after > _LITTLE * before
    mixed = mixed * (before / torch.where(left, after, 1))
    return torch.where(left, mixed, linear(weight, log.softmax(-1).to(weight.dtype).T))


def _row_entropy(log: Float[Tensor, "E E"]) -> Float[Tensor, ""]:
    return -(log.exp() * log).sum(-1).mean()


def _build(router: str | dict[str, Any], d_model: int, num_experts: int) -> Router:
    name = router if isinstance(router, str) else str(router.get("name", ""))
    entry(WRAPPED, name, "router for local_search to wrap")
    try:
        return build(router, d_model, num_experts)
    except ConfigError as error:
        raise ConfigError(f"the router that local_search wraps: {error}") from None


def _solver() -> Callable[..., Any]:
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise ConfigError("local_search finds permutations with scipy; pip install scipy, or choose router.steps=0") from None
    return linear_sum_assignment
