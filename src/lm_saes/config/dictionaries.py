"""Configurations of dictionaries: their shape (`SAEConfig`), where saved ones are (`PretrainedSAE`) and how they start (`InitializerConfig`)."""

from __future__ import annotations

import itertools
import json
from abc import abstractmethod
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from lm_saes.config.base import BaseConfig, BaseModelConfig, FloatingOrNone, PathString, validated
from lm_saes.errors import ConfigError, WeightsError
from lm_saes.files import read_json_object

ActFn = Literal["relu", "jumprelu", "topk", "batchtopk", "batchlayertopk", "layertopk"]
NormActivation = Literal["token-wise", "batch-wise", "dataset-wise", "inference"]

CONFIG_FILE = "config.json"
SCHEMA_VERSION = 1
FILE_ONLY_KEYS = frozenset({"schema_version", "library_version", "provenance"})
"""What `config.json` holds beside the fields: where the dictionary comes from, and by which version it was written."""


class MatryoshkaConfig(BaseConfig):
    """Nested prefixes of the latents, each of which has to reconstruct alone (arXiv 2503.17547). The whole dictionary is always the last level,
    with weight 1; what a prefix is and weighs matters to training only."""

    widths: tuple[int, ...]
    """Latents in each prefix, ascending, all below d_sae."""
    weights: tuple[float, ...] | None = None
    """Weight of each prefix's squared error; `None`: 1 each."""
    detach: bool = False
    """A prefix's error moves only the latents that it adds to the prefix before it. (The error of the whole dictionary moves all.)"""

    @model_validator(mode="after")
    def _widths_ascend(self) -> Self:
        if not self.widths or self.widths[0] < 1 or any(wider <= width for width, wider in itertools.pairwise(self.widths)):
            raise ValueError(f"widths must be positive and ascending, got {list(self.widths)}")
        if self.weights is not None and (len(self.weights) != len(self.widths) or min(self.weights) < 0):
            raise ValueError(f"weights must be {len(self.widths)} numbers that are not negative, one for each width, got {list(self.weights)}")
        return self


class SparseDictionaryConfig(BaseModelConfig):
    """What all sparse dictionaries share (also exported under its older name `BaseSAEConfig`). Use a concrete one, such as `SAEConfig`."""

    sae_type: str
    """The kind of dictionary: "sae"."""
    d_model: int = Field(gt=0, le=2**24)
    """Width D of the activations."""
    expansion_factor: float = Field(gt=0, le=2**24)
    """d_sae = int(d_model * expansion_factor) latents."""
    use_decoder_bias: bool = True
    """Learn b_D."""
    act_fn: ActFn = "relu"
    """The sparsifier."""
    norm_activation: NormActivation = "dataset-wise"
    """How activations are scaled to norm sqrt(d_model): by one constant per hook point, by the batch's mean norm (a running mean in eval mode), each vector by its own norm, or not at all ("inference": the scale is folded into the weights)."""
    sparsity_include_decoder_norm: bool = True
    """Gate on h * ||W_D row|| instead of h. The code itself is never scaled."""
    top_k: int = Field(default=50, ge=0, le=2**31)
    """k of the TopK family: per token, or per token on average (batchtopk)."""
    use_triton_kernel: bool = False
    """Without effect: `lm_saes.ops` chooses the kernel. Accepted with a warning."""
    sparsity_threshold_for_triton_spmm_kernel: float = 0.996
    """Without effect: `lm_saes.ops` chooses the kernel. Accepted with a warning."""
    jumprelu_threshold_window: float = Field(default=2.0, gt=0)
    """Full width of the rectangular window of JumpReLU's straight-through gradient."""
    matryoshka: MatryoshkaConfig | None = None
    """Nested prefixes that reconstruct alone, in the order of the latents' numbers; `None`: the whole dictionary only."""
    dataset_average_activation_norm: dict[str, float] | None = None
    """Mean norm of the activations at each hook point, measured at initialisation (norm_activation="dataset-wise")."""

    @property
    def d_sae(self) -> int:
        """The number of latents F."""
        return int(self.d_model * self.expansion_factor)

    @property
    @abstractmethod
    def hooks_in(self) -> list[str]:
        """Hook points that are read."""

    @property
    @abstractmethod
    def hooks_out(self) -> list[str]:
        """Hook points that are reconstructed."""

    @property
    def associated_hook_points(self) -> list[str]:
        """All hook points, each once, inputs first."""
        return list(dict.fromkeys([*self.hooks_in, *self.hooks_out]))

    @model_validator(mode="after")
    def _joints(self) -> Self:
        if self.d_sae < 1:
            raise ValueError(
                f"expansion_factor {self.expansion_factor:g} leaves no latent at d_model {self.d_model}; use at least {1 / self.d_model:g}"
            )
        if self.d_sae > 2**31:
            raise ValueError(
                f"expansion_factor {self.expansion_factor:g} makes {self.d_sae} latents at d_model {self.d_model}; at most 2^31 can be numbered"
            )
        if self.act_fn in {"topk", "batchtopk"} and not 1 <= self.top_k <= self.d_sae:
            remedy = "set how many latents may fire for a token" if self.top_k < 1 else "lower top_k or raise expansion_factor"
            raise ValueError(f"top_k must be at least 1 and at most d_sae = {self.d_sae}, got {self.top_k}; {remedy}")
        if self.matryoshka is not None and self.matryoshka.widths[-1] >= self.d_sae:
            raise ValueError(
                f"matryoshka.widths must lie below d_sae = {self.d_sae}, which is always the last level, got {list(self.matryoshka.widths)}"
            )
        unknown = set(self.dataset_average_activation_norm or ()) - set(self.associated_hook_points)
        if unknown:
            raise ValueError(
                f"dataset_average_activation_norm names {sorted(unknown)}, which are not hook points of this dictionary ({self.associated_hook_points})"
            )
        bad = {hook: norm for hook, norm in (self.dataset_average_activation_norm or {}).items() if not 0 < norm < float("inf")}
        if bad:
            raise ValueError(f"dataset_average_activation_norm must hold positive numbers, got {bad}")
        return self

    @classmethod
    def from_pretrained(cls, pretrained_name_or_path: str | Path, **overrides: Any) -> Self:
        """The configuration in a native folder's `config.json`, with fields overridden by keyword.

        Raises:
            WeightsError: there is no such folder or no readable `config.json` in it.
            ConfigError: the file's fields are not those of a dictionary.
        """
        table, _ = read_dictionary_config(pretrained_name_or_path)
        return validated(cls, {**table, **overrides}, origin=str(Path(pretrained_name_or_path) / CONFIG_FILE))

    def save_hyperparameters(self, folder: str | Path, provenance: dict[str, Any] | None = None) -> None:
        """Write `config.json` into an existing folder. Device and dtype stay out: the tensors decide."""
        from lm_saes.version import __version__

        folder = Path(folder)
        if not folder.is_dir():
            raise ConfigError(f"no folder at {folder}; create it first")
        table = self.model_dump(mode="json", exclude={"device", "dtype"})
        header = {"schema_version": SCHEMA_VERSION, "library_version": __version__}
        (folder / CONFIG_FILE).write_text(json.dumps({**header, **table, "provenance": provenance or {}}, indent=2) + "\n", encoding="utf-8")


def read_dictionary_config(folder: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields and the provenance in a native folder's `config.json`."""
    path = Path(folder) / CONFIG_FILE
    try:
        table = read_json_object(path, WeightsError)
    except FileNotFoundError:
        raise WeightsError(f"no {CONFIG_FILE} in {folder}; a saved dictionary is a folder with {CONFIG_FILE} and sae_weights.safetensors") from None
    version = table.get("schema_version", SCHEMA_VERSION)
    if not isinstance(version, int) or version > SCHEMA_VERSION:
        raise WeightsError(f"{path} has schema version {version}, this library reads up to {SCHEMA_VERSION}; upgrade lm-saes")
    provenance = table.get("provenance", {})
    return {key: value for key, value in table.items() if key not in FILE_ONLY_KEYS}, provenance if isinstance(provenance, dict) else {}


class SAEConfig(SparseDictionaryConfig):
    """A sparse autoencoder, or a transcoder when `hook_point_out` differs from `hook_point_in`."""

    sae_type: Literal["sae"] = "sae"  # pyright: ignore[reportIncompatibleVariableOverride]
    """"sae"."""
    act_fn: Literal["relu", "jumprelu", "topk", "batchtopk"] = "relu"  # pyright: ignore[reportIncompatibleVariableOverride]
    """The sparsifier."""
    hook_point_in: str
    """Hook point whose activation is read."""
    hook_point_out: str = ""
    """Hook point whose activation is reconstructed; the same as `hook_point_in` when left out."""
    use_glu_encoder: bool = False
    """Encoder with a gated linear unit: h = (x W_E + b_E) * sigmoid(x W_E_glu + b_E_glu)."""
    use_skip_connection: bool = False
    """Add x W_skip to the reconstruction, W_skip zero at the start: a skip transcoder (arXiv 2501.18823). Needs hook points that differ."""

    @model_validator(mode="before")
    @classmethod
    def _hook_point_out_defaults_to_in(cls, data: Any) -> Any:
        if isinstance(data, dict) and not data.get("hook_point_out") and isinstance(data.get("hook_point_in"), str):
            return {**data, "hook_point_out": data["hook_point_in"]}
        return data

    @model_validator(mode="after")
    def _skip_connection_of_a_transcoder(self) -> Self:
        if self.use_skip_connection and not self.is_transcoder:
            raise ValueError(
                "use_skip_connection is for transcoders: with hook_point_out = hook_point_in the identity would reconstruct everything; leave it out"
            )
        return self

    @property
    def hooks_in(self) -> list[str]:
        return [self.hook_point_in]

    @property
    def hooks_out(self) -> list[str]:
        return [self.hook_point_out]

    @property
    def is_transcoder(self) -> bool:
        """Whether another hook point is reconstructed than is read."""
        return self.hook_point_in != self.hook_point_out


class PretrainedSAE(BaseModelConfig):
    """A reference to saved weights: a folder in the native format."""

    pretrained_name_or_path: PathString
    """The folder."""
    fold_activation_scale: bool = True
    """Fold the activation scale into the weights when loading, so that the dictionary takes raw activations."""
    strict_loading: bool = True
    """Every tensor must be there and none may be left over."""
    dtype: FloatingOrNone = None  # pyright: ignore[reportIncompatibleVariableOverride]
    """Cast the weights; `None` keeps the data type of the saved tensors."""


class InitializerConfig(BaseConfig):
    """How a dictionary starts. See the training guide for the recommended values."""

    bias_init_method: Literal["all_zero", "geometric_median"] = "all_zero"
    """How b_D starts: zero, or the geometric median of the (normalised) labels."""
    decoder_uniform_bound: float = Field(default=1.0, gt=0)
    """W_D ~ U(-bound, bound)."""
    encoder_uniform_bound: float = Field(default=1.0, gt=0)
    """W_E, W_E_glu ~ U(-bound, bound) where the encoder is not tied."""
    init_encoder_with_decoder_transpose: bool | None = None
    """W_E = factor * W_D^T at the start. `None`: for SAEs yes, for transcoders no."""
    init_encoder_with_decoder_transpose_factor: float = 1.0
    """The factor above."""
    init_log_jumprelu_threshold_value: float | None = None
    """Natural logarithm of JumpReLU's starting threshold; `None` means a threshold of 0.1."""
    grid_search_init_norm: bool = False
    """Choose the scale of the weights that minimises the initial reconstruction error (in closed form where there is one)."""
    initialize_W_D_with_active_subspace: bool = False
    """Draw decoder rows inside the leading principal subspace of the labels."""
    d_active_subspace: int | Literal["auto"] | None = None
    """Dimension of that subspace; "auto" takes the measured effective rank."""
    initialize_lorsa_with_mhsa: bool | None = None
    """For Lorsa, which this version does not have: must stay unset."""
    initialize_tc_with_mlp: bool | None = None
    """Start a transcoder of an MLP from that MLP: encoder columns along what its neurons read, decoder rows along what it answers to each."""
    model_layer: int | None = None
    """The layer of that MLP; `None`: the one that the dictionary's hook points name."""
    init_encoder_bias_with_mean_hidden_pre: bool = False
    """Centre the pre-activations: b_E = -mean of x W_E."""
    n_batches: int = Field(default=8, ge=1)
    """Batches taken from the start of the stream for statistics."""

    @model_validator(mode="after")
    def _options_that_need_each_other(self) -> Self:
        if self.initialize_W_D_with_active_subspace and self.d_active_subspace is None:
            raise ValueError('initialize_W_D_with_active_subspace needs d_active_subspace: a dimension (about 0.5 * d_model) or "auto"')
        if isinstance(self.d_active_subspace, int) and self.d_active_subspace < 1:
            raise ValueError(f"d_active_subspace must be at least 1, got {self.d_active_subspace}")
        if self.initialize_lorsa_with_mhsa:
            raise ValueError("initialize_lorsa_with_mhsa is not available in this version; leave it out")
        if self.model_layer is not None and not self.initialize_tc_with_mlp:
            raise ValueError("model_layer is the layer of initialize_tc_with_mlp; set initialize_tc_with_mlp = true or leave model_layer out")
        if self.initialize_tc_with_mlp:
            for name in ("init_encoder_with_decoder_transpose", "initialize_W_D_with_active_subspace"):
                if getattr(self, name):
                    raise ValueError(f"{name} would overwrite what initialize_tc_with_mlp makes; leave one of them out")
        return self
