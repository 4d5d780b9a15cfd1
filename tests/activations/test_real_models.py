"""The streams over real language models: the demo model, and tiny models of several shapes saved in Hugging Face format."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lm_saes.activations.factory import ActivationFactory, ActivationStream
from lm_saes.config import ActivationFactoryConfig, ActivationFactoryTarget, LanguageModelConfig
from lm_saes.lm.language_model import LanguageModel, load_model
from tests.lm.tiny_models import SENTENCES, save_tiny


def open_stream(model: LanguageModel, name: str, **fields: object) -> ActivationStream:
    settings = {"sources": [{"name": name}], "hook_points": ["blocks.1.hook_resid_post"], "context_size": 16, "model_batch_size": 2, **fields}
    datasets = {} if name == "demo" else {name: SENTENCES * 3}
    return ActivationFactory(ActivationFactoryConfig(**settings)).process(model, datasets=datasets)  # pyright: ignore[reportArgumentType]


def test_the_demo_source_needs_no_entry_and_the_demo_model_resumes_bit_for_bit() -> None:
    model = load_model(LanguageModelConfig(model_name="demo", device="cpu"))
    fields = {"batch_size": 32, "buffer_size": 100, "context_size": 64}
    stream = open_stream(model, "demo", **fields)
    batch = [next(stream) for _ in range(3)][-1]
    assert batch["blocks.1.hook_resid_post"].shape == (32, model.d_model)
    assert not model.special_token_ids & set(batch["tokens"].tolist())
    state = stream.state_dict()
    resumed = open_stream(model, "demo", **fields)
    resumed.load_state_dict(state)
    for _ in range(4):
        expected, got = next(stream), next(resumed)
        assert all(torch.equal(expected[key], got[key]) for key in expected)


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
@pytest.mark.parametrize("packing", [True, False])
def test_contexts_are_what_the_model_computes_on_their_tokens(tmp_path: Path, family: str, packing: bool) -> None:
    save_tiny(family, tmp_path)
    model = load_model(LanguageModelConfig(model_name=str(tmp_path), device="cpu"))
    stream = open_stream(model, "text", target=ActivationFactoryTarget.ACTIVATIONS_2D, batch_size=2, packing=packing)
    batches = list(stream)
    assert batches
    for batch in batches:
        used = int(batch["attention_mask"].sum(1).max())
        attention_mask = None if bool(batch["attention_mask"].all()) else batch["attention_mask"][:, :used]
        direct = model.capture(batch["tokens"][:, :used], attention_mask, stream.cfg.hook_points)["blocks.1.hook_resid_post"]
        held = batch["attention_mask"][:, :used]
        assert torch.equal(batch["blocks.1.hook_resid_post"][:, :used][held], direct[held])
        special = torch.isin(batch["tokens"], torch.tensor(sorted(model.special_token_ids)))
        assert not bool((batch["mask"] & special).any())
        if family == "bert":
            ends = batch["attention_mask"].sum(1) - 1
            assert (batch["tokens"][:, 0] == model.bos_token_id).all()
            assert (batch["tokens"].gather(1, ends[:, None]).flatten() == model.eos_token_id).all()
