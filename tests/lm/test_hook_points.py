"""Every name of every family against a hook written by hand on the obvious module, bit for bit in float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lm_saes.errors import HookPointError
from lm_saes.lm.hook_points import HookPoints
from lm_saes.lm.huggingface import HuggingFaceLanguageModel
from tests.lm.tiny_models import CAUSAL, ENCODERS, FAMILIES, LAYERS, WIDTH, tiny_model, tiny_tokenizer

IDS = torch.tensor([[0, 40, 7, 113, 52, 9, 200, 31], [0, 11, 61, 5, 90, 33, 12, 150]])
PARALLEL = ["gpt_neox"]
SEQUENTIAL = [family for family in CAUSAL if family not in PARALLEL]


def language_model(family: str, **overrides: Any) -> HuggingFaceLanguageModel:
    return HuggingFaceLanguageModel.from_model(tiny_model(family, **overrides), tiny_tokenizer(family))


def by_hand(family: str, model: Any, index: int) -> dict[str, tuple[nn.Module, str]]:
    """For block `index`: name to (module, "in" or "out"), written out per family."""
    if family == "gpt2":
        block = model.transformer.h[index]
        ln1, ln2, z, attention, mlp, final = block.ln_1, block.ln_2, block.attn.c_proj, block.attn, block.mlp, model.transformer.ln_f
        middle = (ln2, "in")
    elif family.startswith("gpt_neox"):
        block = model.gpt_neox.layers[index]
        ln1, ln2, z = block.input_layernorm, block.post_attention_layernorm, block.attention.dense
        attention, mlp, final, middle = block.attention, block.mlp, model.gpt_neox.final_layer_norm, (ln2, "in")
    elif family in ("gemma2", "gemma3"):
        block = model.model.layers[index]
        ln1, ln2, z = block.input_layernorm, block.pre_feedforward_layernorm, block.self_attn.o_proj
        attention, mlp, final, middle = block.post_attention_layernorm, block.post_feedforward_layernorm, model.model.norm, (ln2, "in")
    elif family in ("bert", "roberta"):
        block = getattr(model, family).encoder.layer[index]
        ln1, ln2, z = block.attention.output.LayerNorm, block.output.LayerNorm, block.attention.output.dense
        attention, mlp, final, middle = block.attention.output.dense, block.output.dense, None, (ln1, "out")
    elif family == "distilbert":
        block = model.distilbert.transformer.layer[index]
        ln1, ln2, z = block.sa_layer_norm, block.output_layer_norm, block.attention.out_lin
        attention, mlp, final, middle = block.attention, block.ffn, None, (ln1, "out")
    else:
        block = model.model.layers[index]
        ln1, ln2, z = block.input_layernorm, block.post_attention_layernorm, block.self_attn.o_proj
        attention, mlp, final, middle = block.self_attn, block.mlp, model.model.norm, (ln2, "in")
    names = {
        "hook_embed": (model.get_input_embeddings(), "out"),
        f"blocks.{index}.hook_resid_pre": (block, "in"),
        f"blocks.{index}.ln1.hook_normalized": (ln1, "out"),
        f"blocks.{index}.attn.hook_z": (z, "in"),
        f"blocks.{index}.hook_attn_out": (attention, "out"),
        f"blocks.{index}.hook_resid_mid": middle,
        f"blocks.{index}.ln2.hook_normalized": (ln2, "out"),
        f"blocks.{index}.hook_mlp_out": (mlp, "out"),
        f"blocks.{index}.hook_resid_post": (block, "out"),
    }
    if final is not None:
        names["ln_final.hook_normalized"] = (final, "out")
    if family in PARALLEL:
        del names[f"blocks.{index}.hook_resid_mid"]
    return names


def hand_written(model: nn.Module, module: nn.Module, place: str) -> Tensor:
    """What a plain forward hook on the module sees in a whole forward pass."""
    seen: list[Tensor] = []

    def keep(value: Any) -> None:
        while isinstance(value, tuple):
            value = value[0]
        seen.append(value.clone())

    if place == "in":
        handle = module.register_forward_pre_hook(lambda _, args: keep(args))
    else:
        handle = module.register_forward_hook(lambda _, __, output: keep(output))
    with torch.no_grad():
        model(IDS)
    handle.remove()
    (tensor,) = seen
    return tensor


@pytest.mark.parametrize("family", FAMILIES)
def test_every_name_is_the_tensor_a_hand_written_hook_sees(family: str) -> None:
    lm = language_model(family)
    index = 1
    expected = by_hand(family, lm.model, index)
    here = [name for name in lm.hook_points.names if name.startswith(f"blocks.{index}.") or not name.startswith("blocks.")]
    assert sorted(here) == sorted(expected)
    together = lm.capture(IDS, None, list(expected))
    for name, (module, place) in expected.items():
        truth = hand_written(lm.model, module, place)
        assert torch.equal(lm.capture(IDS, None, [name])[name], truth), name
        assert torch.equal(together[name], truth), name
        assert lm.hook_width(name) == truth.shape[-1]


@pytest.mark.parametrize("family", SEQUENTIAL)
def test_the_residual_stream_adds_up(family: str) -> None:
    lm = language_model(family)
    names = [
        f"blocks.{i}.{hook}"
        for i in range(LAYERS)
        for hook in ("hook_resid_pre", "hook_attn_out", "hook_resid_mid", "hook_mlp_out", "hook_resid_post")
    ]
    seen = lm.capture(IDS, None, names)
    for i in range(LAYERS):
        before, attention, middle, mlp, after = (seen[name] for name in names[5 * i : 5 * i + 5])
        torch.testing.assert_close(middle, before + attention, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(after, middle + mlp, rtol=1e-6, atol=1e-6)
        if i + 1 < LAYERS:
            assert torch.equal(after, seen[f"blocks.{i + 1}.hook_resid_pre"])


def test_parallel_blocks_add_both_sublayers_to_what_they_read() -> None:
    lm = language_model("gpt_neox")
    hooks = ["hook_resid_pre", "hook_attn_out", "hook_mlp_out", "hook_resid_post"]
    before, attention, mlp, after = lm.capture(IDS, None, [f"blocks.1.{hook}" for hook in hooks]).values()
    torch.testing.assert_close(after, before + attention + mlp, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", ENCODERS)
def test_post_norm_encoders_as_documented(family: str) -> None:
    lm = language_model(family)
    names = ["blocks.1.hook_resid_pre", "blocks.1.hook_attn_out", "blocks.1.hook_resid_mid", "blocks.1.ln1.hook_normalized",
             "blocks.1.hook_mlp_out", "blocks.1.hook_resid_post", "blocks.1.ln2.hook_normalized"]  # fmt: skip
    before, attention, middle, ln1, mlp, after, ln2 = lm.capture(IDS, None, names).values()
    norms = [lm.model.get_submodule(lm.hook_points.site(f"blocks.1.{norm}.hook_normalized").module) for norm in ("ln1", "ln2")]
    torch.testing.assert_close(middle, norms[0](before + attention).detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(after, norms[1](middle + mlp).detach(), rtol=1e-5, atol=1e-6)
    assert torch.equal(middle, ln1)
    assert torch.equal(after, ln2)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "gpt_neox"])
def test_the_last_resid_post_is_before_the_final_norm(family: str) -> None:
    lm = language_model(family)
    last, normalized = lm.capture(IDS, None, [f"blocks.{LAYERS - 1}.hook_resid_post", "ln_final.hook_normalized"]).values()
    norm: Any = lm.model.get_submodule(lm.hook_points.site("ln_final.hook_normalized").module)
    assert not torch.allclose(last, normalized, atol=1e-2)
    assert torch.equal(norm(last).detach(), normalized)
    assert torch.equal(lm.model.get_output_embeddings()(normalized).detach(), tiny_model(family, final_logit_softcapping=None)(IDS).logits.detach())


def test_any_module_by_path() -> None:
    lm = language_model("mixtral")
    path = "model.layers.1.mlp"
    seen = lm.capture(IDS, None, [f"{path}:in", f"{path}:out", "blocks.1.ln2.hook_normalized", "blocks.1.hook_mlp_out"])
    assert torch.equal(seen[f"{path}:in"], seen["blocks.1.ln2.hook_normalized"])
    assert torch.equal(seen[f"{path}:out"], seen["blocks.1.hook_mlp_out"])
    assert lm.hook_width("model.layers.0.mlp.gate:out") == 4  # a router scores its experts
    assert lm.hook_width("model.layers.0.self_attn:in") == WIDTH  # passed by keyword


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("blocks.1.hook_residpost", "blocks.1.hook_resid_post"),
        ("blocks.7.hook_mlp_out", "with 3 blocks"),
        ("transformer.h.1.mlp", "transformer.h.1.mlp:out"),
        ("transformer.h.1.mpl:out", "transformer.h.1.mlp:out"),
        ("transformer.h.1.mlp:middle", ":in or :out"),
        ("", "blocks.N.hook_resid_post"),
    ],
)
def test_unknown_names_are_answered_with_near_ones(wrong: str, near: str) -> None:
    lm = language_model("gpt2")
    with pytest.raises(HookPointError, match="no hook point") as error:
        lm.hook_width(wrong)
    assert near in str(error.value)
    assert "\n" not in str(error.value)


def test_resid_mid_of_a_parallel_model_says_why_not() -> None:
    with pytest.raises(HookPointError, match="in parallel, so there is no point between them"):
        language_model("gpt_neox").hook_width("blocks.0.hook_resid_mid")


def test_a_layout_is_found_behind_wrappers_and_only_if_its_norms_are_exactly_known() -> None:
    model = tiny_model("llama")

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base_model = nn.Module()
            self.base_model.model = model

        def get_input_embeddings(self) -> nn.Module:
            return model.get_input_embeddings()

    wrapped = HookPoints(Wrapper(), model.config)
    assert wrapped.site("blocks.2.hook_mlp_out").module == "base_model.model.model.layers.2.mlp"
    assert wrapped.site("ln_final.hook_normalized").module == "base_model.model.model.norm"
    for block in model.model.layers:
        block.post_self_attn_layernorm = nn.Identity()  # another architecture: what attention adds is not what attention returns
    unknown = HookPoints(model, model.config)
    assert unknown.layout is None
    assert unknown.names == []
    assert unknown.site("model.layers.1.mlp:out").module == "model.layers.1.mlp"
    with pytest.raises(HookPointError, match="no hook point"):
        unknown.site("blocks.0.hook_resid_post")
