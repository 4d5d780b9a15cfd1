"""TransformerLens as a backend: its hook points, on the same model and tokenizer. Needs `transformer-lens`, which is loaded when a model is."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Self

import torch
from torch import Tensor

from lm_saes.config import LanguageModelConfig
from lm_saes.devices import FastLinear
from lm_saes.errors import HookPointError, LanguageModelError
from lm_saes.lm.hooks import evaluating
from lm_saes.lm.language_model import Edit, LanguageModel


class _AllCaptured(Exception):
    """Ends a forward pass whose remaining layers nobody asked for."""


class TransformerLensLanguageModel(LanguageModel):
    """A causal model behind a `TransformerBridge` (TransformerLens 4). Weights are as published: no folded norms, no centred weights.

    Hook points are all of the bridge's. Two read as everywhere in this library: `ln*.hook_normalized` is the norm's output with weight and bias
    applied (the bridge's `hook_out`), and activations with a head dimension come as [B, S, heads * d_head].

    Raises:
        LanguageModelError: transformer-lens is not installed, or the model cannot be loaded or bridged.
    """

    def __init__(self, cfg: LanguageModelConfig) -> None:
        bridge_class = _bridge_class()
        from lm_saes.lm.huggingface import HuggingFaceLanguageModel

        loaded = HuggingFaceLanguageModel(cfg)
        try:
            bridge = bridge_class.boot_transformers(
                loaded.location, hf_model=loaded.model, tokenizer=loaded.tokenizer, device=str(loaded.device), dtype=cfg.dtype
            )
        except ValueError as error:
            raise LanguageModelError(f"TransformerLens has no bridge for {cfg.model_name}: {' '.join(str(error).split())}") from None
        self._adopt(bridge, cfg)

    @classmethod
    def from_bridge(cls, bridge: Any, cfg: LanguageModelConfig | None = None) -> Self:
        """A bridge that is already loaded. It is neither moved nor changed."""
        self = cls.__new__(cls)
        self._adopt(bridge, cfg or LanguageModelConfig(model_name=bridge.cfg.model_name))
        return self

    def _adopt(self, bridge: Any, cfg: LanguageModelConfig) -> None:
        from lm_saes.lm.huggingface import HuggingFaceLanguageModel

        self.model = bridge
        self._plain = HuggingFaceLanguageModel.from_model(bridge.original_model, bridge.tokenizer, cfg)
        if not self._plain.is_causal:
            raise LanguageModelError(f"{cfg.model_name} is not causal; the transformer_lens backend is for causal models, use backend='huggingface'")
        super().__init__(cfg, bridge.tokenizer)
        self.device, self.d_model, self.n_layers = self._plain.device, int(bridge.cfg.d_model), int(bridge.cfg.n_layers)
        self.is_causal, self.max_context = True, self._plain.max_context
        self._widths: dict[str, int] = {}

    def _name_in_bridge(self, hook_point: str) -> str:
        known = self.model.hook_dict
        name = hook_point.removesuffix(".hook_normalized") + ".hook_out" if hook_point.endswith(".hook_normalized") else hook_point
        if name not in known:
            near = difflib.get_close_matches(hook_point, known, n=3, cutoff=0.6)
            raise HookPointError(f"TransformerLens has no hook point '{hook_point}' here" + (f"; near ones: {', '.join(near)}" if near else ""))
        return name

    def _run(self, ids: Tensor, attention_mask: Tensor | None, hooks: list[tuple[str, Callable[..., Any]]]) -> Tensor:
        inputs = self._plain.inputs(ids, attention_mask)
        ids = inputs.pop("input_ids")
        with evaluating(self.model), FastLinear():
            return self.model.run_with_hooks(ids, fwd_hooks=hooks, return_type="logits", **inputs)

    @torch.no_grad()
    def capture(self, ids: Tensor, attention_mask: Tensor | None, hook_points: Sequence[str]) -> dict[str, Tensor]:
        captured: dict[str, Tensor] = {}
        wanted = list(dict.fromkeys(hook_points))

        def reader(name: str) -> Callable[..., None]:
            def hook(tensor: Tensor, hook: Any) -> None:  # noqa: ARG001  (the bridge passes it by this name)
                if name not in captured:
                    captured[name] = _flat(tensor).detach().clone()
                if len(captured) == len(wanted):
                    raise _AllCaptured

            return hook

        hooks = [(self._name_in_bridge(name), reader(name)) for name in wanted]
        if not hooks:
            return {}
        with suppress(_AllCaptured):
            self._run(ids, attention_mask, hooks)
        missing = [name for name in wanted if name not in captured]
        if missing:
            raise HookPointError(f"the forward pass never reached '{missing[0]}'")
        return {name: captured[name] for name in wanted}

    @torch.no_grad()
    def logits(self, ids: Tensor, attention_mask: Tensor | None = None, edits: Mapping[str, Edit] | None = None) -> Tensor:
        hooks: list[tuple[str, Callable[..., Any]]] = []
        for name, edit in (edits or {}).items():
            differences: list[Tensor] = []
            hooks.append((self._name_in_bridge(name), _editor(edit, differences)))
            if name.endswith(".hook_resid_mid"):  # the bridge's hook is what ln2 reads; the stream itself goes around it, into the block's output
                hooks.insert(0, (name.replace("hook_resid_mid", "hook_out"), _adder(differences)))
        return self._run(ids, attention_mask, hooks)

    def hook_width(self, hook_point: str) -> int:
        if hook_point not in self._widths:
            ids = torch.tensor([[self.bos_token_id or 0]])
            self._widths[hook_point] = int(self.capture(ids, None, [hook_point])[hook_point].shape[-1])
        return self._widths[hook_point]

    def provenance(self) -> dict[str, Any]:
        return {**self._plain.provenance(), "backend": "transformer_lens"}


def _flat(tensor: Tensor) -> Tensor:
    """[B, S, heads, d_head] with the heads side by side; [B, S, W] as it is."""
    return tensor.flatten(2) if tensor.ndim > 3 else tensor


def _editor(edit: Edit, differences: list[Tensor]) -> Callable[..., Tensor]:
    def hook(tensor: Tensor, hook: Any) -> Tensor:  # noqa: ARG001  (the bridge passes it by this name)
        new = edit(_flat(tensor)).reshape(tensor.shape)
        differences.append(new - tensor)
        return new

    return hook


def _adder(differences: list[Tensor]) -> Callable[..., Tensor]:
    return lambda tensor, hook: tensor + differences[-1]  # noqa: ARG005


def _bridge_class() -> Any:
    try:
        from transformer_lens.model_bridge import TransformerBridge  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise LanguageModelError(
            f'backend="transformer_lens" needs TransformerLens 4 ({error}): pip install "transformer-lens>=4.0", or use backend="auto"'
        ) from None
    return TransformerBridge
