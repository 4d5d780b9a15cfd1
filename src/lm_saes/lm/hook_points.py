"""Names of places inside a language model, and the modules they stand for.

A hook point is a TransformerLens-style name (the table below), or the path of any module with `:in` or `:out`
(`model.layers.3.mlp:out`): its first input tensor or its first output tensor.

| name | what it is |
|---|---|
| `hook_embed` | output of the token embedding (scaled, where the model scales it; before positions are added) |
| `blocks.N.hook_resid_pre` | what block N reads |
| `blocks.N.ln1.hook_normalized` | output of the norm before attention, weight and bias applied: what attention reads |
| `blocks.N.attn.hook_z` | what attention's output projection reads, heads side by side: [B, S, heads * d_head] |
| `blocks.N.hook_attn_out` | what attention adds to the residual stream (Gemma 2 and 3: after the norm that follows it) |
| `blocks.N.hook_resid_mid` | the residual stream between attention and MLP; does not exist where both read the same input |
| `blocks.N.ln2.hook_normalized` | output of the norm before the MLP |
| `blocks.N.hook_mlp_out` | what the MLP, or the whole mixture of experts, adds (Gemma 2 and 3: after the norm that follows it) |
| `blocks.N.hook_resid_post` | what block N hands on; for the last block still before the final norm |
| `ln_final.hook_normalized` | output of the final norm |

BERT and its kin normalise after adding. There `ln1` and `ln2` are the norms after attention and after the MLP, `hook_resid_mid` is the output
of `ln1` (what the MLP reads and adds to), and `hook_resid_post` is the output of `ln2` (what the next block reads).
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import nn

from lm_saes.errors import HookPointError

Place = Literal["in", "out"]


class Site(NamedTuple):
    """A tensor that passes a module's border."""

    module: str
    """Path of the module in the model."""
    place: Place
    """Its first input tensor, or its first output tensor."""
    bypass: str | None = None
    """The block around the module, where the same tensor also goes around the module and into the block's output: an edit must reach it there."""


@dataclass(frozen=True)
class Layout:
    """How one kind of block is built. Paths are relative to the block; a `:in` or `:out` follows where it is not the output."""

    norms: frozenset[str]
    """Children of the block that are norms: exactly these, or the layout is another."""
    ln1: str
    ln2: str
    z: str
    attn_out: str
    mlp_out: str
    resid_mid: str
    final_norm: str | None
    """Beside the list of blocks."""
    neurons: str
    """The linear map into the MLP's hidden layer (with a gated MLP: the gate)."""
    mlp: tuple[str, ...]
    """The modules that lead from what `neurons` reads to `mlp_out`, one after the other."""
    parallel_flag: str | None = None
    """Field of the model's configuration that says that attention and MLP read the same input."""


_LLAMA = Layout(
    norms=frozenset({"input_layernorm", "post_attention_layernorm"}),
    ln1="input_layernorm",
    ln2="post_attention_layernorm",
    z="self_attn.o_proj:in",
    attn_out="self_attn",
    mlp_out="mlp",
    resid_mid="post_attention_layernorm:in",
    final_norm="norm",
    neurons="mlp.gate_proj",
    mlp=("mlp",),
)

LAYOUTS: dict[str, Layout] = {
    "GPT-2": Layout(
        norms=frozenset({"ln_1", "ln_2"}),
        ln1="ln_1",
        ln2="ln_2",
        z="attn.c_proj:in",
        attn_out="attn",
        mlp_out="mlp",
        resid_mid="ln_2:in",
        final_norm="ln_f",
        neurons="mlp.c_fc",
        mlp=("mlp",),
    ),
    "GPT-NeoX": Layout(
        norms=frozenset({"input_layernorm", "post_attention_layernorm"}),
        ln1="input_layernorm",
        ln2="post_attention_layernorm",
        z="attention.dense:in",
        attn_out="attention",
        mlp_out="mlp",
        resid_mid="post_attention_layernorm:in",
        final_norm="final_layer_norm",
        neurons="mlp.dense_h_to_4h",
        mlp=("mlp",),
        parallel_flag="use_parallel_residual",
    ),
    "Llama": _LLAMA,  # also Mistral, Qwen 2 and 3, Gemma 1, and the mixtures of experts of Mixtral and Qwen
    "Gemma 2": Layout(
        norms=frozenset({"input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"}),
        ln1="input_layernorm",
        ln2="pre_feedforward_layernorm",
        z="self_attn.o_proj:in",
        attn_out="post_attention_layernorm",
        mlp_out="post_feedforward_layernorm",
        resid_mid="pre_feedforward_layernorm:in",
        final_norm="norm",
        neurons="mlp.gate_proj",
        mlp=("mlp", "post_feedforward_layernorm"),
    ),
    "BERT": Layout(
        norms=frozenset(),
        ln1="attention.output.LayerNorm",
        ln2="output.LayerNorm",
        z="attention.output.dense:in",
        attn_out="attention.output.dense",
        mlp_out="output.dense",
        resid_mid="attention.output.LayerNorm",
        final_norm=None,
        neurons="intermediate.dense",
        mlp=("intermediate", "output.dense"),
    ),
    "DistilBERT": Layout(
        norms=frozenset({"sa_layer_norm", "output_layer_norm"}),
        ln1="sa_layer_norm",
        ln2="output_layer_norm",
        z="attention.out_lin:in",
        attn_out="attention",
        mlp_out="ffn",
        resid_mid="sa_layer_norm",
        final_norm=None,
        neurons="ffn.lin1",
        mlp=("ffn",),
    ),
}


def _split(path: str) -> tuple[str, Place]:
    """Module path and place of `path`, `path:in` or `path:out`."""
    module, _, place = path.partition(":")
    return module, "in" if place == "in" else "out"


def _has(module: nn.Module, path: str) -> bool:
    for name in _split(path)[0].split("."):
        child = getattr(module, name, None)
        if not isinstance(child, nn.Module):
            return False
        module = child
    return True


def _fits(layout: Layout, block: nn.Module) -> bool:
    norms = {name for name, _ in block.named_children() if "norm" in name.lower() or name.startswith("ln")}
    parts = (layout.ln1, layout.ln2, layout.z, layout.attn_out, layout.mlp_out)
    return norms == layout.norms and all(_has(block, part) for part in parts)


class HookPoints:
    """The hook points of one model: its layout is read off its module tree, wrappers such as PEFT's included.

    `layout` is the layout's name in `LAYOUTS`, or None if no layout fits; then only module paths are known.
    """

    def __init__(self, model: nn.Module, config: Any) -> None:
        self._modules = dict(model.named_modules())
        self.model_type: str = getattr(config, "model_type", type(model).__name__)
        self.layout: str | None = None
        self.n_blocks = 0
        self.parallel = False
        self._sites: dict[str, Site] = {}
        found = [
            (path, name)
            for path, module in self._modules.items()
            if isinstance(module, nn.ModuleList) and len(module)
            for name, layout in LAYOUTS.items()
            if _fits(layout, module[0])
        ]
        if len(found) == 1:  # two towers of blocks: none of them is "the" blocks
            self._name_everything(model, config, *found[0])

    def _name_everything(self, model: nn.Module, config: Any, blocks: str, name: str) -> None:
        layout = LAYOUTS[name]
        self.layout = name
        self.n_blocks = len(self._modules[blocks])  # pyright: ignore[reportArgumentType]
        self.parallel = bool(layout.parallel_flag and getattr(config, layout.parallel_flag, False))
        embedding = model.get_input_embeddings()  # pyright: ignore[reportCallIssue]
        self._sites["hook_embed"] = Site(next(path for path, module in self._modules.items() if module is embedding), "out")
        for index in range(self.n_blocks):
            block, prefix = f"{blocks}.{index}", f"blocks.{index}"
            self._sites[f"{prefix}.hook_resid_pre"] = Site(block, "in")
            for hook, part in (
                ("ln1.hook_normalized", layout.ln1),
                ("attn.hook_z", layout.z),
                ("hook_attn_out", layout.attn_out),
                ("hook_resid_mid", layout.resid_mid),
                ("ln2.hook_normalized", layout.ln2),
                ("hook_mlp_out", layout.mlp_out),
            ):
                if hook == "hook_resid_mid" and self.parallel:
                    continue
                module, place = _split(part)
                bypass = block if hook == "hook_resid_mid" and place == "in" else None
                self._sites[f"{prefix}.{hook}"] = Site(f"{block}.{module}", place, bypass)
            self._sites[f"{prefix}.hook_resid_post"] = Site(block, "out")
        parent = blocks.rpartition(".")[0]
        final_norm = ".".join(filter(None, (parent, layout.final_norm)))
        if layout.final_norm and final_norm in self._modules:
            self._sites["ln_final.hook_normalized"] = Site(final_norm, "out")

    def mlp(self, index: int) -> tuple[nn.Module | None, list[nn.Module]]:
        """The linear map into the hidden layer of a block's MLP (None where there is no single one: a mixture of experts), and the modules
        that lead from `ln2.hook_normalized` (BERT and its kin: `hook_resid_mid`) to `hook_mlp_out`.

        Raises:
            HookPointError: the blocks of this model are not known, or there is no such block.
        """
        if self.layout is None or not 0 <= index < self.n_blocks:
            raise HookPointError(f"no MLP of block {index}: this {self.model_type} model has {self.n_blocks} blocks of a known kind")
        layout, block = LAYOUTS[self.layout], self._sites[f"blocks.{index}.hook_resid_post"].module
        return self._modules.get(f"{block}.{layout.neurons}"), [self._modules[f"{block}.{part}"] for part in layout.mlp]

    @property
    def normalizes_after(self) -> bool:
        """Whether norms come after adding, as in BERT."""
        return self.layout is not None and LAYOUTS[self.layout].resid_mid == LAYOUTS[self.layout].ln1

    @property
    def names(self) -> list[str]:
        """The TransformerLens-style names, in the order in which a forward pass meets them."""
        return list(self._sites)

    def site(self, hook_point: str) -> Site:
        """The module and place that a hook point stands for.

        Raises:
            HookPointError: no such name; the message lists near ones.
        """
        if hook_point in self._sites:
            return self._sites[hook_point]
        path, _, place = hook_point.rpartition(":")
        if path in self._modules and place in ("in", "out"):
            return Site(path, place)
        if self.parallel and hook_point.endswith(".hook_resid_mid"):
            raise HookPointError(
                f"'{hook_point}' does not exist in this {self.model_type} model: attention and MLP read the same residual stream in parallel, "
                "so there is no point between them; use hook_resid_pre or hook_resid_post"
            )
        raise HookPointError(self._unknown(hook_point))

    def _unknown(self, hook_point: str) -> str:
        path, _, place = hook_point.rpartition(":")
        if not path:
            path, place = hook_point, "out"
        known = [*self._sites, *(f"{module}:{place}" for module in self._modules if module)]
        near = [f"{path}:{place}"] if path in self._modules else difflib.get_close_matches(hook_point, known, n=3, cutoff=0.6)
        blocks = f" with {self.n_blocks} blocks" if self.layout else ""
        hint = f"; near ones: {', '.join(near)}" if near else ""
        forms = "blocks.N.hook_resid_post, blocks.N.hook_mlp_out, ... or " if self.layout else ""
        return f"no hook point '{hook_point}' in this {self.model_type} model{blocks}{hint} (names are {forms}a module's path with :in or :out)"
