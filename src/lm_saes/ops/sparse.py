"""Selection, decoding and their gradients without the dense codes: [N, F] is never in memory.

Forward, the encoder product is made for blocks of rows in one buffer, and only what is selected leaves it. Backward, everything comes
from the entries of the codes. This file has the blocks and the gradients; the work on entries is done by kernels, of which there are
two sets with the same functions: `torch_kernels` for every device and data type, `native` (C++) for float32 on a CPU. Each piece of
work goes to the first set that takes its tensors.

ReLU, JumpReLU and thresholds have no fixed number of entries: where some sampled rows show that there are many, the codes are made
dense, by the reference.

Sums of gradients are made in float32 or wider, also under autocast. Differs from the reference only by rounding, hence in the
selection only where gate values lie within a few ulp.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable

from lm_saes.ops import reference, torch_kernels
from lm_saes.ops.reference import Encoder
from lm_saes.ops.sparse_codes import ByLatent, Codes, Pattern, SparseCodes, at_least_float32

ROWS_AT_ONCE = 1024
"""Tokens per encoder product: large enough for the product to run at full speed, 24 MB at 6144 latents."""
SAMPLED_ROWS = 128
"""Tokens (or one in 32, if that is more) from which the number of entries, or BatchTopK's smallest gate value, is guessed."""
CANDIDATES = (1.25, 4.0)
"""BatchTopK first looks at so many candidates for each entry it needs, by the guess; then at all positive gate values."""


@dataclass(frozen=True)
class SparseOps:
    """The operations of `lm_saes.ops` on top of one set of kernels."""

    kernels: tuple[ModuleType, ...]
    """Sets of kernels in order of preference; the last takes everything."""
    largest_density: float
    """Share of the latents that fire, above which dense codes are faster."""

    # What does not change by computing it otherwise.
    pre_activations = staticmethod(reference.pre_activations)
    gate_values = staticmethod(reference.gate_values)

    def topk_codes(self, x: Float[Tensor, "N D"], encoder: Encoder, k: int) -> SparseCodes:
        n_rows, n_latents = x.shape[0], encoder.W.shape[1]
        k = min(k, n_latents)
        with torch.no_grad():
            values, indices, factors = self.topk_entries(x, encoder, k)
            offsets = torch.arange(n_rows + 1, device=x.device) * k
        codes = SparseCodes(values.flatten(), indices.flatten(), offsets, n_latents)
        return self._differentiable(x, encoder, codes, [factor.flatten() for factor in factors])

    def batch_topk_codes(self, x: Float[Tensor, "N D"], encoder: Encoder, k: int, mask: Bool[Tensor, " N"] | None = None) -> SparseCodes:
        n_latents = encoder.W.shape[1]
        with torch.no_grad():
            kept = None if mask is None else mask.nonzero().flatten()
            x_kept = x if kept is None or len(kept) == len(x) else x[kept]
            needed = min(k, n_latents) * len(x_kept)
            found = self._candidates(x_kept, encoder, needed)
            if found.q.numel() > needed:
                found = found.at(_largest(found.q, needed))
            counts = found.counts if kept is None else found.counts.new_zeros(len(x)).index_copy(0, kept, found.counts)
        return self._differentiable(x, encoder, SparseCodes(found.h, found.indices, _offsets(counts), n_latents), found.factors)

    def threshold_codes(self, x: Float[Tensor, "N D"], encoder: Encoder, threshold: Tensor | float) -> Codes:
        with torch.no_grad():
            found = self._entries_if_few(x, encoder, threshold)
        if found is None:
            return reference.threshold_codes(x, encoder, threshold)
        return self._differentiable(x, encoder, SparseCodes(found.h, found.indices, _offsets(found.counts), encoder.W.shape[1]), found.factors)

    def jumprelu_codes(self, x: Float[Tensor, "N D"], encoder: Encoder, threshold: Float[Tensor, " F"], window: float) -> Codes:
        # What lies in the window but does not fire is an entry too: a zero, with gradient to the threshold.
        with torch.no_grad():
            found = self._entries_if_few(x, encoder, threshold - window / 2)
        if found is None:
            return reference.jumprelu_codes(x, encoder, threshold, window)
        candidates = SparseCodes(found.h, found.indices, _offsets(found.counts), encoder.W.shape[1])
        candidates = self._differentiable(x, encoder, candidates, found.factors)
        return candidates.with_values(reference.jumprelu(candidates.values, found.q, threshold.index_select(0, found.indices), window))

    def decode(self, codes: Codes, W_D: Float[Tensor, "F D"]) -> Float[Tensor, "N D"]:
        if not isinstance(codes, SparseCodes):
            return reference.decode(codes, W_D)
        return _Decode.apply(self, codes.pattern, codes.values.to(W_D.dtype), W_D)  # pyright: ignore[reportReturnType]

    def reconstruct(
        self, codes: Codes, W_D: Float[Tensor, "F D"], b_D: Float[Tensor, " D"] | None, target: Float[Tensor, "N D"]
    ) -> tuple[Float[Tensor, "N D"], Float[Tensor, " N"]]:
        if not isinstance(codes, SparseCodes):
            return reference.reconstruct(codes, W_D, b_D, target)
        return _Reconstruct.apply(self, codes.pattern, codes.values.to(W_D.dtype), W_D, b_D, target)  # pyright: ignore[reportReturnType]

    def on(self, *tensors: Tensor | None) -> ModuleType:
        """The kernels for these tensors."""
        return next(kernels for kernels in self.kernels if kernels.applies(*tensors))

    # ---------------------------------------------------------------------------------------------------- entries

    def topk_entries(self, x: Float[Tensor, "N D"], encoder: Encoder, k: int) -> tuple[Float[Tensor, "N k"], Int64[Tensor, "N k"], list[Tensor]]:
        """The k entries of largest relu(q) of each row: h (0 where q is not positive), latent, and the factors of h."""
        pieces = []
        for block in _blocks(x, encoder):
            values, indices = self.on(block.h, block.gate_norm).topk(block.h, block.gate_norm, k)
            pieces.append([values, indices, *(factor.gather(1, indices) for factor in block.factors)])
        values, indices, *factors = (torch.cat(piece) for piece in zip(*pieces, strict=True))
        return values, indices, factors

    def _candidates(self, x: Tensor, encoder: Encoder, needed: int) -> Found:
        """All entries that could be among the `needed` ones of largest q > 0, and some more."""
        for share in CANDIDATES:
            floor = _guess_floor(x, encoder, share * needed / max(len(x), 1))
            found = self.entries_above(x, encoder, floor)
            if found.q.numel() >= needed or not floor > 0:
                return found
        return self.entries_above(x, encoder, 0.0)

    def _entries_if_few(self, x: Tensor, encoder: Encoder, floor: Tensor | float) -> Found | None:
        if isinstance(floor, Tensor) and floor.dim() == 0 and x.device.type == "cpu":
            floor = float(floor)
        sample = self.entries_above(_sampled(x), encoder, floor)
        if sample.q.numel() > self.largest_density * sample.counts.numel() * encoder.W.shape[1]:
            return None
        return self.entries_above(x, encoder, floor)

    def entries_above(self, x: Tensor, encoder: Encoder, floor: Tensor | float) -> Found:
        """All entries with q > floor and h > 0."""
        pieces = []
        for block in _blocks(x, encoder):
            kernels = self.on(block.h, block.gate_norm, floor if isinstance(floor, Tensor) else None)
            counts, indices, h, q = kernels.above(block.h, block.gate_norm, floor)
            rows = torch.arange(len(counts), device=x.device).repeat_interleave(counts, output_size=len(indices)) if block.factors else None
            pieces.append([counts, indices, h, q, *(factor[rows, indices] for factor in block.factors)])
        counts, indices, h, q, *factors = (torch.cat(piece) for piece in zip(*pieces, strict=True))
        return Found(counts, indices, h, q, factors)

    # -------------------------------------------------------------------------------------------------- gradients

    def by_latent(self, pattern: Pattern) -> ByLatent:
        """The entries in the order of their latents; sorted once for each pattern."""
        entries = pattern.by_latent
        if entries is None:
            entries = pattern.by_latent = self.on(pattern.indices, pattern.offsets).by_latent(pattern)
        return entries

    def _differentiable(self, x: Tensor, encoder: Encoder, codes: SparseCodes, factors: list[Tensor]) -> SparseCodes:
        """The codes, their values differentiable in x and the weights of the encoder."""
        parts = (x, encoder.W, encoder.b, encoder.W_glu, encoder.b_glu)
        return codes.with_values(_Selected.apply(self, codes.pattern, codes.values, *parts, *factors))  # pyright: ignore[reportArgumentType]


class Found(NamedTuple):
    """Entries of some rows, by row, then latent."""

    counts: Tensor
    """[N], entries of each row."""
    indices: Tensor
    h: Tensor
    q: Tensor
    factors: list[Tensor]
    """For a gated linear unit what h is the product of."""

    def at(self, chosen: Tensor) -> Found:
        """Some of the entries, by their places in ascending order."""
        ends = torch.searchsorted(chosen, self.counts.cumsum(0))
        counts = ends.diff(prepend=ends.new_zeros(1))
        return Found(counts, self.indices[chosen], self.h[chosen], self.q[chosen], [factor[chosen] for factor in self.factors])


class _Block(NamedTuple):
    """Some rows of the encoder product. The tensors are buffers: they hold until the next block."""

    h: Float[Tensor, "n F"]
    gate_norm: Float[Tensor, " F"] | None
    factors: tuple[Tensor, ...]
    """For a gated linear unit what h is the product of: the linear part and the sigmoid, [n, F] each."""


def _as_autocast(x: Tensor, encoder: Encoder) -> tuple[Tensor, Encoder]:
    """Input and weights of the product in the type that autocast would make it in.

    Left to autocast, the weights would be cast for every block; and where it caches, without gradient for those who use them next.
    """
    device = x.device.type
    if not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
        return x, encoder
    narrow = torch.get_autocast_dtype(device)
    W, b, *glu, gate_norm = encoder
    return x.to(narrow), Encoder(W.to(narrow), b.to(narrow), *(None if part is None else part.to(narrow) for part in glu), gate_norm=gate_norm)


def _blocks(x: Tensor, encoder: Encoder) -> Iterator[_Block]:
    """The encoder product block by block; one empty block if there are no rows. Call it without gradient."""
    x, (W, b, W_glu, b_glu, gate_norm) = _as_autocast(x, encoder)
    shape = min(len(x), ROWS_AT_ONCE), W.shape[1]
    buffers = [x.new_empty(shape) for _ in range(1 if W_glu is None else 3)]
    gate_norm = None if gate_norm is None else at_least_float32(gate_norm.detach())
    for start in range(0, max(len(x), 1), ROWS_AT_ONCE):
        rows = x[start : start + ROWS_AT_ONCE]
        n = len(rows)
        with torch.autocast(x.device.type, enabled=False):
            h, factors = torch_kernels.affine(rows, W, b, buffers[0][:n]), ()
            if W_glu is not None and b_glu is not None:
                factors = h, torch_kernels.affine(rows, W_glu, b_glu, buffers[1][:n]).sigmoid_()
                h = torch.mul(*factors, out=buffers[2][:n])
        yield _Block(h, gate_norm, factors)


def _sampled(x: Float[Tensor, "N D"]) -> Float[Tensor, "n D"]:
    """Some evenly spaced rows."""
    return x[:: max(1, len(x) // max(SAMPLED_ROWS, len(x) // 32))]


def _guess_floor(x: Tensor, encoder: Encoder, per_row: float) -> float:
    """The gate value above which `per_row` latents lie on each of the sampled rows, on average; at least 0."""
    sample = _sampled(x)
    q = torch.cat([reference.gate_values(block.h, encoder).flatten() for block in _blocks(sample, encoder)])
    rank = int(per_row * len(sample))
    return float(q.topk(rank, sorted=False).values.min().clamp(min=0)) if 0 < rank < q.numel() else 0.0


def _largest(q: Float[Tensor, " m"], n: int) -> Tensor:
    """The places of the n largest, in ascending order."""
    return q.topk(n, sorted=False).indices.sort().values


def _offsets(counts: Tensor) -> Tensor:
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


class _Decode(torch.autograd.Function):
    """codes @ W_D."""

    @staticmethod
    def forward(ctx, run: SparseOps, pattern: Pattern, values: Tensor, W_D: Tensor) -> Tensor:
        ctx.run, ctx.pattern = run, pattern
        ctx.save_for_backward(values, W_D)
        return run.on(values, W_D).gather_sum(pattern, values, W_D)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (gradient,) = gradients
        values, W_D = ctx.saved_tensors
        gradient, to_values, to_weight = gradient.contiguous(), None, None
        kernels = ctx.run.on(gradient, values, W_D)
        if ctx.needs_input_grad[2]:
            to_values = kernels.entry_dots(ctx.pattern, gradient, W_D).to(values.dtype)
        if ctx.needs_input_grad[3]:
            to_weight = kernels.latent_sums(ctx.run.by_latent(ctx.pattern), values, gradient, transposed=False).to(W_D.dtype)
        return None, None, to_values, to_weight


class _Reconstruct(torch.autograd.Function):
    """x^ = codes @ W_D + b_D, and |x^ - target|^2 of each token.

    The slope of the squared error with respect to a code is 2 <x^ - target, W_D row>: found forward, while the row is at hand.
    """

    @staticmethod
    def forward(ctx, run: SparseOps, pattern: Pattern, values: Tensor, W_D: Tensor, b_D: Tensor | None, target: Tensor) -> tuple[Tensor, Tensor]:
        kernels = run.on(values, W_D, b_D, target)
        reconstruction, residual, squared_error, slopes = kernels.reconstruct(pattern, values, W_D, b_D, target)
        ctx.run, ctx.pattern, ctx.target_dtype = run, pattern, target.dtype
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(values, W_D, b_D, residual, slopes)
        return reconstruction, squared_error

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        to_reconstruction, to_error = gradients
        values, W_D, b_D, residual, slopes = ctx.saved_tensors
        kernels, pattern = ctx.run.on(values, W_D, residual), ctx.pattern
        _, _, needs_values, needs_weight, needs_bias, needs_target = ctx.needs_input_grad
        weights = torch.zeros_like(residual[:, 0]) if to_error is None else 2 * to_error  # gradient to x^ is weights * residual, and more
        to_entries, matrix, row_weights = weights[pattern.rows] * slopes, residual, weights
        if to_reconstruction is not None:
            matrix, row_weights = weights[:, None] * residual + to_reconstruction, None
            to_entries = to_entries + kernels.entry_dots(pattern, at_least_float32(to_reconstruction).contiguous(), W_D)
        to_weight = to_bias = None
        if needs_weight:
            scaled = values if row_weights is None else values * row_weights[pattern.rows]
            to_weight = kernels.latent_sums(ctx.run.by_latent(pattern), scaled, matrix, transposed=False).to(W_D.dtype)
        if needs_bias:
            to_bias = (matrix.sum(0) if row_weights is None else row_weights @ matrix).to(b_D.dtype)
        to_target = (-weights[:, None] * residual).to(ctx.target_dtype) if needs_target else None
        return None, None, to_entries.to(values.dtype) if needs_values else None, to_weight, to_bias, to_target


class _Selected(torch.autograd.Function):
    """Selected pre-activations, already computed, as a function of what they were computed from. Entries that are zero get no gradient."""

    @staticmethod
    def forward(
        ctx,
        run: SparseOps,
        pattern: Pattern,
        values: Tensor,
        x: Tensor,
        W: Tensor,
        b: Tensor,
        W_glu: Tensor | None,
        b_glu: Tensor | None,
        *factors: Tensor,
    ) -> Tensor:
        ctx.run, ctx.pattern = run, pattern
        ctx.save_for_backward(x, W, W_glu, values > 0, *factors)
        ctx.bias_dtypes = b.dtype, None if b_glu is None else b_glu.dtype
        return values.view_as(values)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, W, W_glu, fires, *factors = ctx.saved_tensors
        kernels, pattern = ctx.run.on(x, W), ctx.pattern
        gradient = torch.where(fires, at_least_float32(gradients[0]), 0.0)
        to_h = [gradient]  # to x W + b, and to x W_glu + b_glu
        if factors:
            linear, sigmoid = (at_least_float32(factor) for factor in factors)
            to_h = [gradient * sigmoid, gradient * linear * sigmoid * (1 - sigmoid)]
        needs_x, *needs = ctx.needs_input_grad[3:8]
        result: list[Tensor | None] = [None] * 5
        for i, (to, weight) in enumerate(zip(to_h, (W, W_glu), strict=False)):
            if needs[2 * i]:
                result[1 + 2 * i] = kernels.latent_sums(ctx.run.by_latent(pattern), to, x, transposed=True).to(weight.dtype)
            if needs[2 * i + 1]:
                result[2 + 2 * i] = to.new_zeros(pattern.n_latents).index_add_(0, pattern.indices, to).to(ctx.bias_dtypes[i])
            if needs_x:
                share = kernels.gather_sum(pattern, to, at_least_float32(weight.t()).contiguous()).to(x.dtype)
                result[0] = share if result[0] is None else result[0] + share
        return None, None, None, *result, *[None] * len(factors)
