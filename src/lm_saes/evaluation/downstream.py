"""What a dictionary costs the language model: the forward pass with its reconstruction put in place of the activation.

Positions that the stream drops (mask false) keep their clean activation, so a dictionary is judged where it is meant to work; the loss with every
position replaced is reported beside it. A transcoder reads its input in the same forward pass that its output is written in.

Letters: B rows, S positions, V vocabulary (or, for encoder models, the width of the final hidden state), n positions that count.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lm_saes.errors import ConfigError
from lm_saes.evaluation.reconstructor import Reconstructor
from lm_saes.models.statistics import RunningMean


@runtime_checkable
class EditableModel(Protocol):
    """The part of `LanguageModel` that splicing needs."""

    @property
    def is_causal(self) -> bool: ...

    def logits(self, ids: Tensor, attention_mask: Tensor | None = None, edits: Any = ...) -> Float[Tensor, "B S V"]: ...


NEGLIGIBLE_DAMAGE = 1e-6
"""In nats. Where an ablation costs less, the fraction that a dictionary recovers of the damage means nothing and is not given."""


def next_token_losses(logits: Float[Tensor, "B S V"], ids: Int[Tensor, "B S"], attention_mask: Bool[Tensor, "B S"]) -> Float[Tensor, " n"]:
    """Cross-entropy in nats of each next token, where both the position and the next one hold a token."""
    counted = attention_mask[:, :-1] & attention_mask[:, 1:]
    # One row at a time: a float32 copy of all logits would be the largest tensor of the evaluation.
    losses = [
        torch.nn.functional.cross_entropy(logits[row, :-1][counted[row]].float(), ids[row, 1:][counted[row]], reduction="none")
        for row in range(len(ids))
    ]
    return torch.cat(losses)


def kl_divergences(clean: Float[Tensor, "B S V"], changed: Float[Tensor, "B S V"], attention_mask: Bool[Tensor, "B S"]) -> Float[Tensor, " n"]:
    """KL(clean ‖ changed) in nats of the next-token distributions, at the positions of `next_token_losses`."""
    counted = attention_mask[:, :-1] & attention_mask[:, 1:]
    divergences = []
    for row in range(len(clean)):
        log_p = clean[row, :-1][counted[row]].float().log_softmax(-1)
        log_q = changed[row, :-1][counted[row]].float().log_softmax(-1)
        divergences.append((log_p.exp() * (log_p - log_q)).sum(-1))
    return torch.cat(divergences)


def final_hidden_cosines(clean: Float[Tensor, "B S V"], changed: Float[Tensor, "B S V"], attention_mask: Bool[Tensor, "B S"]) -> Float[Tensor, " n"]:
    """Cosine of the final hidden states at all positions that hold a token: what encoder models have in place of a next-token loss."""
    return torch.cosine_similarity(clean[attention_mask].float(), changed[attention_mask].float(), dim=-1)


def recovered_fraction(clean_loss: float, reconstructed_loss: float, ablated_loss: float) -> float | None:
    """(ablated - reconstructed) / (ablated - clean): 1 if the reconstruction costs nothing, 0 if it is as bad as the ablation.

    `None` where the ablation does no damage to speak of (`NEGLIGIBLE_DAMAGE`).
    """
    damage = ablated_loss - clean_loss
    return (ablated_loss - reconstructed_loss) / damage if damage > NEGLIGIBLE_DAMAGE else None


class Splicer:
    """Forward passes of one batch with the dictionary's output hook changed at some positions."""

    def __init__(self, model: EditableModel, ids: Int[Tensor, "B S"], attention_mask: Bool[Tensor, "B S"]) -> None:
        self.model = model
        self.ids = ids
        self.attention_mask = attention_mask

    def clean(self) -> Float[Tensor, "B S V"]:
        """Logits of the unchanged model (encoder models: the final hidden state)."""
        return self.model.logits(self.ids, self.attention_mask)

    def constant(self, hook_point: str, positions: Bool[Tensor, "B S"], value: Tensor | float) -> Float[Tensor, "B S V"]:
        """Logits with a constant vector written at `positions`: zero or mean ablation."""

        def write(activation: Tensor) -> Tensor:
            vector = torch.as_tensor(value, dtype=activation.dtype, device=activation.device)
            return torch.where(positions.to(activation.device)[..., None], vector, activation)

        return self.model.logits(self.ids, self.attention_mask, edits={hook_point: write})

    def reconstructed(self, dictionary: Reconstructor, positions: Bool[Tensor, "B S"]) -> Float[Tensor, "B S V"]:
        """Logits with the dictionary's reconstruction written at `positions`.

        Raises:
            ConfigError: an input hook point of the dictionary comes later in the model than the one it reconstructs.
        """
        (hook_out,) = dictionary.cfg.hooks_out
        seen: dict[str, Tensor] = {}

        def write(activation: Tensor) -> Tensor:
            missing = [hook for hook in dictionary.cfg.hooks_in if hook != hook_out and hook not in seen]
            if missing:
                raise ConfigError(
                    f"a splice reads {missing} before it writes {hook_out}, but the model reaches {hook_out} first; evaluate without `model`"
                )
            where = positions.to(activation.device)
            if not where.any():
                return activation
            rows: dict[str, Any] = {hook: value[where] for hook, value in seen.items()} | {hook_out: activation[where]}
            _, reconstruction = dictionary.features_and_reconstruction(rows)
            changed = activation.clone()
            changed[where] = reconstruction.to(activation)
            return changed

        def remember(hook_point: str) -> Callable[[Tensor], Tensor]:
            def read(activation: Tensor) -> Tensor:
                seen[hook_point] = activation
                return activation

            return read

        reads = {hook: remember(hook) for hook in dictionary.cfg.hooks_in if hook != hook_out}
        return self.model.logits(self.ids, self.attention_mask, edits={**reads, hook_out: write})


class DownstreamSums:
    """Losses (encoder models: cosines) of the clean, reconstructed and ablated forward passes, summed over batches.

    Mean ablation writes the mean of the output activation over all kept positions of the batches seen up to and including the current one: the stream
    is read once, and the result depends on nothing but the stream.
    """

    def __init__(self, model: EditableModel, dictionary: Reconstructor) -> None:
        self.model = model
        self.dictionary = dictionary
        self.mean_activation = RunningMean()
        self.totals: dict[str, float] = {}
        self.n_positions = 0

    def update(self, ids: Int[Tensor, "B S"], attention_mask: Bool[Tensor, "B S"], mask: Bool[Tensor, "B S"], label: Float[Tensor, "B S D"]) -> None:
        """Run the forward passes of one batch; `label` is the clean activation at the dictionary's output hook."""
        self.mean_activation.update(label[mask])
        splicer = Splicer(self.model, ids, attention_mask)
        (hook_out,) = self.dictionary.cfg.hooks_out
        clean = splicer.clean()
        attention_mask, ids = attention_mask.to(clean.device), ids.to(clean.device)
        variants = {
            "reconstructed": lambda: splicer.reconstructed(self.dictionary, mask),
            "reconstructed_everywhere": lambda: splicer.reconstructed(self.dictionary, attention_mask),
            "ablated": lambda: splicer.constant(hook_out, mask, 0.0),
            "mean_ablated": lambda: splicer.constant(hook_out, mask, self.mean_activation.mean),
        }
        if self.model.is_causal:
            self._add("original", counted := next_token_losses(clean, ids, attention_mask))
        else:
            counted = attention_mask[attention_mask]
        self.n_positions += len(counted)
        for name, run in variants.items():
            changed = run()
            if self.model.is_causal:
                self._add(name, next_token_losses(changed, ids, attention_mask))
                if name == "reconstructed":
                    self._add("kl", kl_divergences(clean, changed, attention_mask))
            else:
                self._add(name, final_hidden_cosines(clean, changed, attention_mask))

    def _add(self, name: str, values: Float[Tensor, " n"]) -> None:
        self.totals[name] = self.totals.get(name, 0.0) + sum(values.tolist())  # Python's floats are float64

    def result(self) -> dict[str, float | None]:
        """The metrics, by their names in the evaluation; all `None` if no position counted."""
        means = {name: total / self.n_positions if self.n_positions else None for name, total in self.totals.items()}
        if not self.model.is_causal:
            return {f"metrics/final_hidden_cosine{'' if name == 'reconstructed' else '_' + name}": value for name, value in means.items()}
        kl = means.pop("kl")
        original, reconstructed = means["original"], means["reconstructed"]

        def recovered(ablated: float | None) -> float | None:
            return None if original is None or reconstructed is None or ablated is None else recovered_fraction(original, reconstructed, ablated)

        return {
            **{f"metrics/downstream_loss_{name}": value for name, value in means.items()},
            "metrics/recovered_fraction": recovered(means["ablated"]),
            "metrics/downstream_loss_ratio": recovered(means["ablated"]),  # the same by upstream's name
            "metrics/recovered_fraction_mean": recovered(means["mean_ablated"]),
            "metrics/delta_ce": None if original is None or reconstructed is None else reconstructed - original,
            "metrics/kl_divergence": kl,
        }
