"""TransformerLens is optional: without it one line says what to install; with it, its tensors are ours."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from lm_saes import devices
from lm_saes.config import LanguageModelConfig
from lm_saes.errors import HookPointError, LanguageModelError
from lm_saes.lm.language_model import load_model
from tests.lm.test_hook_points import IDS
from tests.lm.tiny_models import save_tiny

installed = pytest.mark.skipif(importlib.util.find_spec("transformer_lens") is None, reason="transformer-lens is not installed")


def config(folder: Path, backend: str = "transformer_lens") -> LanguageModelConfig:
    return LanguageModelConfig.model_validate({"model_name": str(folder), "device": "cpu", "backend": backend})


def test_without_it_the_error_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformer_lens", None)
    monkeypatch.setitem(sys.modules, "transformer_lens.model_bridge", None)
    with pytest.raises(LanguageModelError, match=r'pip install "transformer-lens>=4\.0"'):
        load_model(config(Path("demo")))


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("backend", ["huggingface", pytest.param("transformer_lens", marks=installed)])
def test_linear_layers_of_either_backend_run_on_the_fast_product(backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, used = load_model(config(save_tiny("llama", tmp_path), backend)), list[int]()
    fast = devices.fast_linear
    monkeypatch.setattr(devices, "fast_linear", lambda *tensors: used.append(1) or fast(*tensors))
    model.logits(IDS.repeat(8, 1), edits={"blocks.0.hook_resid_post": lambda x: x})
    assert len(used) >= 7 * model.n_layers  # four of attention, three of the MLP


@installed
@pytest.mark.filterwarnings("default")  # its own and its dependencies' deprecations
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "gpt_neox_sequential", "llama", "gemma2", "gemma3", "qwen3", "mixtral"])
def test_every_hook_is_the_tensor_of_the_hugging_face_backend(family: str, tmp_path: Path) -> None:
    folder = save_tiny(family, tmp_path)
    plain, bridged = load_model(config(folder, "huggingface")), load_model(config(folder))
    names = plain.hook_points.names  # pyright: ignore[reportAttributeAccessIssue]
    ours, theirs = plain.capture(IDS, None, names), bridged.capture(IDS, None, names)
    for name in names:  # attention is computed by another kernel there: float32 rounding
        torch.testing.assert_close(theirs[name], ours[name], rtol=1e-4, atol=2e-5, msg=name)
        edits = {name: lambda x: 1.5 * x}
        torch.testing.assert_close(bridged.logits(IDS, edits=edits), plain.logits(IDS, edits=edits), rtol=1e-3, atol=1e-4, msg=name)
        assert bridged.hook_width(name) == plain.hook_width(name)
    with pytest.raises(HookPointError, match=r"blocks\.1\.hook_resid_post"):
        bridged.hook_width("blocks.1.hook_residpost")
    assert bridged.provenance()["backend"] == "transformer_lens"
