"""Settings of a model: the shape of the transformer and of its MoE layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from moe.config import Choice, Settings, wrong
from moe.errors import ConfigError
from moe.kernels import GROUPED_MLP
from moe.model.experts import Activation
from moe.routers import ROUTERS, Router, build


class Rope(Settings):
    """Rotary positions (Su et al., 2021), optionally stretched."""

    theta: PositiveFloat = 10000.0
    scaling: Literal["none", "linear", "llama3", "yarn"] = "none"
    factor: float = Field(default=1.0, ge=1)  # how many times longer than `original` contexts become
    original: PositiveInt = 8192  # context length the positions were trained for
    low_frequency: PositiveFloat = 1.0  # llama3: wavelengths longer than original / low_frequency are stretched whole
    high_frequency: PositiveFloat = 4.0  # llama3: wavelengths shorter than original / high_frequency are kept
    beta_fast: PositiveFloat = 32.0  # yarn: dimensions that turn more often than this within `original` are kept
    beta_slow: PositiveFloat = 1.0  # yarn: dimensions that turn less often than this are stretched whole

    def idle(self) -> dict[str, str]:
        users = {
            "factor": ("linear", "llama3", "yarn"),
            "original": ("llama3", "yarn"),
            "low_frequency": ("llama3",),
            "high_frequency": ("llama3",),
            "beta_fast": ("yarn",),
            "beta_slow": ("yarn",),
        }
        return {name: f"with model.rope.scaling={self.scaling}" for name, kinds in users.items() if self.scaling not in kinds}

    @model_validator(mode="after")
    def _ordered(self) -> Rope:
        for low, high in (("low_frequency", "high_frequency"), ("beta_slow", "beta_fast")):
            a, b = getattr(self, low), getattr(self, high)
            if a >= b:
                raise wrong(high, f"model.rope.{high}={b} is not above model.rope.{low}={a}; choose a larger model.rope.{high}")
        return self


class Moe(Settings):
    """The MoE layers of a model."""

    experts: PositiveInt = 8
    d_expert: PositiveInt = 512
    router: Choice(ROUTERS, "router", given=("d_model", "num_experts"), default="top_k") = "top_k"
    d_shared: NonNegativeInt = 0  # total width of the shared experts, which every token passes
    shared_gate: bool = False  # a sigmoid gate on the shared experts' output (Qwen2-MoE)
    first_dense: NonNegativeInt = 0  # leading layers that stay dense
    every: PositiveInt = 1  # of the layers after those, each n-th is sparse
    dense_layers: list[NonNegativeInt] = []  # further layers that stay dense, counted from 0
    backend: Literal["auto", *GROUPED_MLP] = "auto"

    def idle(self) -> dict[str, str]:
        return {} if self.d_shared else {"shared_gate": "without shared experts (model.moe.d_shared=0)"}


class Model(Settings):
    """A decoder-only transformer."""

    layers: PositiveInt = 4
    d_model: PositiveInt = 256
    heads: PositiveInt = 8
    kv_heads: PositiveInt | None = None  # null: as many as heads
    head_dim: PositiveInt | None = None  # null: d_model / heads
    d_ff: PositiveInt = 1024  # width of the dense layers
    activation: Activation = "silu"
    gated: bool = True  # a gate in feed-forward layers and experts (SwiGLU); false for two matrices alone (GPT-2)
    mlp_bias: bool = False  # on dense feed-forward layers and shared experts (GPT-2); routed experts have none
    vocab: PositiveInt | None = None  # null: the tokenizer's
    context: PositiveInt = 4096  # longest sequence the positions are meant for
    positions: Literal["rotary", "learned"] = "rotary"  # learned: one vector for each of model.context positions (GPT-2)
    rope: Rope = Field(default_factory=Rope)
    norm: Literal["rms", "layer"] = "rms"  # of blocks and at the end: RMSNorm, or LayerNorm with biases (Phi-MoE)
    norm_eps: PositiveFloat = 1e-5
    qk_norm: Literal["none", "head", "full"] = "none"  # over each head (Qwen3), or over all heads at once (OLMoE)
    attention_bias: bool = False  # on queries, keys and values (Qwen2)
    output_bias: bool = False  # on the output of attention (Phi-MoE)
    window: PositiveInt | None = None  # sliding attention window; null for none
    tied_embeddings: bool = False
    head_bias: bool = False  # on the logits (Phi-MoE)
    embedding_multiplier: PositiveFloat = 1.0  # on the embedding (this and the next three: Granite)
    attention_multiplier: PositiveFloat | None = None  # on queries times keys; null: head_dim ** -0.5
    residual_multiplier: PositiveFloat = 1.0  # on what attention and feed-forward layers add to the residual stream
    logits_scaling: PositiveFloat = 1.0  # logits are divided by it
    init_std: PositiveFloat = 0.02
    moe: Moe | None = Field(default_factory=Moe)  # null for a dense model

    def idle(self) -> dict[str, str]:
        idle = {}
        if self.moe is not None and all(sparse_layers(self)):
            idle["d_ff"] = "where every layer is sparse (model.moe.d_expert is the width of an expert)"
        if self.positions == "learned":
            idle["rope"] = "with model.positions=learned"
        if self.moe is not None and all(sparse_layers(self)) and not self.moe.d_shared:
            idle["mlp_bias"] = "where every layer is sparse and has no shared expert, because routed experts have no biases"
        if self.tied_embeddings:
            idle["head_bias"] = "where the embedding is the head (model.tied_embeddings=true)"
        return idle

    @model_validator(mode="after")
    def _dense_layers_exist(self) -> Model:
        moe = self.moe
        for layer in [] if moe is None else moe.dense_layers:
            if layer >= self.layers:
                raise wrong(
                    "moe.dense_layers",
                    f"model.moe.dense_layers names layer {layer} of model.layers={self.layers}; choose from 0 to {self.layers - 1}",
                )
        return self

    @model_validator(mode="after")
    def _attention_fits(self) -> Model:
        d, heads, kv_heads = self.d_model, self.heads, self.kv_heads or self.heads
        if self.head_dim is None and d % (2 * heads):
            fitting = near_divisors(d // 2, heads)
            raise wrong(
                "heads",
                f"model.d_model={d} does not split into model.heads={heads} heads of even width; "
                f"choose model.heads={fitting}, or give model.head_dim",
            )
        if self.head_dim is not None and self.head_dim % 2:
            raise wrong("head_dim", f"model.head_dim={self.head_dim} is odd, and rotary positions turn pairs; choose {self.head_dim + 1}")
        if heads % kv_heads:
            raise wrong(
                "kv_heads",
                f"model.kv_heads={kv_heads} does not divide model.heads={heads}; choose model.kv_heads={near_divisors(heads, kv_heads)}",
            )
        return self

    @model_validator(mode="after")
    def _experts_fit(self) -> Model:
        moe = self.moe
        if moe is None:
            return self
        try:
            self.router()
        except ConfigError as error:
            raise wrong("moe.router", f"model.moe.router: {error}") from None
        return self

    def router(self) -> Router:
        """The router of every sparse layer, without values."""
        assert self.moe is not None
        with torch.device("meta"):
            return build(self.moe.router, self.d_model, self.moe.experts)


def sparse_layers(settings: Model) -> list[bool]:
    """Whether each layer is a mixture of experts.

    Layer l is one if l >= first_dense, (l - first_dense + 1) is a multiple of `every`, and `dense_layers` does not name it.
    """
    moe = settings.moe
    if moe is None:
        return [False] * settings.layers
    regular = [layer >= moe.first_dense and (layer - moe.first_dense + 1) % moe.every == 0 for layer in range(settings.layers)]
    return [sparse and layer not in moe.dense_layers for layer, sparse in enumerate(regular)]


def placed(sparse: Sequence[int], layers: int) -> dict[str, Any]:
    """Settings of `Moe` with which those layers, in order and one at least, are the sparse ones."""
    # of a single one, so many that there is no second
    every = sparse[1] - sparse[0] if len(sparse) > 1 else max(layers - sparse[0], 1)
    first = sparse[0] - every + 1
    if first >= 0 and list(sparse) == list(range(sparse[0], layers, every)):
        return {"first_dense": first, "every": every}
    dense = [layer for layer in range(sparse[0], layers) if layer not in sparse]
    return {"first_dense": sparse[0], "every": 1, "dense_layers": dense}


def near_divisors(number: int, near: int) -> str:
    """The divisors of `number` on both sides of `near`, to be read: "2 or 4"."""
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    below, above = [d for d in divisors if d <= near][-1:], [d for d in divisors if d > near][:1]
    return " or ".join(map(str, below + above))
