"""The MLP of a layer, asked outside a forward, answers what it answers inside."""

from __future__ import annotations

import pytest
import torch

from lm_saes.errors import HookPointError, LanguageModelError
from tests.lm.test_hook_points import IDS, language_model
from tests.lm.tiny_models import FAMILIES, WIDTH


@pytest.mark.parametrize("family", FAMILIES)
def test_the_answer_is_that_of_the_forward(family: str) -> None:
    lm = language_model(family)
    mlp = lm.mlp(1)
    seen = lm.capture(IDS, None, [mlp.hook_in, mlp.hook_out])
    given = seen[mlp.hook_in].flatten(0, 1)
    torch.testing.assert_close(mlp.respond(given), seen[mlp.hook_out].flatten(0, 1), rtol=1e-5, atol=1e-6)
    assert mlp.hook_in == ("blocks.1.hook_resid_mid" if "bert" in family else "blocks.1.ln2.hook_normalized")


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama", "gemma2", "bert", "distilbert"])
def test_a_neurons_direction_is_what_moves_it_most(family: str) -> None:
    """The hidden value of neuron i changes by |w_i|^2 for a step w_i: the rows are what the linear map multiplies with."""
    lm = language_model(family)
    mlp = lm.mlp(0)
    linear, _ = lm.hook_points.mlp(0)
    assert mlp.neurons is not None
    assert linear is not None
    assert mlp.neurons.shape[1] == WIDTH
    with torch.no_grad():
        hidden = linear(mlp.neurons) - linear(torch.zeros(1, WIDTH))
    torch.testing.assert_close(hidden, mlp.neurons @ mlp.neurons.T, rtol=1e-4, atol=1e-5)


def test_a_mixture_of_experts_has_no_directions_of_its_own() -> None:
    assert language_model("mixtral").mlp(0).neurons is None


def test_what_there_is_not() -> None:
    with pytest.raises(HookPointError, match="no MLP of block 99"):
        language_model("gpt2").mlp(99)
    from lm_saes.lm.language_model import LanguageModel

    with pytest.raises(LanguageModelError, match="use the Hugging Face backend"):
        LanguageModel.mlp(language_model("gpt2"), 0)
