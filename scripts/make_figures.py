"""Draw the README's picture from a finished demo: `make figures` (after `make demo`).

The picture is the terminal's own output as SVG; it loads no font from anywhere.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

from lm_saes import display
from lm_saes.commands import features_of_run

INK = TerminalTheme(
    background=(24, 24, 27),
    foreground=(228, 228, 231),
    normal=[(39, 39, 42), (248, 113, 113), (134, 239, 172), (253, 224, 71), (147, 197, 253), (216, 180, 254), (103, 232, 249), (212, 212, 216)],
    bright=[(82, 82, 91), (252, 165, 165), (187, 247, 208), (254, 240, 138), (191, 219, 254), (233, 213, 255), (165, 243, 252), (250, 250, 250)],
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path("runs/demo"))
    parser.add_argument("--out", type=Path, default=Path("docs/images/demo.svg"))
    parser.add_argument("--features", type=int, default=6)
    parser.add_argument("--contexts", type=int, default=3)
    args = parser.parse_args()
    console = Console(record=True, width=108, force_terminal=True, color_system="truecolor", file=open("/dev/null", "w"))  # noqa: SIM115
    for feature in features_of_run(args.run, args.features):
        console.print(display.feature_card(feature, console.width - 2, args.contexts))
        console.print(Text())
    svg = console.export_svg(title=f"lm-saes show {args.run}", theme=INK)
    svg = re.sub(r"@font-face\s*\{.*?\}", "", svg, flags=re.DOTALL).replace(
        "Fira Code", "ui-monospace, SFMono-Regular, Menlo, Consolas, DejaVu Sans Mono"
    )
    svg = "\n".join(line.rstrip() for line in svg.splitlines() if line.strip()) + "\n"
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(svg, encoding="utf-8")
    print(f"{args.out}: {len(svg) / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
