"""How a dictionary starts: norms, weights, biases, scale and threshold, from the first batches of the stream.

The order matters and is this: mean norms -> weights drawn (decoder rows in the active subspace, or all from the MLP, if asked) -> b_D -> scale, with the encoder tied and
the pre-activations centred at that scale -> threshold -> a look at what came out, kept in `Initializer.report`.

Letters: N tokens, D width, F latents; x input, y label, both normalised.
"""

from __future__ import annotations

import itertools
import math
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from lm_saes.config import InitializerConfig, SAEConfig
from lm_saes.errors import ConfigError, DataError, NonFiniteError
from lm_saes.models.activation_functions import INITIAL_JUMPRELU_THRESHOLD
from lm_saes.models.initialization_report import InitializationReport, Measured, describe, measure
from lm_saes.models.norm_search import NormChoice, find_norm
from lm_saes.models.normalization import mean_norm, update_running_norms_
from lm_saes.models.sae import SparseAutoEncoder
from lm_saes.models.sparse_dictionary import Batch
from lm_saes.models.statistics import (
    RunningCovariance,
    effective_rank,
    geometric_median,
    in_float64,
    kept_rows,
)


@runtime_checkable
class MetricsLogger(Protocol):
    """A Weights & Biases run, as far as it is used here."""

    def log(self, data: dict[str, Any], /) -> Any: ...


class HasMLPs(Protocol):
    """What is asked of a language model."""

    def mlp(self, layer: int) -> Any:
        """See `lm_saes.lm.language_model.MLP`."""


class Initializer:
    """Builds dictionaries that start well.

    Args:
        cfg: which parts of the start are measured and which are drawn.
    """

    def __init__(self, cfg: InitializerConfig) -> None:
        self.cfg = cfg
        self._report: InitializationReport | None = None

    @property
    def report(self) -> InitializationReport:
        """What `initialize_sae_from_config` measured and chose the last time."""
        if self._report is None:
            raise AttributeError("there is no report before initialize_sae_from_config has run")
        return self._report

    @torch.no_grad()
    def initialize_sae_from_config(
        self,
        cfg: SAEConfig,
        activation_stream: Iterable[Batch] | None = None,
        activation_norm: Mapping[str, float] | None = None,
        device_mesh: Any = None,
        wandb_logger: MetricsLogger | None = None,
        model: HasMLPs | None = None,
        seed: int = 0,
    ) -> SparseAutoEncoder:
        """A new dictionary, in training mode.

        Args:
            cfg: its shape.
            activation_stream: 1D or 2D batches of raw activations; `InitializerConfig.n_batches` are taken from its start, and training goes on after
                them. `None` is enough where nothing has to be measured.
            activation_norm: mean norm of the activations at each hook point; measured where it is not given (neither here nor in `cfg`).
            device_mesh: must be `None` in this version.
            wandb_logger: gets the numbers of the report.
            model: the language model, for `initialize_tc_with_mlp`.
            seed: of the weights. They depend on nothing else that is random, and not on the device.

        Raises:
            ConfigError: an option needs activations (or the language model) that are not given; d_active_subspace is too large; norms are
                missing; `initialize_tc_with_mlp` is asked for a dictionary that is not a transcoder of an MLP.
            DataError: the stream kept no token, or lacks a hook point.
            NonFiniteError: NaN or infinity in the activations.
        """
        started = time.perf_counter()
        if device_mesh is not None:
            raise ConfigError("device_mesh must be None: this version trains and runs a dictionary on one device")
        needs = self._needs_activations(cfg, activation_norm)
        if activation_stream is None and needs:
            raise ConfigError(f"{needs[0]} needs activations to measure; pass an activation_stream or change it")
        sae = SparseAutoEncoder.from_config(cfg).train()
        raw = [] if activation_stream is None else self._take(sae, activation_stream)
        norms = _set_norms(sae, raw, activation_norm)
        batches = [sae.normalize_activations(raw.pop(0)) for _ in range(len(raw))]  # one after the other, so that no batch is held twice
        measured = measure(sae, batches) if batches else None

        generator = torch.Generator().manual_seed(seed)
        self.initialize_parameters(sae, generator)
        d_active = self._use_active_subspace(sae, measured, generator) if self.cfg.initialize_W_D_with_active_subspace and measured else None
        if self.cfg.initialize_tc_with_mlp:
            assert measured is not None
            assert norms is not None
            self._use_mlp(sae, measured, norms, model)
        notes = self._set_decoder_bias(sae, measured)
        if measured is not None:
            choice = self.initialization_search(sae, measured.sample(sae))
            sae.calibrate(batches)
        else:
            choice = self._tie_and_scale(sae, None)
        self._report = describe(self.cfg, sae, measured, norms, choice, d_active, notes, started)
        if wandb_logger is not None:
            numbers = {field.name: getattr(self._report, field.name) for field in fields(self._report)}
            wandb_logger.log({f"initialization/{name}": value for name, value in numbers.items() if isinstance(value, int | float)})
        return sae

    @torch.no_grad()
    def initialize_parameters(self, sae: SparseAutoEncoder, generator: torch.Generator | None = None) -> None:
        """Draw the weights uniformly within the configured bounds and tie the encoder if it is to be tied; biases zero, JumpReLU's threshold at its
        start.

        Args:
            sae: any dictionary; what it was is forgotten.
            generator: of the random numbers, on the CPU; one with seed 0 if left out.
        """
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        _draw(sae.W_D, self.cfg.decoder_uniform_bound, generator)
        _draw(sae.W_E, self.cfg.encoder_uniform_bound, generator)
        if sae.W_E_glu is not None:
            _draw(sae.W_E_glu, self.cfg.encoder_uniform_bound, generator)
        for bias in (sae.b_E, sae.b_D, sae.b_E_glu):
            if bias is not None:
                bias.zero_()
        if (threshold := sae.activation_function.learned_threshold()) is not None:
            logarithm = self.cfg.init_log_jumprelu_threshold_value
            start = INITIAL_JUMPRELU_THRESHOLD if logarithm is None else math.exp(logarithm)
            sae.activation_function.rescale_gate_(start / threshold.detach())
        if self._is_tied(sae):
            sae.init_encoder_with_decoder_transpose(self.cfg.init_encoder_with_decoder_transpose_factor)

    @torch.no_grad()
    def initialization_search(self, sae: SparseAutoEncoder, activation_batch: Batch, wandb_logger: MetricsLogger | None = None) -> NormChoice:
        """Tie the encoder, choose the norm of the decoder rows and centre the pre-activations, as far as the configuration asks for each.

        Args:
            sae: drawn weights, b_D set.
            activation_batch: normalised activations (`sae.normalize_activations`), 1D or 2D.
            wandb_logger: gets the chosen norm.
        """
        choice = self._tie_and_scale(sae, activation_batch)
        if wandb_logger is not None:
            wandb_logger.log({"initialization/decoder_norm": choice.norm})
        return choice

    # ------------------------------------------------------------------------------------------- steps

    def _is_tied(self, sae: SparseAutoEncoder) -> bool:
        tie = self.cfg.init_encoder_with_decoder_transpose
        return not sae.cfg.is_transcoder if tie is None else tie

    def _needs_activations(self, cfg: SAEConfig, activation_norm: Mapping[str, float] | None) -> list[str]:
        """The configured options that cannot do without activations."""
        known = activation_norm is not None or cfg.dataset_average_activation_norm is not None
        reasons = {
            'norm_activation = "dataset-wise" without activation_norm': cfg.norm_activation == "dataset-wise" and not known,
            'bias_init_method = "geometric_median"': self.cfg.bias_init_method == "geometric_median" and cfg.use_decoder_bias,
            "grid_search_init_norm": self.cfg.grid_search_init_norm,
            "initialize_W_D_with_active_subspace": self.cfg.initialize_W_D_with_active_subspace,
            "initialize_tc_with_mlp": bool(self.cfg.initialize_tc_with_mlp),
            "init_encoder_bias_with_mean_hidden_pre": self.cfg.init_encoder_bias_with_mean_hidden_pre,
        }
        return [reason for reason, needed in reasons.items() if needed]

    def _take(self, sae: SparseAutoEncoder, stream: Iterable[Batch]) -> list[dict[str, Tensor]]:
        """The kept rows of the first batches, on the dictionary's device."""
        taken = []
        for batch in itertools.islice(stream, self.cfg.n_batches):
            rows = {hook: kept_rows(batch, hook).to(sae.device) for hook in sae.cfg.associated_hook_points}
            for hook, activations in rows.items():
                if not torch.isfinite(activations).all():
                    raise NonFiniteError(
                        f"the activations of {hook} hold NaN or infinity; run the language model in float32 or bfloat16, or filter them"
                    )
            if len(rows[sae.cfg.hook_point_in]) > 0:
                taken.append(rows)
        if not taken:
            raise DataError(f"nothing to initialise from: the first {self.cfg.n_batches} batches keep no token; check the dataset and the filters")
        return taken

    def _use_active_subspace(self, sae: SparseAutoEncoder, measured: Measured, generator: torch.Generator) -> int:
        """Draw decoder rows isotropically inside the leading principal subspace of the labels, and the columns of an encoder that is not tied
        inside that of the inputs (arXiv 2508.16929). Gaussian coefficients are isotropic, the uniform box is not; their variance is the box's.
        """
        d_label = self._active_dimension(measured.labels)
        coefficients = torch.randn(sae.cfg.d_sae, sae.cfg.d_model, generator=generator) * (self.cfg.decoder_uniform_bound / math.sqrt(3))
        sae.W_D.copy_(coefficients)
        sae.set_decoder_in_subspace(_leading_directions(measured.labels, d_label))
        if not self._is_tied(sae):
            basis = _leading_directions(measured.inputs, self._active_dimension(measured.inputs))
            coefficients = torch.randn(basis.shape[1], sae.cfg.d_sae, generator=generator) * (self.cfg.encoder_uniform_bound / math.sqrt(3))
            sae.W_E.copy_(basis @ coefficients.to(basis))
        return d_label

    def _use_mlp(self, sae: SparseAutoEncoder, measured: Measured, norms: Mapping[str, float], model: HasMLPs | None) -> None:
        """Encoder columns along the directions that the MLP's neurons read, for as many latents as there are neurons (the others stay as
        drawn); each decoder row along the MLP's answer to its latent's direction: MLP(mean + t direction) - MLP(mean), with t the mean
        distance of an input from the mean.
        """
        if model is None:
            raise ConfigError("initialize_tc_with_mlp needs the language model; pass model, or leave it out")
        cfg = sae.cfg
        layer = self.cfg.model_layer
        if layer is None:
            named = re.fullmatch(r"blocks\.(\d+)\.hook_mlp_out", cfg.hook_point_out)
            if named is None:
                raise ConfigError(f"initialize_tc_with_mlp cannot tell the layer from hook_point_out = '{cfg.hook_point_out}'; set model_layer")
            layer = int(named[1])
        mlp = model.mlp(layer)
        if (cfg.hook_point_in, cfg.hook_point_out) != (mlp.hook_in, mlp.hook_out):
            raise ConfigError(
                f"initialize_tc_with_mlp needs hook_point_in = '{mlp.hook_in}' and hook_point_out = '{mlp.hook_out}', which the MLP of layer {layer} "
                f"reads and gives; got '{cfg.hook_point_in}' and '{cfg.hook_point_out}'"
            )
        directions = sae.W_E.T.float()
        if mlp.neurons is not None:
            neurons = mlp.neurons[: cfg.d_sae].to(directions)
            directions[: len(neurons)] = neurons * (directions.norm(dim=1).mean() / neurons.norm(dim=1, keepdim=True).clamp(min=1e-12))
            sae.W_E.copy_(directions.T)
        mean, x = measured.inputs.mean.to(directions), measured.x.to(directions)
        distance = (x - mean).norm(dim=1).mean()
        points = mean + distance * directions / directions.norm(dim=1, keepdim=True).clamp(min=1e-12)
        factor = 1.0 if cfg.norm_activation == "inference" else math.sqrt(cfg.d_model) / norms[cfg.hook_point_in]
        answers = mlp.respond(points / factor) - mlp.respond(mean[None] / factor)
        length = answers.norm(dim=1, keepdim=True)
        drawn = sae.decoder_norm(keepdim=True).mean()
        sae.W_D.copy_(torch.where(length > 0, answers / length * drawn, sae.W_D.float()))

    def _active_dimension(self, moments: RunningCovariance) -> int:
        wanted, d_model = self.cfg.d_active_subspace, len(moments.mean)
        if not isinstance(wanted, int):
            return max(1, math.ceil(effective_rank(moments.principal_directions()[0].sqrt())))
        if wanted > d_model:
            raise ConfigError(f'd_active_subspace must be at most d_model = {d_model}, got {wanted}; "auto" takes the measured effective rank')
        if wanted > moments.count - 1:
            raise ConfigError(
                f"d_active_subspace = {wanted} needs more than {wanted} tokens, the initialisation batches keep {moments.count}; raise n_batches or lower it"
            )
        return wanted

    def _set_decoder_bias(self, sae: SparseAutoEncoder, measured: Measured | None) -> list[str]:
        if self.cfg.bias_init_method != "geometric_median":
            return []
        if sae.b_D is None:
            return ["bias_init_method = geometric_median has nothing to set: use_decoder_bias is off"]
        assert measured is not None
        median = geometric_median(measured.y)
        sae.b_D.copy_(median.point)
        if median.converged:
            return []
        return [f"the geometric median stopped after {median.iterations} iterations with gradient norm {median.gradient_norm:.1g} (0 at the median)"]

    def _tie_and_scale(self, sae: SparseAutoEncoder, batch: Batch | None) -> NormChoice:
        tied, centred = self._is_tied(sae), self.cfg.init_encoder_bias_with_mean_hidden_pre and batch is not None
        if not self.cfg.grid_search_init_norm or batch is None:
            self._tie_and_centre(sae, batch if centred else None)
            return NormChoice(float(sae.decoder_norm().mean()), "as drawn")
        sae.set_decoder_to_fixed_norm(1.0, force_exact=True)
        self._tie_and_centre(sae, batch if centred else None)
        x, y = kept_rows(batch, sae.cfg.hook_point_in), kept_rows(batch, sae.cfg.hook_point_out)
        if len(x) == 0:
            raise DataError("the norm of the weights cannot be chosen on a batch whose mask keeps no token")
        choice = find_norm(sae, x, y, tied)
        sae.set_decoder_to_fixed_norm(choice.norm, force_exact=True)
        if tied:
            self._tie_and_centre(sae, batch if centred else None)
        return choice

    def _tie_and_centre(self, sae: SparseAutoEncoder, batch: Batch | None) -> None:
        if self._is_tied(sae):
            sae.init_encoder_with_decoder_transpose(self.cfg.init_encoder_with_decoder_transpose_factor)
        if batch is not None:
            sae.init_encoder_bias_with_mean_hidden_pre(batch)


def _draw(weight: Tensor, bound: float, generator: torch.Generator) -> None:
    """U(-bound, bound), drawn on the CPU in float32, so that a seed means the same weights on every device."""
    weight.copy_((torch.rand(weight.shape, generator=generator) * 2 - 1) * bound)


def _set_norms(sae: SparseAutoEncoder, raw: Sequence[Batch], given: Mapping[str, float] | None) -> dict[str, float] | None:
    """The mean norm of the raw activations at each hook point: given, configured or measured; put where the dictionary keeps them."""
    hooks = sae.cfg.associated_hook_points
    measured: dict[str, float] | None = None
    if raw:
        n_tokens = sum(len(batch[hooks[0]]) for batch in raw)
        measured = {hook: sum(float(mean_norm(in_float64(batch[hook]))) * len(batch[hook]) for batch in raw) / n_tokens for hook in hooks}
    norms = dict(given) if given is not None else sae.cfg.dataset_average_activation_norm or measured
    if norms is not None and (missing := set(hooks) - set(norms)):
        raise ConfigError(f"activation norms are missing for {sorted(missing)}; give them for {hooks}, or leave them out to have them measured")
    if sae.cfg.norm_activation == "dataset-wise":
        assert norms is not None
        silent = [hook for hook, norm in norms.items() if norm == 0]
        if silent:
            raise DataError(f"the activations of {silent} are all zero; check the hook point")
        sae.set_dataset_average_activation_norm(norms)
    elif sae.running_activation_norms is not None and norms is not None:
        running = sae.running_activation_norms
        update_running_norms_(running, torch.tensor([norms[hook] for hook in hooks], dtype=running.dtype, device=running.device))
    return norms


def _leading_directions(moments: RunningCovariance, d: int) -> Float[Tensor, "D d"]:
    return moments.principal_directions()[1][:, :d]
