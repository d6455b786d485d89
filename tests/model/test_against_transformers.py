"""The same weights give the same logits here and in `transformers`, an implementation we did not write."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe.model.layers import Rotary
from moe.model.settings import Model, Moe, Rope
from moe.model.transformer import Transformer

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.slow

VOCAB = 73
SHARED = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "rms_norm_eps": 1e-5,
    "pad_token_id": None,  # else its row of the embedding would learn nothing
    "eos_token_id": None,
}
OURS = {"layers": 3, "d_model": 32, "heads": 4, "kv_heads": 2}


def mixtral():
    config = transformers.MixtralConfig(**SHARED, intermediate_size=24, num_local_experts=4, num_experts_per_tok=2, sliding_window=5)
    moe = Moe(experts=4, d_expert=24, router={"name": "top_k", "k": 2})
    return transformers.MixtralForCausalLM(config), Model(**OURS, window=5, rope=Rope(theta=theta(config)), moe=moe)


def qwen3():
    config = transformers.Qwen3MoeConfig(
        **SHARED, head_dim=12, intermediate_size=40, moe_intermediate_size=24, num_experts=8, num_experts_per_tok=3,
        norm_topk_prob=True, mlp_only_layers=[0], tie_word_embeddings=True,
    )  # fmt: skip
    moe = Moe(experts=8, d_expert=24, first_dense=1, router={"name": "top_k", "k": 3})
    options = {"head_dim": 12, "qk_norm": "head", "d_ff": 40, "tied_embeddings": True}
    return transformers.Qwen3MoeForCausalLM(config), Model(**OURS, **options, rope=Rope(theta=theta(config)), moe=moe)


def qwen2():
    config = transformers.Qwen2MoeConfig(
        **SHARED, intermediate_size=40, moe_intermediate_size=24, shared_expert_intermediate_size=20, num_experts=8,
        num_experts_per_tok=2, norm_topk_prob=False, decoder_sparse_step=2, use_sliding_window=False,
    )  # fmt: skip
    router = {"name": "top_k", "k": 2, "normalize": "none"}
    moe = Moe(experts=8, d_expert=24, d_shared=20, shared_gate=True, every=2, router=router)
    return transformers.Qwen2MoeForCausalLM(config), Model(**OURS, attention_bias=True, d_ff=40, rope=Rope(theta=theta(config)), moe=moe)


def olmoe():
    config = transformers.OlmoeConfig(**SHARED, intermediate_size=24, num_experts=8, num_experts_per_tok=4, norm_topk_prob=False)
    moe = Moe(experts=8, d_expert=24, router={"name": "top_k", "k": 4, "normalize": "none"})
    return transformers.OlmoeForCausalLM(config), Model(**OURS, qk_norm="full", rope=Rope(theta=theta(config)), moe=moe)


def theta(config) -> float:
    return float(config.rope_parameters["rope_theta"])


NAMES = {
    "model.embed_tokens.weight": "embed.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "head.weight",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "mlp_norm",
    "self_attn.q_norm": "attention.q_norm",
    "self_attn.k_norm": "attention.k_norm",
    "mlp.gate.weight": "moe.router.weight",
    "mlp.experts.gate_up_proj": "moe.experts.up",
    "mlp.experts.down_proj": "moe.experts.down",
    "mlp.shared_expert_gate": "moe.shared_gate",
    "mlp.shared_expert.": "moe.shared.",
    **{f"self_attn.{p}_proj": f"attention.{p}" for p in "qkvo"},
    **{f"{p}_proj": p for p in ("gate", "up", "down")},
    "model.layers": "layers",
}


def mapped(theirs: dict[str, Tensor], tied: bool) -> dict[str, Tensor]:
    """Their weights under our names; experts come stacked, gate above up."""
    out = {}
    for name, value in theirs.items():
        for old, new in NAMES.items():
            name = name.replace(old, new)
        if name.endswith("experts.up"):
            value = value.unflatten(1, (2, -1))
        if not (tied and name == "head.weight"):
            out[name] = value
    return out


@pytest.mark.parametrize("build", [mixtral, qwen3, qwen2, olmoe])
def test_logits_and_gradients_equal_those_of_transformers(build):
    torch.manual_seed(0)
    theirs, settings = build()
    theirs = theirs.float().eval()
    for name, p in theirs.named_parameters():
        if "norm" in name or "bias" in name:
            torch.nn.init.uniform_(p, 0.5, 1.5)
    ours = Transformer(settings, VOCAB).eval()
    ours.load_state_dict(mapped(theirs.state_dict(), settings.tied_embeddings))
    ids = torch.randint(VOCAB, (2, 17))
    own, other = ours.predict(ids, last=17), theirs(ids).logits
    assert other.std() > 0.1
    assert (own - other).abs().max() < 1e-5
    own.square().mean().backward()
    other.square().mean().backward()
    wanted = mapped({name: p.grad for name, p in theirs.named_parameters()}, settings.tied_embeddings)
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p.grad, wanted[name], rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("scaling", "theirs"),
    [
        ("linear", {"rope_type": "linear", "factor": 4.0}),
        ("llama3", {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}),
        ("yarn", {"rope_type": "yarn", "factor": 16.0}),
    ],
)
@pytest.mark.parametrize("theta", [10000.0, 500000.0])
def test_scaled_rotary_positions_equal_those_of_transformers(scaling, theirs, theta):
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    parameters = theirs | {"rope_theta": theta, "original_max_position_embeddings": 4096}
    config = transformers.LlamaConfig(hidden_size=256, num_attention_heads=2, max_position_embeddings=65536, rope_parameters=parameters)
    embedding = LlamaRotaryEmbedding(config)
    rotary = Rotary(128, theta=theta, scaling=scaling, factor=theirs["factor"], original=4096)
    torch.testing.assert_close(torch.tensor(rotary.frequencies), embedding.inv_freq, rtol=1e-5, atol=0)
    assert rotary.magnitude == pytest.approx(embedding.attention_scaling)
