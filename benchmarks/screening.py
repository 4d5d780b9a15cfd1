"""Screened selection against float32 selection: what the bounds let through, what is selected, and whether training notices.

    python benchmarks/screening.py quality [--model demo FOLDER ...] [--layers 0 2 ...] [--steps 500] [--tokens 65536] [--threads 2]
    python benchmarks/screening.py time [--shape D,F,k,N ...] [--rounds 7] [--threads 2]

`quality` takes activations of language models (each layer's resid_post; texts are the bundled corpus) or random ones, trains a TopK SAE
on each twice from the same start on the same batches, with `native` and with `screened` operations, and prints for each:

    products    float32 products per token that screening makes, over k; at the start and at the end of training; with products of integers,
                then in bfloat16
    fall-back   share of the tokens with too many candidates, which get a float32 product of their own; the same
    recall      of the latent that fares worst: the share of the tokens for which a float32 matrix product selects it where screening does too
    loss        of the last 50 steps, screened over native;   dead: latents that fire on no token of the last batches, with each

`time` prints the time of the selection from activations to codes, exact and screened, interleaved, new weights each time.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from lm_saes import ops
from lm_saes.activations.factory import ActivationFactory
from lm_saes.config import ActivationFactoryConfig, InitializerConfig, LanguageModelConfig, SAEConfig
from lm_saes.lm.language_model import load_model
from lm_saes.losses import LossInputs, LossWeights, total_loss
from lm_saes.models import SparseDictionary
from lm_saes.models.initializer import Initializer
from lm_saes.ops import SparseCodes, native

SHAPES = ["768,6144,50,4096", "768,24576,50,2048", "192,1536,32,2048"]
BATCH, K, EXPANSION, CONTEXT = 2048, 32, 8, 128
ROUNDINGS = (native.Integers, native.Bfloat16)
LAST = 50
"""Steps at the end over which losses and dead latents are taken."""


def activations(model_name: str, layers: list[int], n_tokens: int) -> Iterator[tuple[str, Tensor]]:
    """The residual stream after some layers (all if none is named): [n_tokens, D], shuffled, special tokens and outliers filtered as in training."""
    model = load_model(LanguageModelConfig(model_name=model_name, device="cpu", local_files_only=True))
    hooks = [f"blocks.{layer}.hook_resid_post" for layer in layers or range(model.n_layers)]
    cfg = ActivationFactoryConfig.model_validate(
        {
            "target": "activations-1d",
            "hook_points": hooks,
            "sources": [{"type": "dataset", "name": "demo"}],
            "batch_size": BATCH,
            "buffer_size": 8 * BATCH,
            "context_size": CONTEXT,
            "model_batch_size": 16,
        }
    )
    stream = ActivationFactory(cfg).process(model=model)
    batches = [next(stream) for _ in range(n_tokens // BATCH)]
    for hook in hooks:
        yield f"{os.path.basename(model_name.rstrip('/'))} {hook}", torch.cat([batch[hook] for batch in batches])


def new_dictionary(x: Tensor) -> SparseDictionary:
    """A TopK SAE as the recipes start it."""
    cfg = SAEConfig(hook_point_in="h", hook_point_out="h", d_model=x.shape[1], expansion_factor=EXPANSION, act_fn="topk", top_k=K, device="cpu")
    start = InitializerConfig(bias_init_method="geometric_median", grid_search_init_norm=True, init_encoder_bias_with_mean_hidden_pre=True)
    return Initializer(start).initialize_sae_from_config(cfg, [{"h": piece} for piece in x.split(BATCH)])


def screen(dictionary: SparseDictionary, x: Tensor, rounding: type[native.Integers | native.Bfloat16]) -> tuple[float, float, float]:
    """Products per token over k, share of tokens that fall back, and recall of the worst latent, on some normalised activations."""
    W, b, _, _, gate_norm = dictionary.encoder()
    with torch.no_grad():
        screened = native.ScreenedEncoder(W, b, gate_norm, rounding).topk(x, K)
        wanted = native.topk(torch.addmm(b, x, W), gate_norm, K)[1]
        exact, found = (torch.zeros(len(x), W.shape[1], dtype=torch.bool).scatter_(1, indices, 1) for indices in (wanted, screened.indices))
    recall = ((exact & found).sum(0) / exact.sum(0)).nan_to_num(1.0).min()
    done = screened.products >= 0
    return float(screened.products[done].float().mean()) / K, float((~done).float().mean()), float(recall)


def train(implementation: str, x: Tensor, steps: int) -> tuple[SparseDictionary, float, int]:
    """The dictionary after some steps, its loss at the end and its dead latents."""
    os.environ[ops.ENVIRONMENT_VARIABLE] = implementation
    torch.manual_seed(0)
    dictionary = new_dictionary(x)
    optimizer = torch.optim.Adam(dictionary.parameters(), lr=4e-4, fused=True)
    batches = x.split(BATCH)
    losses, fired = [], torch.zeros(dictionary.cfg.d_sae, dtype=torch.bool)
    for step in range(steps):
        batch = {"h": batches[step % len(batches)]}
        inputs = dictionary.normalize_activations(batch)["h"]
        optimizer.zero_grad(set_to_none=True)
        forward = dictionary.run(inputs)
        loss, _ = total_loss(dictionary, LossInputs(inputs, inputs, forward, torch.ones(len(inputs), dtype=torch.bool)), LossWeights())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(dictionary.parameters(), 1.0)
        optimizer.step()
        if step >= steps - LAST:
            losses.append(float(loss.detach()))
            assert isinstance(forward.codes, SparseCodes)
            fired[forward.codes.indices[forward.codes.values > 0]] = True
    return dictionary, statistics.mean(losses), int((~fired).sum())


def quality(models: list[str], layers: list[int], steps: int, n_tokens: int) -> None:
    def sources() -> Iterator[tuple[str, Tensor]]:
        if not models:
            yield "random, D 192", torch.randn(n_tokens, 192)
        for model in models:
            yield from activations(model, layers, n_tokens)

    print(f"TopK k {K}, F = {EXPANSION} D, {BATCH} tokens a step, {steps} steps")
    for name, x in sources():
        start = new_dictionary(x)
        sample = start.normalize_activations({"h": x[:BATCH]})["h"]
        early = [screen(start, sample, rounding) for rounding in ROUNDINGS]
        _, loss, dead = train("native", x, steps)
        dictionary, screened_loss, screened_dead = train("screened", x, steps)
        late = [screen(dictionary, sample, rounding) for rounding in ROUNDINGS]
        mean = float(sample.mean(0).norm() / sample.norm(dim=1).mean())
        print(f"{name}: |mean| / mean |x| {mean:.2f}; loss {loss:.5g}, screened x {screened_loss / loss:.5f}; dead {dead}, screened {screened_dead}")
        for rounding, before, after in zip(ROUNDINGS, early, late, strict=True):
            products, fallback, recall = zip(before, after, strict=True)
            print(
                f"    {rounding.__name__}: products {products[0]:.2f} k, {products[1]:.2f} k; fall-back {fallback[0]:.2%}, {fallback[1]:.2%}; "
                f"recall {recall[0]:.4f}, {recall[1]:.4f}",
                flush=True,
            )


def times(shape: str, rounds: int) -> None:
    D, F, k, N = (int(number) for number in shape.split(","))
    torch.manual_seed(0)
    x, W, b = torch.randn(N, D), torch.randn(D, F) / D**0.5, torch.zeros(F)
    buffer, screened = torch.empty(min(N, 1024), F), [native.ScreenedEncoder(W, b, None, rounding) for rounding in ROUNDINGS]

    def exact() -> None:
        for rows in x.split(1024):
            native.topk(torch.mm(rows, W, out=buffer[: len(rows)]), None, k)

    def with_new_weights(encoder: native.ScreenedEncoder) -> None:
        encoder.update(W, b)
        encoder.topk(x, k)

    parts = {"exact": exact} | {type_.__name__: partial(with_new_weights, encoder) for type_, encoder in zip(ROUNDINGS, screened, strict=True)}
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    for name in [*parts] * (rounds + 1):
        begin = time.perf_counter()
        parts[name]()
        seconds[name].append(time.perf_counter() - begin)
    medians = {name: 1e3 * statistics.median(measured[1:]) for name, measured in seconds.items()}
    products = [encoder.topk(x, k).products for encoder in screened]
    print(f"{shape}: exact {medians['exact']:.1f} ms", end="")
    for rounding, made in zip(ROUNDINGS, products, strict=True):
        ratio = medians["exact"] / medians[rounding.__name__]
        print(f"; {rounding.__name__} {medians[rounding.__name__]:.1f} ms, ratio {ratio:.2f}, products {made.float().mean() / k:.2f} k", end="")
    print(flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["quality", "time"])
    parser.add_argument("--model", nargs="*", default=["demo"], help='"demo", or folders in Hugging Face format; none: random numbers')
    parser.add_argument("--layers", nargs="*", type=int, default=[], help="all if none is named")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--tokens", type=int, default=65_536)
    parser.add_argument("--shape", nargs="+", default=SHAPES, help="D,F,k,N")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.what == "quality":
        quality(arguments.model, arguments.layers, arguments.steps, arguments.tokens)
    else:
        for shape in arguments.shape:
            times(shape, arguments.rounds)


if __name__ == "__main__":
    main()
