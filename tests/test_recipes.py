"""The recipes that the package carries."""

from __future__ import annotations

from pathlib import Path

import pytest

from lm_saes.cli import recipe
from lm_saes.config import TrainSAESettings, load_settings
from lm_saes.config.synthetic import SyntheticBenchmarkConfig
from lm_saes.evaluation.synthetic.protocol import KINDS

RECIPES = sorted(path.stem for path in (Path(__file__).parent.parent / "recipes").glob("*.toml"))


def settings(name: str) -> TrainSAESettings:
    return load_settings(TrainSAESettings, recipe(name), {})


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_found_by_its_name_and_has_a_folder_of_its_own(name):
    assert settings(name).sae_name == name
    assert settings(name).trainer.exp_result_path == f"runs/{name}"


def test_the_matryoshka_recipe_is_what_was_chosen_on_known_features():
    kind, ours, demo = KINDS["matryoshka-annealed"], settings("demo-matryoshka"), settings("demo")
    sae, trainer = ours.sae, ours.trainer
    assert kind.annealed_k is not None
    assert sae.act_fn == kind.sae["act_fn"]
    assert sae.matryoshka is not None
    assert sae.matryoshka.widths == tuple(sae.d_sae // share for share in kind.nested)
    assert trainer.initial_k == pytest.approx(kind.annealed_k[0] / kind.annealed_k[1] * sae.top_k, rel=0.01)
    assert trainer.k_warmup_steps == 0.8
    assert trainer.lr == pytest.approx(kind.lr * SyntheticBenchmarkConfig().lr)
    changed = {"initial_k", "k_warmup_steps", "exp_result_path"}
    assert trainer.model_dump(exclude=changed) == demo.trainer.model_dump(exclude=changed), "everything else is the demo's"
