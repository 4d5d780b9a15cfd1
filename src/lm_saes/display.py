"""What a person sees in the terminal: summaries, tables, and contexts with the firing tokens lit."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.style import Style
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from lm_saes.analysis.features import Feature

COLD, HOT = (43, 40, 28), (255, 176, 0)
"""Background of a token that hardly fires and of one that fires as hard as the latent ever does."""

METRICS: list[tuple[str, str, Callable[[float], str]]] = [
    ("metrics/explained_variance", "explained variance", lambda value: f"{value:.4f}"),
    ("metrics/normalized_mse", "normalised MSE", lambda value: f"{value:.4f}"),
    ("metrics/cosine_similarity", "cosine similarity", lambda value: f"{value:.4f}"),
    ("metrics/l0", "L0", lambda value: f"{value:.2f}"),
    ("metrics/dead_fraction", "dead latents", lambda value: f"{value:.2%}"),
    ("metrics/dense_fraction", "dense latents (> 10 % of tokens)", lambda value: f"{value:.2%}"),
    ("metrics/shrinkage", "norm of reconstruction / norm", lambda value: f"{value:.4f}"),
    ("metrics/recovered_fraction", "loss recovered, against zero ablation", lambda value: f"{value:.4f}"),
    ("metrics/recovered_fraction_mean", "loss recovered, against mean ablation", lambda value: f"{value:.4f}"),
    ("metrics/delta_ce", "ΔCE (nats per token)", lambda value: f"{value:+.4f}"),
    ("metrics/kl_divergence", "KL divergence (nats)", lambda value: f"{value:.4f}"),
    ("metrics/downstream_loss_original", "cross-entropy of the model", lambda value: f"{value:.4f}"),
    ("metrics/downstream_loss_reconstructed", "… with the reconstruction spliced in", lambda value: f"{value:.4f}"),
    ("metrics/downstream_loss_ablated", "… with zeros spliced in", lambda value: f"{value:.4f}"),
    ("metrics/final_hidden_cosine", "cosine of the final hidden state", lambda value: f"{value:.4f}"),
    ("metrics/n_tokens", "tokens evaluated", lambda value: f"{int(value):,}"),
]


def evaluation_table(results: Mapping[str, Mapping[str, Any]]) -> Table:
    """One column per evaluated thing (the dictionary, its baselines), one row per metric that any of them has."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("")
    for name in results:
        table.add_column(name, justify="right")
    for key, label, show in METRICS:
        values = [result.get(key) for result in results.values()]
        if any(value is not None for value in values):
            table.add_row(label, *("–" if value is None else show(value) for value in values))
    return table


def rows_table(rows: Sequence[tuple[str, str]]) -> Table:
    """Two columns: a label and its value."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim")
    table.add_column()
    for label, value in rows:
        table.add_row(label, value)
    return table


def lit(text: str, strength: float) -> Text:
    """A token on a background as warm as `strength` in [0, 1] says."""
    visible = text.replace("\n", "↵").replace("\t", "→")
    if strength <= 0:
        return Text(visible, style="grey62")
    red, green, blue = (round(cold + (hot - cold) * strength) for cold, hot in zip(COLD, HOT, strict=True))
    return Text(visible, style=Style(color="black" if strength > 0.45 else "white", bgcolor=f"rgb({red},{green},{blue})", bold=strength > 0.8))


def context_line(texts: Sequence[str], activations: Sequence[float], peak: int, scale: float, width: int) -> Text:
    """One context on one line: as much of it as fits, the peak always inside, runs of white space shown short."""
    shown = [_short(text) for text in texts]
    start, end, used = peak, peak + 1, len(shown[peak])
    while True:
        grown = False
        for side in ("before", "before", "after"):
            index = start - 1 if side == "before" else end
            if 0 <= index < len(shown) and used + len(shown[index]) <= width:
                used += len(shown[index])
                start, end = (index, end) if side == "before" else (start, index + 1)
                grown = True
        if not grown:
            break
    line = Text(no_wrap=True, overflow="ellipsis")
    for index in range(start, end):
        line.append_text(lit(shown[index], max(0.0, activations[index]) / scale if scale > 0 else 0.0))
    return line


def _short(text: str) -> str:
    if "\n" in text:
        return "↵" + (" " if text.rstrip("\n") == "" or text.endswith(" ") else "")
    return text if len(text.strip()) else text[:2]


def feature_card(feature: Feature, width: int, n_contexts: int = 5) -> RenderableType:
    """A latent's head line and its strongest contexts."""
    head = Text.assemble(
        (f"feature {feature.index}", "bold"),
        (f"   fires on {feature.density:.3%} of tokens   max {feature.max_activation:.2f}", "dim"),
    )
    if not feature.contexts:
        return Group(head, Text("  did not fire on this text", style="dim"))
    lines = [
        context_line(context.texts, context.activations, context.peak, feature.max_activation, width - 4) for context in feature.contexts[:n_contexts]
    ]
    return Group(head, *(Padding(line, (0, 0, 0, 2)) for line in lines))


def summary_rows(settings: Mapping[str, Any], metrics: Mapping[str, Any] | None = None) -> list[tuple[str, str]]:
    """What was trained on what, from a run's `settings.json` and its last metrics."""
    sae, trainer, model = settings["sae"], settings["trainer"], settings.get("model") or {}
    rows = [("model", str(model.get("model_name", "–")))]
    if "hook_point_in" in sae:
        latents = int(sae["d_model"] * sae["expansion_factor"])
        sparsity = f", k = {sae['top_k']}" if sae["act_fn"] in {"topk", "batchtopk"} else ""
        kind = "SAE" if sae["hook_point_in"] == sae["hook_point_out"] else "transcoder"
        hooks = sae["hook_point_in"] if kind == "SAE" else f"{sae['hook_point_in']} → {sae['hook_point_out']}"
        rows += [("dictionary", f"{kind} of {latents:,} latents over {sae['d_model']} dimensions, {sae['act_fn']}{sparsity}"), ("hook point", hooks)]
    else:
        rows.append(("dictionary", f"fine-tuned from {sae['pretrained_name_or_path']}"))
    text = ", ".join(
        f"{name} ({table.get('dataset_name_or_path')})"
        for name, table in (settings.get("datasets") or {"demo": {"dataset_name_or_path": "demo"}}).items()
    )
    rows.append(("text", text))
    tokens = (metrics or {}).get("details/n_training_tokens", trainer["total_training_tokens"])
    rows.append(("tokens", f"{int(tokens):,}"))
    return rows


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file, or None when there is no such file or it is not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def console(stderr: bool = False) -> Console:
    """The terminal; at least 60 columns wide when there is none."""
    return Console(stderr=stderr, highlight=False)
