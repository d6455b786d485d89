"""Routers that begin with a text's hidden states: each kind of text to its own expert, and nothing else of the model changed."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from moe.checkpoint.weights import load_weights
from moe.errors import ConfigError, DataError
from moe.surgery import router_text, upcycle
from moe.surgery.check import load_ours
from moe.surgery.convert import ours_of
from moe.surgery.routers import hidden_states, mean_rows
from moe.surgery.source import open_source
from moe.surgery.stream import Plan, write
from tests.surgery.tiny import llama

PROMPTS = ["abcdefgh " * 6, "0123456789 " * 4, "ZYXWVUTS-" * 5, "....;;;;,,,, " * 3]
VARIANTS = [{"experts": 4, "top_k": 2}, {"experts": 8, "top_k": 2, "variant": "virtual_group", "settings": {"granularity": 2}}]


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return str(llama(tmp_path_factory.mktemp("dense") / "llama", shards=1))


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n\n".join(PROMPTS))
    return str(path)


def ids(text):
    return torch.tensor([list(text.encode())])


@pytest.mark.parametrize("options", VARIANTS, ids=["copy", "groups"])
def test_each_prompt_goes_to_its_own_expert_and_the_function_is_kept(dense, prompts, tmp_path, options):
    asked = {"source": dense, "to": "moe"} | options
    write(Plan(router_text.plan, asked | {"text": prompts, "parts": "prompts"}), tmp_path / "told")
    write(Plan(upcycle.plan, asked), tmp_path / "random")
    told, random = (load_weights(tmp_path / name / "weights") for name in ("told", "random"))
    assert {name for name in told if not torch.equal(told[name], random[name])} == {f"layers.{layer}.moe.router.weight" for layer in (0, 1)}
    model, group = load_ours(ours_of(open_source(dense))), options["experts"] // 4
    seen = [hidden_states(model, ids(text)) for text in PROMPTS]
    for layer in (0, 1):
        wanted = mean_rows([states[layer] for states in seen], group=group)
        torch.testing.assert_close(told[f"layers.{layer}.moe.router.weight"], wanted, rtol=1e-4, atol=1e-6)
    mixture = load_ours(open_source(tmp_path / "told"))
    with torch.no_grad():
        apart = mixture.predict(ids(PROMPTS[0]), last=50) - model.predict(ids(PROMPTS[0]), last=50)
    assert apart.abs().max() < 1e-5


def test_a_text_gives_rows_to_a_hugging_face_target_that_tell_its_parts_apart(dense, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(text[0] * 128 for text in PROMPTS) * 4)
    options = {"source": dense, "text": str(path), "parts": "clusters", "experts": 4, "top_k": 2}
    write(Plan(router_text.plan, options), tmp_path / "out")
    write(Plan(router_text.plan, options), tmp_path / "again")
    rows = load_file(tmp_path / "out" / "model.safetensors")["model.layers.0.block_sparse_moe.gate.weight"]
    assert torch.equal(rows, load_file(tmp_path / "again" / "model.safetensors")["model.layers.0.block_sparse_moe.gate.weight"])
    hidden = [hidden_states(load_ours(ours_of(open_source(dense))), ids(text[0] * 128))[0] for text in PROMPTS]
    served = [(states @ rows.T).mean(0).argmax().item() for states in hidden]
    assert sorted(served) == [0, 1, 2, 3]


def test_what_cannot_be_told_is_refused_before_anything_is_written(dense, prompts, tmp_path):
    options = {"top_k": 2, "text": prompts, "parts": "prompts"}
    with pytest.raises(ConfigError, match="has 4 paragraphs for 3 rows"):
        router_text.plan(dense, experts=3, **options)
    with pytest.raises(DataError, match=r"none cannot be read as text \(no such file or directory\); give a text file"):
        router_text.plan(dense, experts=4, **options | {"text": str(tmp_path / "none")})
    (tmp_path / "bytes").write_bytes(b"ab\xff")
    with pytest.raises(DataError, match=r"bytes is no UTF-8 text \(byte 2 is 0xff\)"):
        router_text.plan(dense, experts=4, **options | {"text": str(tmp_path / "bytes")})
