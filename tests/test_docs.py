"""Every Python block of the README and the docs runs, page by page, each page's blocks in one namespace and in an empty folder.

What a test machine cannot have is swapped here and not in the text: a model on the hub becomes a random local one of the same width and hook points,
a dataset on the hub becomes a few local documents, and runs are shortened.
"""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest
import torch

from lm_saes.cli import recipe
from lm_saes.config import TrainSAESettings
from lm_saes.config.base import merge, validated
from lm_saes.records import evaluated_on
from tests.lm.tiny_models import save_tiny

ROOT = Path(__file__).parent.parent
PAGES = [path for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))] if "```python" in path.read_text(encoding="utf-8")]
SHORTENED = [
    (r"total_training_tokens=[\d_]+(?! \*)", "total_training_tokens=8_192"),
    (r"eval=True", "eval=True, eval_config={'total_eval_tokens': 2_000}"),
]


def blocks(path: Path) -> list[tuple[int, str]]:
    text = path.read_text(encoding="utf-8")
    return [(text[: match.start()].count("\n") + 2, match.group(1)) for match in re.finditer(r"```python\n(.*?)```", text, re.DOTALL)]


def local_pythia(folder: Path) -> Path:
    """A random GPT-NeoX of Pythia-160m's width and depth, thin everywhere else."""
    return save_tiny(
        "gpt_neox", folder, hidden_size=768, num_hidden_layers=12, intermediate_size=16, num_attention_heads=12, max_position_embeddings=2048
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_block_runs(page, tmp_path, monkeypatch, short_demo_run):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/demo").symlink_to(short_demo_run)
    (tmp_path / "my_text.jsonl").write_text("\n".join(json.dumps({"text": f"Document {i}. " + "Some words to read. " * 40}) for i in range(400)))
    namespace: dict = {}
    for line, code in blocks(page):
        for pattern, replacement in SHORTENED:
            code = re.sub(pattern, replacement, code)
        if "EleutherAI/pythia-160m" in code:
            code = code.replace("EleutherAI/pythia-160m", str(local_pythia(tmp_path / "pythia")))
            code = re.sub(r'dataset_name_or_path="[^"]+"', f'dataset_name_or_path="{tmp_path / "my_text.jsonl"}"', code)
            code = code.replace(", streaming=True", "")
            code = re.sub(r"\bbatch_size=[\d_]+", "batch_size=256", code)
            code = re.sub(r"model_batch_size=[\d_]+", "model_batch_size=2", code)
            code = re.sub(r"context_size=[\d_]+", "context_size=128", code)
            code = re.sub(r"buffer_size=[\d_]+", "buffer_size=1024", code)
            code = re.sub(r"expansion_factor=\d+", "expansion_factor=1", code)
        torch.manual_seed(0)
        exec(compile("\n" * (line - 1) + code, str(page), "exec"), namespace)


def test_the_settings_for_text_of_ones_own_are_settings_and_hold_some_out():
    text = (ROOT / "docs/quickstart.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    settings = validated(TrainSAESettings, merge(tomllib.loads(recipe("demo").read_text(encoding="utf-8")), tomllib.loads(block)))
    assert [source.name for source in settings.activation_factory.sources] == ["mine"]
    assert evaluated_on(settings) == "held-out text"


def test_the_readme_has_what_it_promises():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for needed in ("make demo", "make test", "OpenMOSS", "EleutherAI/pythia-160m", "docs/images/"):
        assert needed in text
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (ROOT / link).exists(), f"README links to {link}, which is not there"


def test_links_between_docs_hold():
    for page in (ROOT / "docs").rglob("*.md"):
        for link in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.name} links to {link}, which is not there"


def test_every_config_field_is_documented_where_it_stands():
    """A field has a line of its own under it, or its name says everything and the API page of upstream explains it (Weights & Biases)."""
    import ast

    for path in sorted((ROOT / "src/lm_saes/config").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ClassDef) or node.name in {"WandbConfig", "TrackioConfig"}:
                continue
            for field, following in zip(node.body, [*node.body[1:], None], strict=True):
                if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and not field.target.id.startswith("_"):
                    documented = (
                        isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant) and isinstance(following.value.value, str)
                    )
                    assert documented, f"{path.name}: {node.name}.{field.target.id} has no line that says what it is"
