"""What all sparse dictionaries share: running in both spaces, statistics, the loss, making and loading. (Scales are in normalization.py.)

A dictionary works in its own space, which is that of normalised activations, or of raw ones once the scale is folded into the
weights (`norm_activation="inference"`). `normalize_activations` leads there and `denormalize_activations` back; `features`,
`reconstruct` and `features_and_reconstruction` take raw activations in every mode.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, overload

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from lm_saes import losses, ops
from lm_saes.config import LanguageModelConfig, SparseDictionaryConfig
from lm_saes.devices import resolve_device
from lm_saes.errors import ConfigError
from lm_saes.losses import Forward
from lm_saes.models import pretrained
from lm_saes.models.activation_functions import ActivationFunction, make_activation_function
from lm_saes.models.normalization import ActivationSpace, Batch
from lm_saes.ops import Codes, SparseCodes

DictionaryT = TypeVar("DictionaryT", bound="SparseDictionary")


class SparseDictionary(ActivationSpace):
    """Base of the dictionaries. A variant brings parameters, an encoder, a decoder, and what folding does to them.

    Args:
        cfg: the shape. Weights get `cfg.dtype` on `cfg.device`.

    Raises:
        DeviceError: this machine does not have `cfg.device`.
    """

    def __init__(self, cfg: SparseDictionaryConfig) -> None:
        device = resolve_device(cfg.device)
        super().__init__(cfg, device)
        _warn_of_kernel_options(cfg)
        self.provenance: dict[str, Any] = {}
        """Where the dictionary comes from; written into and read from `config.json`."""
        self.current_k: int = cfg.top_k
        """k of the TopK family, `cfg.top_k` unless it is being annealed."""
        self.activation_function: ActivationFunction = make_activation_function(cfg, device)

    # ------------------------------------------------------------------------------------------- what a variant brings

    @abstractmethod
    def encoder(self) -> ops.Encoder:
        """The tensors of the encoder product, and the decoder norms where the gate includes them."""

    @abstractmethod
    def decode(self, codes: Codes, x: Float[Tensor, "*shape D"] | None = None) -> Float[Tensor, "*shape D"]:
        """The reconstruction, b_D included, of codes [..., F] or of sparse codes; with the input x, what a skip connection adds to it."""

    @abstractmethod
    def decode_against(
        self, codes: Codes, target: Float[Tensor, "N D"], x: Float[Tensor, "N D"] | None = None
    ) -> tuple[Float[Tensor, "N D"], Float[Tensor, " N"]]:
        """`decode`, and its squared distance from the target for each token, in float32 or wider."""

    @abstractmethod
    def prefix_errors(
        self, codes: Codes, target: Float[Tensor, "N D"], widths: Sequence[int], detach: bool = False, x: Float[Tensor, "N D"] | None = None
    ) -> list[Float[Tensor, " N"]]:
        """The squared distance of the target from what the first `width` latents, b_D and a skip connection make, for each of ascending widths.

        Args:
            detach: what a prefix shares with the one before it is taken as it is, without gradient.
        """

    @abstractmethod
    def decode_latents(self, codes: Codes, latents: Int64[Tensor, " M"]) -> Float[Tensor, "N D"]:
        """The sum of decoder rows without b_D, for codes [N, M] over some latents only."""

    @abstractmethod
    def decoder_norm(self, keepdim: bool = False) -> Float[Tensor, "*shape"]:
        """||W_D row|| of each latent [F] in at least float32, differentiable; with `keepdim` [F, 1]."""

    @abstractmethod
    def prepare_input(self, batch: Batch) -> Float[Tensor, "*shape D"]:
        """What the encoder reads, in the weights' data type."""

    @abstractmethod
    def prepare_label(self, batch: Batch) -> Float[Tensor, "*shape D"]:
        """What is to be reconstructed, in the weights' data type."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Device of the weights."""

    @abstractmethod
    def log_statistics(self) -> dict[str, float]:
        """Norms and thresholds worth logging, by metric name."""

    # ------------------------------------------------------------------------------------------- own space

    def run(
        self,
        x: Float[Tensor, "N D"],
        k: int | None = None,
        mask: Bool[Tensor, " N"] | None = None,
        target: Float[Tensor, "N D"] | None = None,
    ) -> Forward:
        """Codes and reconstruction of N tokens, with sparse codes where the activation function selects.

        Args:
            k: k of the TopK family; None is `current_k`. In eval mode BatchTopK gates by its threshold instead.
            mask: tokens that BatchTopK selects over in training; the others get empty codes.
            target: what is to be reconstructed; with it the squared error is made along with the reconstruction, which is faster.
        """
        x = x.to(self.dtype)
        codes = self.activation_function(x, self.encoder(), self.current_k if k is None else k, mask)
        return Forward(codes, self.decode(codes, x)) if target is None else Forward(codes, *self.decode_against(codes, target, x))

    @overload
    def encode(self, x: Tensor, return_hidden_pre: Literal[False] = False, k: int | None = None) -> Tensor: ...
    @overload
    def encode(self, x: Tensor, return_hidden_pre: Literal[True], k: int | None = None) -> tuple[Tensor, Tensor]: ...

    def encode(self, x: Float[Tensor, "*shape D"], return_hidden_pre: bool = False, k: int | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Dense codes [..., F]; with `return_hidden_pre` also the pre-activations h [..., F]."""
        rows = x.reshape(-1, x.shape[-1]).to(self.dtype)
        encoder = self.encoder()
        codes = ops.to_dense(self.activation_function(rows, encoder, self.current_k if k is None else k)).view(*x.shape[:-1], -1)
        return (codes, ops.pre_activations(rows, encoder).view(*x.shape[:-1], -1)) if return_hidden_pre else codes

    def forward(self, x: Float[Tensor, "*shape D"]) -> Float[Tensor, "*shape D"]:
        """The reconstruction in the dictionary's own space."""
        return self.run(x.reshape(-1, x.shape[-1])).reconstruction.view(*x.shape[:-1], -1)

    @abstractmethod
    def parameters_of(self, part: Literal["encoder", "decoder"]) -> list[nn.Parameter]:
        """What `TrainerConfig.frozen` keeps: the weights and biases of the encoder, or the rows of the decoder. (b_D is of neither.)"""

    def learned_threshold(self) -> Float[Tensor, " F"] | None:
        """theta of JumpReLU in gate space, differentiable; None where no threshold is learned."""
        return self.activation_function.learned_threshold()

    def set_current_k(self, k: int) -> None:
        """Set k of the TopK family."""
        if not 0 <= k <= self.cfg.d_sae:
            raise ConfigError(f"k must lie between 0 and d_sae = {self.cfg.d_sae}, got {k}")
        self.current_k = int(k)

    # ------------------------------------------------------------------------------------------- raw space

    def features(self, batch: Batch) -> Float[Tensor, "*shape F"]:
        """Dense codes of raw activations."""
        return self.encode(self.prepare_input(self.normalize_activations(batch)))

    def reconstruct(self, batch: Batch) -> Float[Tensor, "*shape D"]:
        """Reconstruction of the raw activations at `hook_point_out` from raw activations. Where the scale is taken from the batch
        (token-wise; batch-wise in training), the batch must hold that hook point too."""
        return self.features_and_reconstruction(batch)[1]

    def features_and_reconstruction(self, batch: Batch) -> tuple[Float[Tensor, "*shape F"], Float[Tensor, "*shape D"]]:
        """Dense codes and the raw reconstruction, in one pass."""
        normalized, factors = self.normalize_activations(batch, return_scale_factor=True)
        x = self.prepare_input(normalized)
        codes = self.encode(x)
        (hook_out,) = self.cfg.hooks_out
        if hook_out not in factors and (self.cfg.norm_activation == "token-wise" or (self.cfg.norm_activation == "batch-wise" and self.training)):
            raise ConfigError(
                f"norm_activation '{self.cfg.norm_activation}' takes the scale of '{hook_out}' from the batch, which holds {sorted(batch)}"
            )
        factor = factors.get(hook_out, self._constant_scale(hook_out) if hook_out not in factors else 1.0)
        return codes, self.decode(codes, x) / factor

    # ------------------------------------------------------------------------------------------- training

    @torch.no_grad()
    def update_statistics(self, forward: Forward, x: Float[Tensor, "N D"], mask: Bool[Tensor, " N"] | None = None) -> None:  # noqa: ARG002
        """Once per optimizer step: move BatchTopK's threshold by the codes of the step, and the running norms of batch-wise by those
        that `normalize_activations` noted last. (Codes outside the mask are empty, so the mask itself adds nothing.)"""
        self.activation_function.update_statistics(forward.codes, self.encoder)
        self.update_running_norms()

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Batch]) -> None:
        """Set BatchTopK's threshold from normalised batches: the mean over batches of the smallest selected gate value."""
        self.activation_function.calibrate(((_rows(self.prepare_input(b)), _row_mask(b)) for b in batches), self.encoder(), self.current_k)

    def get_parameters(self) -> list[dict[str, Any]]:
        """Parameter groups of the optimizer: "others", and "jumprelu" where thresholds are learned. What needs no gradient is in none."""
        learned = list(self.activation_function.parameters())
        others = [
            parameter for parameter in self.parameters() if parameter.requires_grad and not any(parameter is threshold for threshold in learned)
        ]
        return [{"params": others, "name": "others"}, *([{"params": learned, "name": "jumprelu"}] if learned else [])]

    def compute_loss(
        self,
        batch: Batch,
        *,
        sparsity_loss_type: Literal["power", "tanh", "tanh-quad"] | None = None,
        tanh_stretch_coefficient: float = 4.0,
        frequency_scale: float = 0.01,
        p: float = 1.0,
        l1_coefficient: float | None = 1.0,
        lp_coefficient: float | None = None,
        auxk_coefficient: float | None = None,
        k_aux: int = 512,
        update_dead_statistics: Callable[[Codes, Tensor | None], Tensor] | None = None,
        return_aux_data: bool = True,
    ) -> Any:
        """The training loss of a normalised batch (`normalize_activations`). The terms are those of `lm_saes.losses`.

        Args:
            l1_coefficient: weight of the sparsity loss; None is 1.
            lp_coefficient: weight of JumpReLU's pre-activation loss; None leaves it out.
            auxk_coefficient: weight of AuxK; None leaves it out.
            update_dead_statistics: (codes, mask) -> which latents are dead [F]; without it none is.

        Returns:
            the loss, or with `return_aux_data` (loss, {"losses": weighted terms by name, "forward", "x", "target", "mask", "dead"}); x and target are
            zero outside the mask.
        """
        x, target, mask = _rows(self.prepare_input(batch)), _rows(self.prepare_label(batch)), _row_mask(batch)
        if mask is not None:  # what lies outside may be anything, and 0 times NaN is NaN in a gradient
            x, target = (rows.masked_fill(~mask[:, None], 0.0) for rows in (x, target))
        forward = self.run(x, mask=mask, target=target)
        dead = None if update_dead_statistics is None else update_dead_statistics(forward.codes, mask)
        weights = losses.LossWeights(
            sparsity_loss_type=sparsity_loss_type,
            sparsity=1.0 if l1_coefficient is None else l1_coefficient,
            tanh_stretch_coefficient=tanh_stretch_coefficient,
            frequency_scale=frequency_scale,
            p=p,
            lp=lp_coefficient,
            auxk=auxk_coefficient,
            k_aux=k_aux,
        )
        loss, terms = losses.total_loss(self, losses.LossInputs(x, target, forward, mask, dead), weights)
        return (loss, {"losses": terms, "forward": forward, "x": x, "target": target, "mask": mask, "dead": dead}) if return_aux_data else loss

    # ------------------------------------------------------------------------------------------- making, saving, loading

    @classmethod
    def from_config(cls: type[DictionaryT], cfg: SparseDictionaryConfig, device_mesh: Any = None) -> DictionaryT:
        """A dictionary of that shape with a small random start; `Initializer` gives it a good one.

        Raises:
            ConfigError: a device mesh is given.
            DeviceError: this machine does not have `cfg.device`.
        """
        return pretrained.build(cls, cfg, device_mesh)

    @classmethod
    def from_pretrained(
        cls: type[DictionaryT],
        pretrained_name_or_path: str | Path,
        *,
        device_mesh: Any = None,
        fold_activation_scale: bool = True,
        strict_loading: bool = True,
        **cfg_overrides: Any,
    ) -> DictionaryT:
        """A saved dictionary, in eval mode.

        Args:
            pretrained_name_or_path: a folder with `config.json` and `sae_weights.safetensors`, or `"org/repo:folder"` on the Hugging Face hub.
            fold_activation_scale: fold the activation scale unless that was done before saving, so that the dictionary takes raw activations.
            strict_loading: refuse missing and unexpected tensors.
            cfg_overrides: fields of the configuration, such as `device`; `dtype=None` keeps the data type of the saved tensors.

        Raises:
            WeightsError: no such folder, or its files are damaged or do not match.
            FoldingError: the scale cannot be folded.
            ConfigError: an override is wrong.
        """
        return pretrained.load(cls, pretrained_name_or_path, device_mesh, fold_activation_scale, strict_loading, cfg_overrides)

    @classmethod
    def from_local(cls: type[DictionaryT], path: str | Path, **options: Any) -> DictionaryT:
        """`from_pretrained` of a folder."""
        return cls.from_pretrained(path, **options)

    @classmethod
    def from_hf(cls: type[DictionaryT], repo_id: str, name: str = "", *, token: str | None = None, **options: Any) -> DictionaryT:
        """`from_pretrained` of the folder `name` of a repository on the Hugging Face hub."""
        return cls.from_pretrained(pretrained.local_folder(f"{repo_id}:{name}" if name else repo_id, token), **options)

    def upload_to_hf(
        self, repo_id: str, name: str = "", lm_config: LanguageModelConfig | None = None, *, token: str | None = None, private: bool = False
    ) -> None:
        """Save into the folder `name` of a repository on the Hugging Face hub, which is made if need be; with `lm_config`, the language
        model's configuration beside it.

        Raises:
            WeightsError: the hub refuses or cannot be reached.
        """
        pretrained.upload(self, repo_id, name, lm_config, token, private)

    def save_pretrained(self, folder: str | Path, fold_activation_scale: bool = False) -> None:
        """Write `config.json` and `sae_weights.safetensors` into a folder, which is made if need be. With `fold_activation_scale` a folded
        copy is written; this dictionary stays as it is."""
        pretrained.save(self, folder, fold_activation_scale)

    def save_checkpoint(self, path: str | Path) -> None:
        """Write the weights alone, as `<name>.safetensors`."""
        pretrained.save_weights(self, path)


def _rows(x: Float[Tensor, "*shape D"]) -> Float[Tensor, "N D"]:
    return x.reshape(-1, x.shape[-1])


def _row_mask(batch: Batch) -> Bool[Tensor, " N"] | None:
    mask = batch.get("mask")
    return None if mask is None else mask.reshape(-1).bool()


_warned_of_kernel_options = False


def _warn_of_kernel_options(cfg: SparseDictionaryConfig) -> None:
    global _warned_of_kernel_options
    fields = type(cfg).model_fields
    names = [name for name in ("use_triton_kernel", "sparsity_threshold_for_triton_spmm_kernel") if getattr(cfg, name) != fields[name].default]
    if names and not _warned_of_kernel_options:
        _warned_of_kernel_options = True
        warnings.warn(
            f"{' and '.join(names)} have no effect: lm_saes.ops chooses the kernel (lm_saes.ops.explain() says which)", UserWarning, stacklevel=4
        )


__all__ = ["Batch", "Codes", "Forward", "SparseCodes", "SparseDictionary"]
