"""The whole way from text to metrics, beside transformers' own modules and formulas in float64: nothing of this library but the weights and the tokens."""

from __future__ import annotations

import inspect
import itertools
import json.decoder
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lm_saes.activations.factory import ActivationFactory
from lm_saes.config import (
    ActivationFactoryConfig,
    ActivationFactoryDatasetSource,
    ActivationFactoryTarget,
    EvalConfig,
    InitializerConfig,
    LanguageModelConfig,
    SAEConfig,
)
from lm_saes.evaluation.evaluator import Evaluator
from lm_saes.lm.language_model import load_model
from lm_saes.models.initializer import Initializer
from lm_saes.models.sae import SparseAutoEncoder

LAYER = 2
RESIDUAL, MLP_IN, MLP_OUT = (f"blocks.{LAYER}.{name}" for name in ("hook_resid_post", "ln2.hook_normalized", "hook_mlp_out"))
START = InitializerConfig(bias_init_method="geometric_median", grid_search_init_norm=True, init_encoder_bias_with_mean_hidden_pre=True, n_batches=2)


@pytest.fixture(scope="module")
def demo() -> Any:
    return load_model(LanguageModelConfig(model_name="demo", device="cpu"))


def reconstruction(sae: SparseAutoEncoder, x: Tensor) -> Tensor:
    """BatchTopK at inference, of raw activations."""
    weights = {name: tensor.detach().double() for name, tensor in sae.state_dict().items()}
    norms = sae.cfg.dataset_average_activation_norm
    assert norms is not None
    s_in, s_out = (math.sqrt(sae.cfg.d_model) / norms[hook] for hook in (sae.cfg.hook_point_in, sae.cfg.hook_point_out))
    h = x.double() * s_in @ weights["W_E"] + weights["b_E"]
    fires = (h * weights["W_D"].norm(dim=1) > weights["activation_function.threshold"]) & (h > 0)
    result = torch.where(fires, h, 0.0) @ weights["W_D"] + weights["b_D"]
    return (result + (x.double() * s_in @ weights["W_skip"] if "W_skip" in weights else 0.0)) / s_out


def logits(model: Any, batch: dict[str, Any], transcoder: bool, change: Any = None) -> Tensor:
    """Of the forward pass in which `change(input, output)` takes the place of the output."""
    block = model.model.layers[LAYER]

    def hook(_: Any, inputs: Any, output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        changed = change(inputs[0] if transcoder else first, first)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    handle = (block.mlp if transcoder else block).register_forward_hook(hook) if change is not None else None
    try:
        return model(input_ids=batch["tokens"], attention_mask=batch["attention_mask"].long()).logits.double()
    finally:
        if handle is not None:
            handle.remove()


@torch.no_grad()
@pytest.mark.parametrize(("hook_in", "hook_out"), [(RESIDUAL, RESIDUAL), (MLP_IN, MLP_OUT)], ids=["sae", "skip transcoder"])
def test_metrics_equal_those_of_transformers_modules_and_formulas(demo: Any, hook_in: str, hook_out: str) -> None:
    transcoder = hook_in != hook_out
    factory = ActivationFactoryConfig(
        sources=[ActivationFactoryDatasetSource(name="text")], target=ActivationFactoryTarget.ACTIVATIONS_2D, batch_size=4, model_batch_size=4,
        hook_points=list(dict.fromkeys([hook_in, hook_out])), context_size=64,
    )  # fmt: skip
    source = inspect.getsource(json.decoder)
    texts = [source[500 * i : 500 * i + 80 + 40 * i] for i in range(8)]  # short and unpacked, so that rows are of different lengths
    stream = ActivationFactory(factory.replace(packing=False)).process(model=demo, datasets={"text": texts})
    batches = list(itertools.islice(stream, 2))
    cfg = SAEConfig(
        hook_point_in=hook_in, hook_point_out=hook_out, d_model=192, expansion_factor=2, act_fn="batchtopk", top_k=24, use_skip_connection=transcoder
    )
    sae = Initializer(START.replace(initialize_tc_with_mlp=transcoder)).initialize_sae_from_config(cfg, batches, model=demo)
    if sae.W_skip is not None:
        sae.W_skip.normal_(std=0.01, generator=torch.Generator().manual_seed(0))
    found = Evaluator(EvalConfig(total_eval_tokens=10**6)).evaluate(sae, batches, model=demo)

    labels, estimates, sums, n = [], [], dict.fromkeys(("original", "reconstructed", "ablated", "mean_ablated", "kl"), 0.0), 0
    for batch in batches:
        ids, mask, attention = batch["tokens"], batch["mask"], batch["attention_mask"]
        assert (~attention).sum() > 0
        assert (attention & ~mask).sum() > 0

        def splice(x: Tensor, y: Tensor, mask: Tensor = mask) -> Tensor:
            labels.append(y[mask].double())
            estimates.append(reconstruction(sae, x)[mask])
            return torch.where(mask[..., None], reconstruction(sae, x).to(y), y)

        def silence(x: Tensor, y: Tensor, mask: Tensor = mask) -> Tensor:
            return torch.where(mask[..., None], 0.0, y)

        def average(x: Tensor, y: Tensor, mask: Tensor = mask) -> Tensor:
            return torch.where(mask[..., None], torch.cat(labels).mean(0).to(y), y)  # of the batches so far, this one included

        counted = attention[:, :-1] & attention[:, 1:]
        changes = {"original": None, "reconstructed": splice, "ablated": silence, "mean_ablated": average}
        scores = {name: logits(demo.model, batch, transcoder, change)[:, :-1][counted].log_softmax(-1) for name, change in changes.items()}
        for name, log_p in scores.items():
            sums[name] -= float(log_p.gather(1, ids[:, 1:][counted][:, None]).sum())
        sums["kl"] += float((scores["original"].exp() * (scores["original"] - scores["reconstructed"])).sum())
        n += int(counted.sum())
    y, y_hat = torch.cat(labels), torch.cat(estimates)
    clean, spliced, ablated, averaged, kl = (value / n for value in sums.values())
    expected = {
        "explained_variance": 1 - float((y - y_hat).square().sum() / (y - y.mean(0)).square().sum()),
        "downstream_loss_original": clean, "delta_ce": spliced - clean, "recovered_fraction": (ablated - spliced) / (ablated - clean),
        "recovered_fraction_mean": (averaged - spliced) / (averaged - clean), "kl_divergence": kl,
        "n_tokens": len(y),
    }  # fmt: skip
    for name, value in expected.items():
        assert found[f"metrics/{name}"] == pytest.approx(value, rel=1e-3, abs=1e-4), name
    assert expected["delta_ce"] > 0.01
    assert expected["kl_divergence"] > 0.01
