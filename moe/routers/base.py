"""The contract of routing: Tokens (what a router may know), Routing (its answer), Router (the question)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe.routers.draw import Law
from moe.shapes import Bool, Float, Int


class Tokens(NamedTuple):
    """What a router may know of the tokens beside their vectors."""

    id: Int[Tensor, " t"]
    sequence: Int[Tensor, " t"]  # which sequence of the call a token belongs to, 0 … b-1, ascending
    index: Int[Tensor, " t"]  # global position in the step's batch: the same on any number of ranks
    valid: Bool[Tensor, " t"]  # padding is neither routed nor counted
    step: int
    length: int | None = None  # of every sequence, where all are equally long and stand one after the other: `groups` need not ask

    @classmethod
    def of(cls, x: Float[Tensor, "t d"]) -> Tokens:
        """Tokens of one sequence about which nothing else is known."""
        position = torch.arange(x.shape[0], device=x.device)
        everywhere = torch.ones_like(position, dtype=torch.bool)
        return cls(torch.zeros_like(position), torch.zeros_like(position), position, everywhere, 0, x.shape[0])


# Why torch.compile cannot make one graph of a router's forward pass that serves every layer and step.
DRAWS_NOISE = "its noise makes another graph of every layer"
COUNTS_ROWS = "how many assignments it makes is known only to the device"


class Routing(NamedTuple):
    """A list of assignments: row i sends token[i] to expert[i] and counts weight[i].

    The output is the sum over rows, so an expert that a token had twice would count with both weights; routers name it once.
    With `fan_out` k, row i belongs to token i // k (`per_token`), so a dispatcher may reshape instead of scattering.
    """

    token: Int[Tensor, " n"]
    expert: Int[Tensor, " n"]  # 0 … E-1; E means dropped
    weight: Float[Tensor, " n"]  # float32 or better
    loss: Float[Tensor, ""]  # already weighted by its coefficients, summed over the call's valid tokens
    stats: dict[str, Tensor]  # named sums over valid tokens, which metrics divide by counts; "demand": the load before drops
    fan_out: int | None = None
    gradient_scale: Float[Tensor, " n"] | None = None  # factor on the gradient of each row's output; None: 1
    output_scale: Float[Tensor, " d"] | None = None  # factor on each feature of the combined rows; None: 1

    @classmethod
    def per_token(
        cls, expert: Int[Tensor, "t k"], weight: Float[Tensor, "t k"], loss: Tensor | None = None, stats: dict[str, Tensor] | None = None
    ) -> Routing:
        """Every token chooses k experts."""
        t, k = expert.shape
        token = torch.arange(t, device=expert.device)[:, None].expand(t, k).reshape(-1)  # repeat_interleave takes five launches
        return cls(token, expert.reshape(-1), weight.reshape(-1), _zero(weight, loss), stats or {}, k)

    @classmethod
    def per_expert(
        cls, token: Int[Tensor, "E c"], weight: Float[Tensor, "E c"], loss: Tensor | None = None, stats: dict[str, Tensor] | None = None
    ) -> Routing:
        """Every expert chooses c tokens."""
        num_experts, c = token.shape
        expert = torch.arange(num_experts, device=token.device)[:, None].expand(num_experts, c).reshape(-1)
        return cls(token.reshape(-1), expert, weight.reshape(-1), _zero(weight, loss), stats or {})

    @classmethod
    def dense(cls, weight: Float[Tensor, "t E"], loss: Tensor | None = None, stats: dict[str, Tensor] | None = None) -> Routing:
        """Every token goes to every expert whose weight is not zero (one host synchronisation: the number of rows)."""
        token, expert = (weight != 0).nonzero(as_tuple=True)
        return cls(token, expert, weight[token, expert], _zero(weight, loss), stats or {})

    def load(self, num_experts: int) -> Int[Tensor, " E"]:
        """Assignments per expert, drops left out (a scatter, because bincount waits for the device)."""
        counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=self.expert.device)
        return counts.scatter_add_(0, self.expert, torch.ones_like(self.expert))[:num_experts]


class Router(nn.Module):
    """Decides which token goes to which expert; one class a file, whose constructor is its schema in YAML.

    A subclass takes `(d_model, num_experts, *, options…)` and overrides `forward`. `total`, `window`, `window_stats` and
    `stream` are filled in from outside and mean nothing on one device with one batch.
    """

    d_model: int
    num_experts: int
    # Whether tokens may differ in their number of assignments in training (`Routing.fan_out` is None): fixed buffers refuse that.
    fan_out_varies = False
    # Why `forward` is better not compiled, in words; None: it is one graph, the same for every layer.
    eager: str | None = None

    def __init__(self, d_model: int, num_experts: int) -> None:
        super().__init__()
        self.d_model, self.num_experts = d_model, num_experts
        # Differentiable sum over ranks, for losses that are defined on the global batch; also of integer counts.
        # Called in training alone, and then on every rank, tokens or none.
        self.total: Callable[[Tensor], Tensor] = _alone
        # Assignments per expert, over all ranks, of the accumulation window so far (or, when the window was run
        # ahead, of the whole of it: then `window_complete`). None: the window is this one call.
        self.window: Int[Tensor, " E"] | None = None
        self.window_complete = False
        # This router's stats of the same window, totalled alike, in float64; "tokens" counts its valid tokens.
        self.window_stats: dict[str, Tensor] | None = None
        # Seed of this router's random stream; noise is a pure function of (stream, step, global token index).
        self.stream = 0

    def forward(self, x: Float[Tensor, "t d"], tokens: Tokens) -> Routing:
        """Route t tokens."""
        raise NotImplementedError

    def summary(self, up: Float[Tensor, "E g f d"], down: Float[Tensor, "E d f"]) -> Float[Tensor, "E m"] | None:
        """What a router that reads experts needs to know of each: its layer hands it to `forward` as a third argument.

        A function of the experts' weights alone, which is differentiable where the router's answer is.
        """
        return None

    def initial_law(self, name: str, shape: Sequence[int], layers: int) -> Law | None:
        """What "router.…", "experts.up" or "experts.down" is drawn from in a model of so many layers; None: the model's own rule."""
        return None

    def batch_counts(self, load: Int[Tensor, " E"], tokens: Int[Tensor, ""]) -> tuple[Tensor, Tensor]:
        """A call's load and number of valid tokens made those of the global batch, as far as its window knows them."""
        if self.window is not None and self.window_complete:
            return self.window, tokens if self.window_stats is None else self.window_stats["tokens"]
        counts = self.total(torch.cat([load, tokens[None]]))
        load, tokens = counts[:-1], counts[-1]
        if self.window is None or self.window_stats is None:
            return load, tokens
        return load + self.window, tokens + self.window_stats["tokens"]

    def set_vocabulary(self, vocab: int) -> None:
        """Told by its model, after `stream` and before buffers get their first values, how many token ids there are."""

    def reset_buffers(self) -> None:
        """Give this router's buffers their first values, once there is memory for them: zeros, unless overridden."""
        for buffer in self.buffers(recurse=False):
            buffer.zero_()

    def update(self, load: Int[Tensor, " E"], tokens: int) -> None:
        """Learn from a step that was applied, with totals over all ranks and the whole global batch."""


def full_precision(x: Tensor) -> Tensor:
    """`x` in float32, or in float64 when the model runs in it: decisions are never taken below float32."""
    return x if x.dtype == torch.float64 else x.float()


def best(score: Float[Tensor, "*s E"], k: int) -> Int[Tensor, "*s k"]:
    """The k largest of each row, best first; the lowest index among equals, which `torch.topk` does not promise.

    The k are distinct, whatever the row holds: NaN counts as the largest, -inf as the lowest finite number. k passes of arg max,
    whose first-of-equals is documented: a stable sort took twice as long at k=8 of 64, four times at 8 of 256 (one CPU thread).
    """
    left, found = score.clamp(min=torch.finfo(score.dtype).min), []  # -inf marks what is taken
    for _ in range(k):
        found.append(left.argmax(-1, keepdim=True))
        left.scatter_(-1, found[-1], -torch.inf)
    return torch.cat(found, -1)


def running_sum(x: Float[Tensor, "*s n"]) -> Float[Tensor, "*s n"]:
    """Sums of the first 1, 2, … n numbers of each row.

    `cumsum`, but where deterministic algorithms are asked for: torch has none for it on a GPU. There, log2(n) steps that double
    the number of addends: [a b c d] → [a ab bc cd] → [a ab abc abcd].
    """
    if not torch.are_deterministic_algorithms_enabled():
        return x.cumsum(-1)
    step = 1
    while step < x.shape[-1]:
        x, step = x + F.pad(x[..., :-step], (step, 0)), 2 * step
    return x


def _alone(x: Tensor) -> Tensor:
    return x


def _zero(like: Tensor, loss: Tensor | None) -> Tensor:
    return like.new_zeros(()) if loss is None else loss
