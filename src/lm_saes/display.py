"""What a person sees in the terminal: summaries, tables, and contexts with the firing tokens lit."""

from __future__ import annotations

import math
import os
import re
import sys
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.style import Style
from rich.table import Table
from rich.text import Text

from lm_saes import files
from lm_saes.errors import RunFolderError

if TYPE_CHECKING:
    from lm_saes.analysis.features import Feature

COLD, HOT = (43, 40, 28), (255, 176, 0)
"""Background of a token that hardly fires and of one that fires as hard as the latent ever does."""

_UNPRINTABLE = {"Cc", "Cf", "Cs", "Co", "Cn"}
"""Unicode categories that a terminal might obey instead of showing."""

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
        table.add_column(visible(name), justify="right")
    for key, label, show in METRICS:
        values = [_number(result, key) for result in results.values()]
        if any(value is not None for value in values):
            table.add_row(label, *("–" if value is None else show(value) for value in values))
    return table


def _number(result: Any, key: str) -> float | None:
    """A metric, where it is one: results are read from files too."""
    value = result.get(key) if isinstance(result, Mapping) else None
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def rows_table(rows: Sequence[tuple[str, str]]) -> Table:
    """Two columns: a label and its value."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim")
    table.add_column()
    for label, value in rows:
        table.add_row(Text(visible(label)), Text(visible(value)))
    return table


def visible(text: str) -> str:
    """Text that shows as it is on one line: breaks as ↵, runs of white space short, control and format characters as harmless signs."""
    text = re.sub(r"[^\S\n\u2028\u2029]*[\n\u2028\u2029]\s*", "↵ ", text)
    text = re.sub(r" {3,}", "  ", text.replace("\t", "→"))
    return "".join(_sign(character) if unicodedata.category(character) in _UNPRINTABLE else character for character in text)


def _sign(character: str) -> str:
    code = ord(character)
    return chr(0x2400 + code) if code < 0x20 else "␡" if code == 0x7F else "�"


def lit(text: str, strength: float) -> Text:
    """A token on a background as warm as `strength` in [0, 1] says."""
    if strength <= 0:
        return Text(text, style="grey62")
    strength = min(strength, 1.0)
    red, green, blue = (round(cold + (hot - cold) * strength) for cold, hot in zip(COLD, HOT, strict=True))
    return Text(text, style=Style(color="black" if strength > 0.45 else "white", bgcolor=f"rgb({red},{green},{blue})", bold=strength > 0.8))


def context_line(texts: Sequence[str], activations: Sequence[float], peak: int, scale: float, width: int, marked: bool = False) -> Text:
    """One context on one line of at most `width` cells: the peak, always, and as much around it as fits, two tokens before for one after.

    Args:
        scale: the activation that is shown hottest.
        marked: set the peak in «», for terminals without colours.
    """
    shown = [visible(text) for text in texts]
    shown[peak] = shown[peak] or "·"  # a piece of a character that another token shows
    if marked:
        shown[peak] = f"«{shown[peak]}»"
    cells = [cell_len(text) for text in shown]
    start, end, used, grown = peak, peak + 1, cells[peak], True
    while grown:
        grown = False
        for index in (start - 1, start - 2, end):
            if index in (start - 1, end) and 0 <= index < len(shown) and used + cells[index] <= width:
                start, end, used, grown = min(start, index), max(end, index + 1), used + cells[index], True
    line = Text(no_wrap=True, overflow="ellipsis")
    for index in range(start, end):
        line.append_text(lit(shown[index], max(0.0, activations[index]) / scale if scale > 0 else 0.0))
    line.truncate(width, overflow="ellipsis")  # a peak that is itself too long
    return line


def feature_card(feature: Feature, width: int, n_contexts: int = 5, marked: bool = False) -> RenderableType:
    """A latent's head line and its strongest contexts; `marked` as for `context_line`."""
    head = Text.assemble(
        (f"feature {feature.index}", "bold"),
        (f"   fires on {feature.density:.3%} of tokens   max {_activation(feature.max_activation)}", "dim"),
    )
    if not feature.contexts:
        return Group(head, Text("  did not fire on this text", style="dim"))
    lines = [
        context_line(context.texts, context.activations, context.peak, feature.max_activation, width - 4, marked)
        for context in feature.contexts[:n_contexts]
    ]
    return Group(head, *(Padding(line, (0, 0, 0, 2)) for line in lines))


def _activation(value: float) -> str:
    """Two decimals, or three digits where activations are small."""
    return f"{value:.2f}" if value >= 1 or value == 0 else f"{value:.3g}"


def summary_rows(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What is trained on what, from settings as JSON values."""
    sae, trainer, model = settings["sae"], settings["trainer"], settings.get("model") or {}
    seed = model.get("random_weights")
    rows = []
    if model:
        rows.append(("model", str(model.get("model_name", "–")) + ("" if seed is None else f", untrained: weights drawn with seed {seed}")))
    if "hook_point_in" in sae:
        latents = int(sae["d_model"] * sae["expansion_factor"])
        sparsity = f", k = {sae['top_k']}" if sae["act_fn"] in {"topk", "batchtopk"} else ""
        kind = "SAE" if sae["hook_point_in"] == sae["hook_point_out"] else "transcoder"
        hooks = sae["hook_point_in"] if kind == "SAE" else f"{sae['hook_point_in']} → {sae['hook_point_out']}"
        rows += [("dictionary", f"{kind} of {latents:,} latents over {sae['d_model']} dimensions, {sae['act_fn']}{sparsity}"), ("hook point", hooks)]
    else:
        rows.append(("dictionary", f"fine-tuned from {sae['pretrained_name_or_path']}"))
    datasets = settings.get("datasets") or {}
    places: dict[str, list[str]] = {}
    for source in settings["activation_factory"]["sources"]:
        name, place = source["name"], source.get("path") or datasets.get(source["name"], {}).get("dataset_name_or_path")
        shown = name if place in (None, name) else f"{name} ({place if isinstance(place, str) else ', '.join(place.values())})"
        places.setdefault("activations" if "path" in source else "text", []).append(shown)
    rows += [(kind, ", ".join(shown)) for kind, shown in places.items()]
    rows.append(("tokens", f"{trainer['total_training_tokens']:,}"))
    if trainer.get("frozen"):
        rows.append(("frozen", f"the {trainer['frozen']}: it stays as it starts"))
    return rows


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file, or None when there is no such file or it is not one."""
    try:
        value = files.read_json(path, RunFolderError)
    except (OSError, RunFolderError):
        return None
    return value if isinstance(value, dict) else None


class Terminal(Console):
    """Where the commands print. When whoever reads it goes away (`| head`), the work goes on in silence."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    @property
    def marked(self) -> bool:
        """Whether peaks are marked with signs, for want of colours."""
        return self.color_system is None or self.no_color


def console() -> Terminal:
    """The terminal; 80 columns wide when there is none and COLUMNS is not set."""
    return Terminal(highlight=False)
