"""The forward stops where it may, leaves nothing behind, and padding changes nothing; edits do what the same change by hand does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lm_saes.config import LanguageModelConfig
from lm_saes.errors import HookPointError, LanguageModelError
from lm_saes.lm.huggingface import HuggingFaceLanguageModel
from tests.lm.test_hook_points import IDS, SEQUENTIAL, language_model
from tests.lm.tiny_models import CAUSAL, ENCODERS, FAMILIES, LAYERS, save_tiny, tiny_model, tiny_tokenizer


@contextmanager
def counting(lm: HuggingFaceLanguageModel) -> Iterator[list[str]]:
    """Names of the modules that ran to their end, in order."""
    finished: list[str] = []
    handles = [
        module.register_forward_hook(lambda _, __, ___, path=path: finished.append(path), always_call=False)
        for path, module in lm.model.named_modules()
        if path
    ]
    yield finished
    for handle in handles:
        handle.remove()


def hooks_in(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_forward_stops_after_the_deepest_hook(family: str) -> None:
    lm = language_model(family)
    blocks = [lm.hook_points.site(f"blocks.{i}.hook_resid_post").module for i in range(LAYERS)]
    with counting(lm) as finished:
        lm.capture(IDS, None, ["blocks.1.hook_resid_post", "blocks.0.hook_mlp_out", "hook_embed"])
        assert [path for path in finished if path in blocks] == blocks[:2]
        finished.clear()
        lm.capture(IDS, None, ["blocks.1.hook_resid_pre", "blocks.0.attn.hook_z"])  # the deepest is an input
        assert [path for path in finished if path in blocks] == blocks[:1]
        assert not any(path.startswith(blocks[1]) for path in finished)


def test_hooks_that_fire_in_another_order_than_asked_are_all_captured() -> None:
    lm = language_model("gpt2")
    names = lm.hook_points.names
    backwards = lm.capture(IDS, None, names[::-1])
    assert list(backwards) == names[::-1]
    for name in names:
        assert torch.equal(backwards[name], lm.capture(IDS, None, [name])[name])


def test_two_names_of_one_tensor_and_repeated_names() -> None:
    lm = language_model("gpt2")
    seen = lm.capture(IDS, None, ["blocks.0.hook_resid_post", "blocks.1.hook_resid_pre", "transformer.h.0:out", "blocks.0.hook_resid_post"])
    assert len(seen) == 3
    assert all(torch.equal(tensor, seen["blocks.0.hook_resid_post"]) for tensor in seen.values())
    assert lm.capture(IDS, None, []) == {}


def test_nothing_is_left_behind() -> None:
    lm = language_model("llama")
    before = {name: tensor.clone() for name, tensor in lm.model.state_dict().items()}
    lm.model.train()
    lm.model.model.layers[1].eval()
    modes = [module.training for module in lm.model.modules()]
    hooks = hooks_in(lm.model)

    def fail(_: Tensor) -> Tensor:
        raise RuntimeError("from the edit")

    seen = lm.capture(IDS, None, ["blocks.2.hook_resid_post"])["blocks.2.hook_resid_post"]
    lm.logits(IDS, edits={"blocks.1.hook_resid_mid": lambda x: x * 2})
    with pytest.raises(RuntimeError, match="from the edit"):
        lm.logits(IDS, edits={"blocks.1.hook_resid_mid": fail})
    with pytest.raises(LanguageModelError):
        lm.logits(IDS, edits={"blocks.1.hook_resid_mid": lambda x: x[:, :1]})
    with pytest.raises(HookPointError):
        lm.capture(IDS, None, ["blocks.1.hook_resid_mid", "blocks.1.nothing"])
    with pytest.raises(HookPointError, match="never reached"):
        lm.capture(IDS, None, ["model.layers:out"])
    assert hooks_in(lm.model) == hooks
    assert [module.training for module in lm.model.modules()] == modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in lm.model.state_dict().items())
    assert not seen.requires_grad
    assert not seen.is_inference()  # a dictionary is trained on it
    assert all(parameter.grad is None and parameter.requires_grad for parameter in lm.model.parameters())


def test_dropout_is_off_even_if_the_caller_is_training() -> None:
    model = tiny_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5)
    lm = HuggingFaceLanguageModel.from_model(model, tiny_tokenizer("gpt2"))
    quiet = lm.capture(IDS, None, ["blocks.2.hook_resid_post"])
    model.train()
    assert torch.equal(lm.capture(IDS, None, ["blocks.2.hook_resid_post"])["blocks.2.hook_resid_post"], quiet["blocks.2.hook_resid_post"])


def test_captured_tensors_are_copies() -> None:
    class AddsInPlace(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.add_(1)

    lm = language_model("gpt2")
    truth = lm.capture(IDS, None, ["transformer.h.0:out"])["transformer.h.0:out"]
    lm.model.transformer.h[1].ln_1 = AddsInPlace()
    seen = lm.capture(IDS, None, ["transformer.h.0:out", "transformer.h.1.ln_1:out"])
    assert torch.equal(seen["transformer.h.0:out"], truth)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(family: str, side: str) -> None:
    lm = language_model(family)
    name = f"blocks.{LAYERS - 1}.hook_resid_post"
    short, padding = IDS[1:, :5], 3
    filler = torch.full((1, padding), 1)  # the pad token; RoBERTa counts positions by it
    holes, ones = torch.zeros(1, padding, dtype=torch.bool), torch.ones(1, 5, dtype=torch.bool)
    ids = torch.cat([short, filler] if side == "right" else [filler, short], dim=1)
    mask = torch.cat([ones, holes] if side == "right" else [holes, ones], dim=1)
    both = lm.capture(torch.cat([IDS[:1], ids]), torch.cat([torch.ones_like(mask), mask]), [name])[name]
    alone = lm.capture(short, None, [name])[name]
    torch.testing.assert_close(both[1][mask[0]], alone[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(both[0], lm.capture(IDS[:1], None, [name])[name][0], rtol=1e-5, atol=1e-5)
    assert torch.isfinite(both).all()


def test_a_full_mask_is_no_mask() -> None:
    lm = language_model("llama")
    plain = lm.logits(IDS)
    for mask in (torch.ones_like(IDS), torch.ones_like(IDS, dtype=torch.bool)):
        assert torch.equal(lm.logits(IDS, mask), plain)


@pytest.mark.parametrize("family", CAUSAL)
def test_logits_are_the_models_own(family: str) -> None:
    lm = language_model(family)
    assert torch.equal(lm.logits(IDS), lm.model(IDS).logits.detach())
    assert lm.is_causal


@pytest.mark.parametrize("family", ENCODERS)
def test_encoders_return_their_final_hidden_state(family: str) -> None:
    lm = language_model(family)
    last = f"blocks.{LAYERS - 1}.hook_resid_post"
    assert torch.equal(lm.logits(IDS), lm.capture(IDS, None, [last])[last])
    edited = lm.logits(IDS, edits={last: lambda x: x + 1})
    torch.testing.assert_close(edited, lm.logits(IDS) + 1)
    assert not lm.is_causal


# ---------------------------------------------------------------------------------------------- edits


@pytest.mark.parametrize("family", SEQUENTIAL)
def test_an_edit_of_resid_mid_reaches_the_mlp_and_the_stream(family: str) -> None:
    """By hand: what attention adds becomes (edited resid_mid) - resid_pre, which puts the edited tensor on both paths."""
    lm = language_model(family)
    before = lm.capture(IDS, None, ["blocks.1.hook_resid_pre"])["blocks.1.hook_resid_pre"]
    middle = lm.capture(IDS, None, ["blocks.1.hook_resid_mid"])["blocks.1.hook_resid_mid"]
    target = 0.5 * middle + 0.25
    edited = lm.logits(IDS, edits={"blocks.1.hook_resid_mid": lambda _: target})
    by_hand = lm.logits(IDS, edits={"blocks.1.hook_attn_out": lambda _: target - before})
    torch.testing.assert_close(edited, by_hand, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(edited, lm.logits(IDS), atol=1e-2)


@pytest.mark.parametrize("family", FAMILIES)
def test_replacing_by_the_same_changes_nothing_and_by_another_runs_acts_as_there(family: str) -> None:
    lm = language_model(family)
    clean = lm.logits(IDS)
    for name in lm.hook_points.names:
        assert torch.equal(lm.logits(IDS, edits={name: lambda x: x.clone()}), clean), name
    other = IDS.flip(0)
    for name in ("hook_embed", "blocks.1.hook_resid_pre", "blocks.1.hook_resid_post"):
        swapped = lm.capture(other, None, [name])[name]
        torch.testing.assert_close(lm.logits(IDS, edits={name: lambda _, swapped=swapped: swapped}), lm.logits(other), rtol=1e-5, atol=1e-5)


def test_edits_of_gpt2_by_hand() -> None:
    """The last block and the head written out with the model's own weights."""
    lm = language_model("gpt2")
    block, model = lm.model.transformer.h[LAYERS - 1], lm.model
    last = LAYERS - 1
    middle, mlp = lm.capture(IDS, None, [f"blocks.{last}.hook_resid_mid", f"blocks.{last}.hook_mlp_out"]).values()
    with torch.no_grad():
        shifted = model.lm_head(model.transformer.ln_f(middle + 2 * mlp))
        around = model.lm_head(model.transformer.ln_f((middle - 1) + block.mlp(block.ln_2(middle - 1))))
        skipped = model.lm_head(model.transformer.ln_f(middle))
    torch.testing.assert_close(lm.logits(IDS, edits={f"blocks.{last}.hook_mlp_out": lambda x: 2 * x}), shifted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lm.logits(IDS, edits={f"blocks.{last}.hook_resid_mid": lambda x: x - 1}), around, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lm.logits(IDS, edits={f"transformer.h.{last}.mlp:out": torch.zeros_like}), skipped, rtol=1e-5, atol=1e-5)


def test_several_edits_apply_in_the_order_of_the_forward_then_of_the_dict() -> None:
    lm = language_model("llama")
    post = f"blocks.{LAYERS - 1}.hook_resid_post"
    mid = f"blocks.{LAYERS - 1}.hook_resid_mid"
    seen: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        seen.append(x)
        return x

    both = lm.logits(IDS, edits={post: keep, mid: lambda x: x + 1})
    assert torch.equal(both, lm.logits(IDS, edits={mid: lambda x: x + 1}))
    assert torch.equal(lm.logits(IDS, edits={post: lambda _: seen[0]}), both)  # an edit of the output sees the whole edited stream
    doubled_then_shifted = lm.logits(IDS, edits={post: lambda x: 2 * x, f"model.layers.{LAYERS - 1}:out": lambda x: x + 1})
    torch.testing.assert_close(doubled_then_shifted, lm.logits(IDS, edits={post: lambda x: 2 * x + 1}), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("ids", "mask", "what"),
    [
        (torch.zeros(5, dtype=torch.long), None, "must be"),
        (IDS, torch.ones(2, 3), "same shape"),
        (torch.zeros(1, 65, dtype=torch.long), None, "at most 64 tokens"),
        (torch.full((1, 4), 320), None, "between 0 and 319"),
        (torch.full((1, 4), -1), None, "between 0 and 319"),
    ],
)
def test_inputs_that_cannot_run_say_so(ids: Tensor, mask: Any, what: str) -> None:
    with pytest.raises(LanguageModelError, match=what):
        language_model("gpt2").capture(ids, mask, ["blocks.0.hook_resid_pre"])


def test_threads_do_not_see_each_others_hooks() -> None:
    """One thread reads ahead while another evaluates with the same model: each gets what it would get alone."""
    lm = language_model("gpt2")
    first, last = "blocks.0.hook_resid_post", f"blocks.{LAYERS - 1}.hook_resid_post"
    jobs: list[Callable[[], Tensor]] = [
        lambda: lm.capture(IDS, None, [first])[first],
        lambda: lm.capture(IDS, None, [last])[last],
        lambda: lm.logits(IDS),
        lambda: lm.logits(IDS, edits={first: lambda x: x + 1}),
    ]
    alone = [job() for job in jobs]
    with ThreadPoolExecutor(len(jobs)) as pool:
        together = [pool.submit(lambda job=job: [job() for _ in range(30)]) for job in jobs]
        for expected, future in zip(alone, together, strict=True):
            assert all(torch.equal(result, expected) for result in future.result())
    assert not any(module.training for module in lm.model.modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_is_pytorchs_own_and_no_logits_are_made_for_activations(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`from_pretrained` chooses scaled_dot_product_attention where the model has it; the head, the dearest matrix of a small model, does not run."""
    save_tiny(family, tmp_path)
    lm = HuggingFaceLanguageModel(LanguageModelConfig(model_name=str(tmp_path), device="cpu"))
    calls: list[int] = []
    original = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or original(*a, **k))
    with counting(lm) as finished:
        lm.capture(IDS, None, [f"blocks.{LAYERS - 1}.hook_resid_post"])
    assert len(calls) == (0 if family == "gemma2" else LAYERS)  # Gemma 2 bends its attention scores by a tanh, which that function cannot
    model: Any = lm.model
    head = model.get_output_embeddings() if lm.is_causal else None
    assert head is None or not any(model.get_submodule(path) is head for path in finished)
