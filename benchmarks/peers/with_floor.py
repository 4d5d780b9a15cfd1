"""No library: what a step cannot do without, each piece as fast as plain torch does it here and now.

- `encoder`: the product x W_E in float32: into a buffer, in one piece or in blocks of 1024 rows, or by torch's operator for oneDNN in such
  blocks, whichever is fastest.
- `sparse`: three passes that read or sum one row of D numbers for each non-zero code: the reconstruction (with the gradient of the
  codes from the same rows), and the two weight gradients, each over entries sorted by latent. Timed with `embedding_bag`.
- `adam`: fused Adam over both weight matrices.

Left out: selection, sorting, biases, the loss, clipping, statistics.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
from feed import Feed, Task
from torch.nn.functional import embedding_bag

BLOCK = 1024


def train(task: Task, feed: Feed) -> None:
    N, D, F = task.tokens, task.d_model, task.d_sae
    per_token = task.k if "topk" in task.kind else round(task.density * F)
    W_E, W_D = (torch.randn(shape) * D**-0.5 for shape in ((D, F), (F, D)))
    parameters = [torch.nn.Parameter(weight) for weight in (W_E, W_D)]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    adam = torch.optim.Adam(parameters, lr=1e-6, fused=True)
    whole = torch.empty(N, F)
    block = whole[:BLOCK]

    latents = torch.rand(N, F).topk(per_token, dim=1).indices.flatten() if N * F < 2**28 else torch.randint(F, (N * per_token,))
    values = torch.rand(N * per_token)
    by_token = torch.arange(0, N * per_token, per_token)
    order = latents.sort(stable=True).indices
    tokens = (order // per_token).contiguous()
    by_latent = torch.cat([torch.zeros(1, dtype=torch.int64), torch.bincount(latents, minlength=F).cumsum(0)[:-1]])
    gradient = torch.randn(N, D)

    def blocks(x: torch.Tensor) -> None:
        for rows in x.split(BLOCK):
            torch.mm(rows, W_E, out=block[: len(rows)])

    def onednn(x: torch.Tensor) -> None:
        for rows in x.split(BLOCK):
            torch.ops.mkldnn._linear_pointwise(rows, W_E.t(), None, "none", [], "")

    def sparse(x: torch.Tensor) -> None:
        embedding_bag(latents, W_D, by_token, mode="sum", per_sample_weights=values)
        for matrix in (x, gradient):
            embedding_bag(tokens, matrix, by_latent, mode="sum", per_sample_weights=values)

    def one_piece(x: torch.Tensor) -> None:
        torch.mm(x, W_E, out=whole)

    feed.ready(parameters, lambda x: (torch.full((len(x),), per_token), x), f"torch {torch.__version__}")
    with torch.no_grad():
        x = feed.batches[0]
        products = (one_piece, blocks, onednn) if hasattr(torch.ops.mkldnn, "_linear_pointwise") else (one_piece, blocks)
        encoder = min(products, key=lambda product: min(_seconds(lambda: product(x)) for _ in range(3)))
        times: dict[str, list[float]] = {"encoder": [], "sparse": [], "adam": []}
        feed.extra = {"pieces": times, "encoder": encoder.__name__}
        for x in feed:
            times["encoder"].append(_seconds(partial(encoder, x)))
            times["sparse"].append(_seconds(partial(sparse, x)))
            times["adam"].append(_seconds(adam.step))


def _seconds(piece: Callable[[], object]) -> float:
    start = time.perf_counter()
    piece()
    return time.perf_counter() - start
