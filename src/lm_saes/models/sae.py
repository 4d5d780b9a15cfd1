"""Sparse autoencoders, and transcoders when the two hook points differ.

    h = x W_E + b_E            (with a gated linear unit: (x W_E + b_E) * sigmoid(x W_E_glu + b_E_glu))
    f = sparsify(h)            gated on h ||W_D row||, or on h
    x^ = f W_D + b_D           (with a skip connection: + x W_skip)

There is no subtraction of b_D before the encoder.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, final

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from lm_saes import ops
from lm_saes.config import SAEConfig
from lm_saes.devices import resolve_device
from lm_saes.errors import ConfigError
from lm_saes.models.normalization import Batch
from lm_saes.models.sparse_dictionary import SparseDictionary
from lm_saes.ops import Codes, Encoder, SparseCodes


@final
class SparseAutoEncoder(SparseDictionary):
    """An SAE or a transcoder. Starts with W_D, W_E ~ U(-1/sqrt(D), 1/sqrt(D)) and zero biases; `Initializer` gives a better start."""

    cfg: SAEConfig

    def __init__(self, cfg: SAEConfig) -> None:
        super().__init__(cfg)
        D, F = cfg.d_model, cfg.d_sae

        def zeros(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(*shape, device=resolve_device(cfg.device), dtype=cfg.dtype))  # pyright: ignore[reportArgumentType, reportCallIssue]

        self.W_E, self.b_E = zeros(D, F), zeros(F)
        self.W_D = zeros(F, D)
        self.b_D = zeros(D) if cfg.use_decoder_bias else None
        self.W_E_glu, self.b_E_glu = (zeros(D, F), zeros(F)) if cfg.use_glu_encoder else (None, None)
        self.W_skip = zeros(D, D) if cfg.use_skip_connection else None
        with torch.no_grad():
            for weight in (self.W_E, self.W_D, self.W_E_glu):
                if weight is not None:
                    weight.uniform_(-(D**-0.5), D**-0.5)

    @property
    def dtype(self) -> torch.dtype:
        return self.W_E.dtype

    @property
    def device(self) -> torch.device:
        return self.W_E.device

    # ------------------------------------------------------------------------------------------- equations

    def encoder(self) -> Encoder:
        return Encoder(self.W_E, self.b_E, self.W_E_glu, self.b_E_glu, self.decoder_norm() if self.cfg.sparsity_include_decoder_norm else None)

    def parameters_of(self, part: Literal["encoder", "decoder"]) -> list[nn.Parameter]:
        names = ("W_D",) if part == "decoder" else ("W_E", "b_E", "W_E_glu", "b_E_glu")
        return [parameter for name, parameter in self.named_parameters(recurse=False) if name in names]

    def decode(self, codes: Codes, x: Float[Tensor, "*shape D"] | None = None) -> Float[Tensor, "*shape D"]:
        if isinstance(codes, SparseCodes) or codes.ndim == 2:
            reconstruction = ops.decode(codes, self.W_D)
        else:
            reconstruction = ops.decode(codes.reshape(-1, codes.shape[-1]), self.W_D).view(*codes.shape[:-1], -1)
        if self.b_D is not None:
            reconstruction = reconstruction + self.b_D
        return reconstruction if self.W_skip is None or x is None else reconstruction + x.to(self.dtype) @ self.W_skip

    def decode_against(
        self, codes: Codes, target: Float[Tensor, "N D"], x: Float[Tensor, "N D"] | None = None
    ) -> tuple[Float[Tensor, "N D"], Float[Tensor, " N"]]:
        if self.W_skip is None or x is None:
            return ops.reconstruct(codes, self.W_D, self.b_D, target)
        skipped = x @ self.W_skip
        reconstruction, squared_error = ops.reconstruct(codes, self.W_D, self.b_D, target - skipped)
        return reconstruction + skipped, squared_error

    def prefix_errors(
        self, codes: Codes, target: Float[Tensor, "N D"], widths: Sequence[int], detach: bool = False, x: Float[Tensor, "N D"] | None = None
    ) -> list[Float[Tensor, " N"]]:
        # Block by block, each against what the ones before it leave over, so that no entry is decoded twice.
        rest, errors = ops.at_least_float32(target), []
        if self.b_D is not None:
            rest = rest - ops.at_least_float32(self.b_D)
        if self.W_skip is not None and x is not None:
            rest = rest - ops.at_least_float32(x @ self.W_skip)
        for start, stop in itertools.pairwise((0, *widths)):
            block, error = ops.reconstruct(ops.latent_range(codes, start, stop), self.W_D[start:stop], None, rest)
            rest = (rest - block).detach() if detach else rest - block
            errors.append(error)
        return errors

    def decode_latents(self, codes: Codes, latents: Int64[Tensor, " M"]) -> Float[Tensor, "N D"]:
        return ops.decode(codes, self.W_D[latents])

    def standardize_parameters_of_dataset_norm(self) -> None:
        """`fold_activation_scale` by upstream's name."""
        self.fold_activation_scale()

    def decode_coo(self, codes: Tensor) -> Float[Tensor, "N D"]:
        """`decode` of a sparse COO tensor [N, F]."""
        reconstruction = torch.sparse.mm(codes, self.W_D)
        return reconstruction if self.b_D is None else reconstruction + self.b_D

    def prepare_input(self, batch: Batch) -> Float[Tensor, "*shape D"]:
        return self._activation(batch, self.cfg.hook_point_in)

    def prepare_label(self, batch: Batch) -> Float[Tensor, "*shape D"]:
        return self._activation(batch, self.cfg.hook_point_out)

    def _activation(self, batch: Batch, hook_point: str) -> Tensor:
        if hook_point not in batch:
            raise ConfigError(f"the batch has no activations of hook point '{hook_point}', it has {sorted(batch)}")
        x = batch[hook_point]
        if x.shape[-1] != self.cfg.d_model:
            raise ConfigError(f"hook point '{hook_point}' has width {x.shape[-1]}, d_model is {self.cfg.d_model}; set d_model to the hook's width")
        return x.to(self.dtype)

    # ------------------------------------------------------------------------------------------- sae-lens, by upstream's names

    @classmethod
    def from_saelens(cls, source: Any, **options: Any) -> SparseAutoEncoder:
        """`lm_saes.interop.from_saelens`: a folder that sae-lens wrote, or one of its objects, as a dictionary with the same codes."""
        from lm_saes import interop

        return interop.from_saelens(source, **options)

    def to_saelens(self, folder: str | Path) -> None:
        """`lm_saes.interop.to_saelens`: write a folder that sae-lens loads."""
        from lm_saes import interop

        interop.to_saelens(self, folder)

    # ------------------------------------------------------------------------------------------- exact rewritings

    @torch.no_grad()
    def _scale_parameters_(self, scales: Mapping[str, float]) -> None:
        # With x' = s_in x:  s_in (x W_E) + b_E = s_in (x W_E + b_E / s_in), so codes become codes / s_in, and W_D makes up for it.
        s_in, s_out = scales[self.cfg.hook_point_in], scales[self.cfg.hook_point_out]
        self.b_E /= s_in
        self.W_D *= s_in / s_out
        if self.b_D is not None:
            self.b_D /= s_out
        if self.W_E_glu is not None:
            self.W_E_glu *= s_in
        if self.W_skip is not None:
            self.W_skip *= s_in / s_out
        self.activation_function.rescale_gate_(1 / s_out if self.cfg.sparsity_include_decoder_norm else 1 / s_in)

    @torch.no_grad()
    def transform_to_unit_decoder_norm(self) -> None:
        """Give every decoder row norm 1 and multiply its code by the old norm: reconstructions stay what they were. (Zero rows stay zero.)

        Raises:
            FoldingError: TopK or BatchTopK with sparsity_include_decoder_norm=False, where the selection would change.
        """
        norm = self.decoder_norm()
        norm = torch.where(norm > 0, norm, 1.0)
        if not self.cfg.sparsity_include_decoder_norm:
            self.activation_function.rescale_gate_(norm)
        self.W_D /= norm[:, None]
        self.W_E *= norm
        self.b_E *= norm

    # ------------------------------------------------------------------------------------------- norms

    def encoder_norm(self, keepdim: bool = False) -> Float[Tensor, "*shape"]:
        """The norm of each latent's encoder column [F]; with `keepdim` [1, F]."""
        return torch.linalg.vector_norm(ops.at_least_float32(self.W_E), dim=0, keepdim=keepdim)

    def decoder_norm(self, keepdim: bool = False) -> Float[Tensor, "*shape"]:
        return torch.linalg.vector_norm(ops.at_least_float32(self.W_D), dim=1, keepdim=keepdim)

    def decoder_bias_norm(self) -> Float[Tensor, ""]:
        """The norm of b_D; zero without one."""
        return self.W_D.new_zeros(()) if self.b_D is None else torch.linalg.vector_norm(ops.at_least_float32(self.b_D))

    @torch.no_grad()
    def log_statistics(self) -> dict[str, float]:
        statistics = {"metrics/encoder_norm": self.encoder_norm().mean(), "metrics/decoder_norm": self.decoder_norm().mean()}
        if self.b_D is not None:
            statistics["metrics/decoder_bias_norm"] = self.decoder_bias_norm()
        return {name: float(value) for name, value in {**statistics, **self.activation_function.log_statistics()}.items()}

    # ------------------------------------------------------------------------------------------- what the initializer needs

    @torch.no_grad()
    def set_decoder_to_fixed_norm(self, value: float, force_exact: bool = True) -> None:
        """Scale each decoder row to norm `value`; without `force_exact` only the rows that are longer. Zero rows stay zero."""
        norm = self.decoder_norm(keepdim=True)
        self.W_D *= torch.where(norm > (0.0 if force_exact else value), value / norm, 1.0)

    @torch.no_grad()
    def set_encoder_to_fixed_norm(self, value: float) -> None:
        """Scale each encoder column to norm `value`. Zero columns stay zero."""
        norm = self.encoder_norm(keepdim=True)
        self.W_E *= torch.where(norm > 0, value / norm, 1.0)

    @torch.no_grad()
    def init_encoder_with_decoder_transpose(self, factor: float = 1.0) -> None:
        """W_E = factor * W_D^T."""
        self.W_E.copy_(self.W_D.T * factor)

    @torch.no_grad()
    def set_decoder_in_subspace(self, basis: Float[Tensor, "D d"]) -> None:
        """Put the decoder rows into the span of an orthonormal basis, their first d entries as coefficients: what is isotropic stays so."""
        coefficients = self.W_D[:, : basis.shape[1]].to(torch.promote_types(self.dtype, torch.float32))
        self.W_D.copy_(coefficients @ basis.T.to(coefficients))

    @torch.no_grad()
    def init_W_D_with_active_subspace(self, batch: Batch, d_active_subspace: int) -> None:
        """Draw decoder rows into the leading principal subspace of the centred labels of a normalised batch (arXiv 2508.16929)."""
        if not 1 <= d_active_subspace <= self.cfg.d_model:
            raise ConfigError(f"d_active_subspace must lie between 1 and d_model = {self.cfg.d_model}, got {d_active_subspace}")
        labels = _kept_rows(self.prepare_label(batch), batch).double()
        centred = labels - labels.mean(0)
        eigenvectors = torch.linalg.eigh(centred.T @ centred).eigenvectors  # ascending
        self.set_decoder_in_subspace(eigenvectors.flip(1)[:, :d_active_subspace])

    @torch.no_grad()
    def init_encoder_bias_with_mean_hidden_pre(self, batch: Batch) -> None:
        """Centre the pre-activations of a normalised batch: b_E = -E[x W_E]; with a gate g, b_E = -E[(x W_E) g] / E[g]."""
        x = _kept_rows(self.prepare_input(batch), batch)
        if len(x) == 0:
            raise ConfigError("cannot centre pre-activations on a batch whose mask keeps no token")
        if self.W_E_glu is None or self.b_E_glu is None:
            self.b_E.copy_(-(x.double().mean(0).to(x.dtype) @ self.W_E))
            return
        weighted, total = torch.zeros_like(self.b_E, dtype=torch.float32), torch.zeros_like(self.b_E, dtype=torch.float32)
        for rows in x.split(1024):  # no more than 1024 x F pre-activations at a time
            gate = ops.at_least_float32(torch.addmm(self.b_E_glu, rows, self.W_E_glu).sigmoid())
            weighted += (ops.at_least_float32(rows @ self.W_E) * gate).sum(0)
            total += gate.sum(0)
        self.b_E.copy_(-weighted / total)


def _kept_rows(x: Float[Tensor, "*shape D"], batch: Batch) -> Float[Tensor, "N D"]:
    mask = batch.get("mask")
    return x.reshape(-1, x.shape[-1]) if mask is None else x[mask.bool()]
