"""A decoder-only transformer whose feed-forward layers are dense or mixtures of experts."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe.model.attention import Attention, Cache, Context, attention_mask
from moe.model.initialise import initialise_, stream
from moe.model.layers import NORMS, FeedForward, Rotary
from moe.model.loss import IGNORE, cross_entropy, logits
from moe.model.moe_layer import MoELayer, Report
from moe.model.settings import Model, sparse_layers
from moe.model.stages import stage
from moe.routers.base import Router, Tokens
from moe.shapes import Float, Int


class Output(NamedTuple):
    """What a call of the model returns."""

    loss: Float[Tensor, ""]  # summed cross-entropy over the targets that are predicted, in nats and float64
    reports: list[Report]  # one a sparse layer


class Block(nn.Module):
    """Attention, then a feed-forward layer, each behind a norm and added to the residual stream."""

    def __init__(self, settings: Model, sparse: bool) -> None:
        super().__init__()
        d, moe = settings.d_model, settings.moe
        # Whether activations are computed again in the backward pass instead of kept.
        self.recompute = False
        self.multiplier = settings.residual_multiplier
        # Attention and the dense feed-forward network, each with its norm and addition.
        self.compiled: tuple[Callable[..., Any], Callable[..., Any]] | None = None
        self.attention_norm = NORMS[settings.norm](d, eps=settings.norm_eps)
        self.attention = Attention(
            d,
            settings.heads,
            kv_heads=settings.kv_heads or settings.heads,
            head_dim=settings.head_dim or d // settings.heads,
            bias=settings.attention_bias,
            output_bias=settings.output_bias,
            qk_norm=settings.qk_norm,
            norm_eps=settings.norm_eps,
            scale=settings.attention_multiplier,
        )
        self.mlp_norm = NORMS[settings.norm](d, eps=settings.norm_eps)
        if moe is None or not sparse:
            made = FeedForward(d, settings.d_ff, activation=settings.activation, gated=settings.gated, bias=settings.mlp_bias)
            self.mlp, self.moe = made, None
            return
        self.mlp, self.moe = (
            None,
            MoELayer(
                d,
                experts=moe.experts,
                d_expert=moe.d_expert,
                router=moe.router,
                activation=settings.activation,
                gated=settings.gated,
                d_shared=moe.d_shared,
                shared_gate=moe.shared_gate,
                shared_bias=settings.mlp_bias,
                backend=moe.backend,
            ),
        )

    def forward(self, x: Float[Tensor, "b s d"], context: Context, cache: Cache | None = None) -> tuple[Tensor, Report | None]:
        attend, feed_forward = self._attend, self._feed_forward
        if self.compiled is not None and cache is None:  # a cache is of another length at every call
            attend, feed_forward = self.compiled
        x, h = self._run("attention", attend, x, context, cache)
        if self.moe is None or h is None:
            return self._run("feed-forward", feed_forward, x), None
        # the router lies between the recomputed regions: a decision is taken once, and cannot come out differently
        routing = self.moe.route(h, context.tokens)
        out = self._run(None, self.moe.compute, h, routing)
        return torch.add(x, out.view_as(x), alpha=self.multiplier), self.moe.report(routing, context.tokens)

    def compile_regions(self) -> None:
        """Compile all that has the same shapes at every step: what lies between the routed experts, and their router."""
        self.compiled = torch.compile(self._attend), torch.compile(self._feed_forward)
        if self.moe is not None:
            self.moe.compile_regions()

    def _attend(self, x: Tensor, context: Context, cache: Cache | None = None) -> tuple[Tensor, Tensor | None]:
        """The residual stream after attention, and what the router and the experts of a sparse block see of it."""
        x = torch.add(x, self.attention(self.attention_norm(x), context, cache), alpha=self.multiplier)
        return x, None if self.moe is None else self.mlp_norm(x).flatten(0, 1)

    def _feed_forward(self, x: Tensor) -> Tensor:
        assert self.mlp is not None
        return torch.add(x, self.mlp(self.mlp_norm(x)), alpha=self.multiplier)

    def _run(self, name: str | None, region: Callable[..., Any], *args: Any) -> Any:
        """A region's results; it runs again in the backward pass where activations are recomputed, within its stage both times."""

        def within() -> Any:
            with nullcontext() if name is None else stage(name):
                return region(*args)

        if self.recompute and torch.is_grad_enabled():
            return checkpoint(within, use_reentrant=False, preserve_rng_state=False)
        return within()


class Transformer(nn.Module):
    """Embedding, blocks, norm and head.

    Built on the meta device it is a shape, to be allocated and filled by `initialise_`; elsewhere it starts with those
    values. document_mask: attention stays within documents.
    """

    def __init__(self, settings: Model, vocab: int, *, seed: int = 0, document_mask: bool = False) -> None:
        super().__init__()
        self.settings, self.vocab, self.document_mask = settings, vocab, document_mask
        self.embed = nn.Embedding(vocab, settings.d_model)
        learned = settings.positions == "learned"
        self.positions = nn.Embedding(settings.context, settings.d_model) if learned else None
        self.layers = nn.ModuleList(Block(settings, sparse) for sparse in sparse_layers(settings))
        self.norm = NORMS[settings.norm](settings.d_model, eps=settings.norm_eps)
        self.head = None if settings.tied_embeddings else nn.Linear(settings.d_model, vocab, bias=settings.head_bias)
        head_dim = settings.head_dim or settings.d_model // settings.heads
        self.rotary = None if learned else Rotary(head_dim, **settings.rope.model_dump())
        for path, module in self.named_modules():
            if isinstance(module, Router):
                module.stream = stream(seed, path)
                module.set_vocabulary(vocab)
        if not self.embed.weight.is_meta:
            self.initialise(seed)

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Set every parameter to its first value."""
        for name, parameter in self.named_parameters():
            initialise_(parameter, name, [range(n) for n in parameter.shape], parameter.shape, self.settings, seed)

    def forward(
        self,
        ids: Int[Tensor, "b s"],
        targets: Int[Tensor, "b s"],
        document: Int[Tensor, "b s"],
        position: Int[Tensor, "b s"],
        index: Int[Tensor, "b s"],
        *,
        step: int = 0,
    ) -> Output:
        """Loss of a batch; `document` is -1 on padding, which is neither routed nor counted."""
        valid = (document >= 0) | (targets != IGNORE)
        documents = document if self.document_mask else None
        mask = attention_mask(ids.shape[1], ids.shape[1], ids.device, window=self.settings.window, document=documents)
        hidden, reports = self._hidden(ids, position, mask, _tokens(ids, index, valid, step))
        with stage("loss"):
            loss = cross_entropy(hidden.flatten(0, 1), self.unembedding, targets.flatten(), bias=self._head_bias)
        return Output(loss, reports)

    def predict(self, ids: Int[Tensor, "b s"], caches: list[Cache] | None = None, *, last: int = 1) -> Float[Tensor, "b last v"]:
        """Logits of the token after each of the `last` positions; `caches` hold, one a layer, what came before `ids`."""
        b, s = ids.shape
        start = caches[0].length if caches else 0
        position = torch.arange(start, start + s, device=ids.device).expand(b, s)
        index = torch.arange(b * s, device=ids.device).view(b, s)
        tokens = _tokens(ids, index, torch.ones_like(ids, dtype=torch.bool), step=0)
        mask = attention_mask(s, start + s, ids.device, window=self.settings.window)
        hidden, _ = self._hidden(ids, position, mask, tokens, caches)
        return logits(hidden[:, -last:], self.unembedding, self._head_bias)

    @property
    def unembedding(self) -> Float[Tensor, "v d"]:
        """The head's weight, which is the embedding's where they are tied."""
        return self.embed.weight if self.head is None else self.head.weight

    @property
    def _head_bias(self) -> Float[Tensor, " v"] | None:
        return None if self.head is None else self.head.bias

    def routers(self) -> dict[int, Router]:
        """The router of each sparse layer, in the order of the reports."""
        blocks: Any = self.layers
        return {layer: block.moe.router for layer, block in enumerate(blocks) if block.moe is not None}

    def _hidden(
        self, ids: Tensor, position: Tensor, mask: Any, tokens: Tokens, caches: list[Cache] | None = None
    ) -> tuple[Float[Tensor, "b s d"], list[Report]]:
        x = _scaled(self.embed(ids), self.settings.embedding_multiplier)
        if self.positions is not None:
            x = x + self.positions(position)
        turns = (None, None) if self.rotary is None else self.rotary(position, x.dtype)
        context = Context(*turns, mask, tokens)
        reports = []
        for number, (block, cache) in enumerate(zip(self.layers, caches or [None] * len(self.layers), strict=True)):
            with stage(f"layer {number}"):
                x, report = block(x, context, cache)
            if report is not None:
                reports.append(report)
        return _scaled(self.norm(x), 1 / self.settings.logits_scaling), reports


def _scaled(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1 else x * factor


def _tokens(ids: Tensor, index: Tensor, valid: Tensor, step: int) -> Tokens:
    b, s = ids.shape
    sequence = torch.arange(b, device=ids.device)[:, None].expand(b, s)
    return Tokens(*(t.flatten() for t in (ids, sequence, index, valid)), step=step, length=s)
