"""The picture of an inspection: how variance falls off over the principal directions, by depth, and how many directions hold 99 % of it."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_saes.errors import ConfigError
from lm_saes.inspection.report import ActivationReport, HookPointReport
from lm_saes.training.run_folder import disk_errors

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TITLES = {"hook_attn_out": "attention output", "hook_mlp_out": "MLP output", "hook_resid_post": "residual stream"}
INK, PALE = "#27272a", "#a1a1aa"
COLORS = ("#c2410c", "#0f766e", "#1d4ed8", "#7e22ce", "#4d7c0f", "#be185d")
FLOOR = 1e-4
"""Least variance that is drawn, in units of what an isotropic spectrum has everywhere."""


def require_matplotlib() -> None:
    """Raise before the work, rather than after it, where there is nothing to draw with.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise ConfigError("the spectrum is drawn by matplotlib, which is not installed; install it with: pip install 'lm-saes[plot]'")


def save_spectrum(report: ActivationReport, path: str | Path) -> None:
    """Draw the spectra of all hook points: a panel for each kind, a line for each block, and 99 % of the variance by depth.

    Args:
        path: its ending says the format (.png, .svg, .pdf).

    Raises:
        ConfigError: matplotlib is not installed, or the ending is none that it knows.
    """
    require_matplotlib()
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kinds = _kinds(report)
    by_depth = any(len(records) > 1 for records in kinds.values())
    with matplotlib.rc_context(
        {"font.size": 9, "axes.edgecolor": PALE, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "text.color": INK}
    ):
        n_panels = len(kinds) + by_depth
        figure = Figure(figsize=(1.2 + 2.9 * n_panels, 3.4), dpi=160, layout="constrained")
        canvas = FigureCanvasAgg(figure)
        if Path(path).suffix.lstrip(".").lower() not in canvas.get_supported_filetypes():
            raise ConfigError(f"a picture ends in .png, .svg or .pdf, got '{Path(path).name}'")
        axes = list(figure.subplots(1, n_panels, squeeze=False)[0])
        colormap = matplotlib.colormaps["viridis"]
        for index, (axis, (kind, records)) in enumerate(zip(axes, kinds.items(), strict=False)):
            _draw_spectra(axis, records, colormap)
            axis.set_title(
                TITLES.get(kind, kind) if by_depth else records[0][1].hook_point,
                loc="left",
                fontsize=10,
                fontweight="bold",
                color=COLORS[index % len(COLORS)],
            )
            if index == 0:
                axis.set_ylabel("variance, 1 = the same in all directions")
            else:
                axis.sharey(axes[0])
                axis.tick_params(labelleft=False)
        if by_depth:
            _draw_depths(axes[-1], kinds)
        with disk_errors(str(path)):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path)


def _kinds(report: ActivationReport) -> dict[str, list[tuple[int, HookPointReport]]]:
    """Hook points by what they are, each with its block's number."""
    kinds: dict[str, list[tuple[int, HookPointReport]]] = {}
    for name, record in report.hook_points.items():
        match = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
        kind, block = (match[2], int(match[1])) if match else (name, 0)
        kinds.setdefault(kind, []).append((block, record))
    return kinds


def _plain_axis(axis: Axes) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(True, color="#e4e4e7", linewidth=0.6)
    axis.set_axisbelow(True)


def _draw_spectra(axis: Axes, records: list[tuple[int, HookPointReport]], colormap: Any) -> None:
    _plain_axis(axis)
    last = max(block for block, _ in records) or 1
    for block, record in records:
        width, color = record.d_model, colormap(0.92 * block / last if len(records) > 1 else 0.35)
        xs = [(index + 0.5) / width for index in range(width)]
        ys = [share * width if share * width >= FLOOR else float("nan") for share in record.spectrum]
        rank = record.dimensionality.variance_99
        axis.plot(xs, ys, color=color, linewidth=1.3, zorder=2)
        if rank:
            axis.plot(xs[rank - 1], ys[rank - 1], "o", color=color, markersize=5, markeredgecolor="white", markeredgewidth=0.8, zorder=3)
    axis.set_yscale("log")
    axis.set_ylim(FLOOR, None)
    axis.set_xlim(0, 1)
    axis.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "", ".5", "", "1"])
    axis.set_xlabel("principal direction / width\n● 99 % of the variance lies left of it")
    if len(records) > 1:
        first = min(block for block, _ in records)
        axis.text(0.98, 0.98, f"blocks {first} (dark) to {last} (light)", transform=axis.transAxes, ha="right", va="top", fontsize=8, color="#52525b")


def _draw_depths(axis: Axes, kinds: dict[str, list[tuple[int, HookPointReport]]]) -> None:
    _plain_axis(axis)
    for index, (kind, records) in enumerate(kinds.items()):
        ordered = sorted(records, key=lambda item: item[0])
        numbers = [block for block, _ in ordered]
        color = COLORS[index % len(COLORS)]
        axis.plot(
            numbers, [record.dimensionality.variance_99_share for _, record in ordered], "o-", color=color, markersize=4, label=TITLES.get(kind, kind)
        )
        axis.plot(numbers, [record.dimensionality.effective_rank_share for _, record in ordered], "--", color=color, linewidth=0.9, alpha=0.7)
    axis.set_ylim(0, 1)
    axis.set_title("dimensions used", loc="left", fontsize=10, fontweight="bold")
    axis.set_xlabel("block\n● 99 % of the variance   - - effective rank")
    axis.set_ylabel("share of the width")
    blocks = sorted({block for records in kinds.values() for block, _ in records})
    axis.set_xticks(blocks[:: max(1, len(blocks) // 8)])
    axis.legend(frameon=False, fontsize=8, loc="lower right")
