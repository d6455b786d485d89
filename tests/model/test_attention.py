from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from moe.model.attention import Attention, Cache, Context, _visible, attention_mask
from moe.model.layers import Rotary, rotate
from moe.routers.base import Tokens

D, HEADS, KV, E = 24, 4, 2, 10
DOCUMENT = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2], [0, 1, 1, 1, 1, 1, 1, 1, -1]])
CPU = torch.device("cpu")


def attention(**options) -> Attention:
    torch.manual_seed(0)
    layer = Attention(D, HEADS, kv_heads=KV, head_dim=E, **options).double()
    for name, p in layer.named_parameters():
        if "norm" in name or "bias" in name:
            torch.nn.init.uniform_(p, 0.5, 2.0)
    return layer


def context(b: int, s: int, mask=None, start: int = 0) -> Context:
    cos, sin = Rotary(E)(torch.arange(start, start + s).expand(b, s), torch.float64)
    return Context(cos, sin, mask, Tokens.of(torch.zeros(b * s, 1)))


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def definition(layer: Attention, x: Tensor, window: int | None = None, document: Tensor | None = None) -> Tensor:
    """Softmax attention, one query at a time, over the positions it may see."""
    b, s, _ = x.shape
    q, k, v = (F.linear(x, m.weight, m.bias) for m in (layer.q, layer.k, layer.v))
    if layer.qk_norm == "full":
        q, k = norm(q, layer.q_norm.weight), norm(k, layer.k_norm.weight)
    q, k, v = q.view(b, s, HEADS, E), k.view(b, s, KV, E), v.view(b, s, KV, E)
    if layer.qk_norm == "head":
        q, k = norm(q, layer.q_norm.weight), norm(k, layer.k_norm.weight)
    turn = context(b, s)
    q, k = rotate(q, turn.cos, turn.sin), rotate(k, turn.cos, turn.sin)
    out = torch.zeros(b, s, HEADS, E, dtype=x.dtype)
    for row in range(b):
        for i in range(s):
            seen = [j for j in range(i + 1) if (window is None or i - j < window)]
            seen = [j for j in seen if document is None or document[row, i] == document[row, j]]
            for h in range(HEADS):
                kv = h // (HEADS // KV)
                p = (k[row, seen, kv] @ q[row, i, h] / math.sqrt(E)).softmax(0)
                out[row, i, h] = p @ v[row, seen, kv]
    return out.flatten(2) @ layer.o.weight.T


@pytest.mark.parametrize("options", [{}, {"bias": True}, {"qk_norm": "head"}, {"qk_norm": "full", "bias": True}], ids=str)
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("document", [None, DOCUMENT], ids=["whole", "documents"])
def test_attention_is_its_definition(options, window, document):
    layer, x = attention(**options), torch.randn(2, 9, D, dtype=torch.float64)
    mask = attention_mask(9, 9, CPU, window=window, document=document)
    torch.testing.assert_close(layer(x, context(2, 9, mask)), definition(layer, x, window, document), rtol=1e-10, atol=1e-10)


def test_causality_alone_needs_no_mask():
    assert attention_mask(9, 9, CPU) is None
    assert attention_mask(9, 9, CPU, window=9) is None
    assert attention_mask(9, 9, CPU, window=8) is not None


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("window", [None, 3])
def test_the_block_mask_of_an_accelerator_lets_the_same_positions_through(window):
    q, k, v = torch.randn(3, 2, HEADS, 9, 16)
    visible = _visible(0, window or 9, DOCUMENT)
    blocks = create_block_mask(visible, 2, None, 9, 9, device="cpu", BLOCK_SIZE=4)
    dense = attention_mask(9, 9, CPU, window=window, document=DOCUMENT)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=dense)
    torch.testing.assert_close(flex_attention(q, k, v, block_mask=blocks), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 40])
def test_block_masks_give_on_a_gpu_what_dense_masks_give_on_a_cpu(window):
    layer = Attention(64, HEADS, kv_heads=KV, head_dim=32)
    document = torch.randint(2, (2, 200)).cumsum(1)
    x = torch.randn(2, 200, 64)
    cos, sin = Rotary(32)(torch.arange(200).expand(2, 200), torch.float32)
    tokens = Tokens.of(torch.zeros(400, 1))
    expected = layer(x, Context(cos, sin, attention_mask(200, 200, CPU, window=window, document=document), tokens))
    (wanted,) = torch.autograd.grad(expected.square().sum(), layer.k.weight)
    layer.cuda()
    mask = attention_mask(200, 200, torch.device("cuda"), window=window, document=document.cuda())
    assert not isinstance(mask, Tensor)
    out = layer(x.cuda(), Context(cos.cuda(), sin.cuda(), mask, tokens))
    torch.testing.assert_close(out.cpu(), expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(torch.autograd.grad(out.square().sum(), layer.k.weight)[0].cpu(), wanted, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("window", [None, 3])
def test_a_cache_gives_what_the_whole_sequence_gives(window):
    layer, x, cache = attention(), torch.randn(2, 11, D, dtype=torch.float64), Cache()
    whole = layer(x, context(2, 11, attention_mask(11, 11, CPU, window=window)))
    pieces, start = [], 0
    for length in (4, 1, 1, 3, 1, 1):
        mask = attention_mask(length, start + length, CPU, window=window)
        pieces.append(layer(x[:, start : start + length], context(2, length, mask, start), cache))
        start += length
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-12, atol=1e-12)


def test_positions_cross_a_block_unharmed_by_wrappers_that_cast_tuples():
    assert not isinstance(context(1, 2), tuple)
