"""Settings of a model: the shape of the transformer and of its MoE layers."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from moe.config import Choice, Settings
from moe.model.experts import Activation
from moe.routers import ROUTERS


class Rope(Settings):
    """Rotary positions (Su et al., 2021), optionally stretched."""

    theta: float = Field(10000.0, gt=0)
    scaling: Literal["none", "linear", "llama3", "yarn"] = "none"
    factor: float = Field(1.0, ge=1)  # how many times longer than `original` contexts become
    original: int = Field(8192, gt=0)  # context length the positions were trained for
    low_frequency: float = 1.0  # llama3: wavelengths longer than original / low_frequency are stretched whole
    high_frequency: float = 4.0  # llama3: wavelengths shorter than original / high_frequency are kept
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn


class Moe(Settings):
    """The MoE layers of a model."""

    experts: int = Field(8, gt=0)
    d_expert: int = Field(512, gt=0)
    router: Choice(ROUTERS, given=("d_model", "num_experts")) = {"name": "top_k"}
    d_shared: int = Field(0, ge=0)  # total width of the shared experts, which every token passes
    shared_gate: bool = False  # a sigmoid gate on the shared experts' output (Qwen2-MoE)
    first_dense: int = Field(0, ge=0)  # leading layers that stay dense
    every: int = Field(1, gt=0)  # of the layers after those, each n-th is sparse
    backend: Literal["auto", "reference", "torch"] = "auto"


class Model(Settings):
    """A decoder-only transformer."""

    layers: int = Field(4, gt=0)
    d_model: int = Field(256, gt=0)
    heads: int = Field(8, gt=0)
    kv_heads: int | None = Field(None, gt=0)  # null: as many as heads
    head_dim: int | None = Field(None, gt=0)  # null: d_model / heads
    d_ff: int = Field(1024, gt=0)  # width of the dense layers
    activation: Activation = "silu"
    vocab: int | None = Field(None, gt=0)  # null: the tokenizer's
    context: int = Field(2048, gt=0)  # longest sequence the positions are meant for
    rope: Rope = Rope()
    norm_eps: float = Field(1e-5, gt=0)
    qk_norm: Literal["none", "head", "full"] = "none"  # over each head (Qwen3), or over all heads at once (OLMoE)
    attention_bias: bool = False
    window: int | None = Field(None, gt=0)  # sliding attention window; null for none
    tied_embeddings: bool = False
    init_std: float = Field(0.02, gt=0)
    moe: Moe | None = Moe()  # null for a dense model
