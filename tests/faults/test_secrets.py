"""Tokens and keys reach no file and no output: a training, a sweep, a cache and errors, with sentinels in the environment."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from lm_saes import hub
from lm_saes.config import DatasetConfig, LanguageModelConfig, TrainSAESettings
from lm_saes.config.base import validated
from lm_saes.errors import LanguageModelError, LmSaesError
from tests.faults.terminal import HOOK, Terminal, generation, make_material, settings_file, terminal, training

SENTINELS = {
    "HF_TOKEN": "hf_SentinelOfTheHubABCDEFGHIJKLMNOPQRST",
    "HUGGING_FACE_HUB_TOKEN": "hf_SentinelOfTheHubOLDEFGHIJKLMNOPQRST",
    "WANDB_API_KEY": "0123456789abcdef5e0715e15e0715e1deadbeef",
}


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_material(tmp_path_factory.mktemp("material"))


@pytest.fixture
def lm_saes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Terminal:
    for name, value in SENTINELS.items():
        monkeypatch.setenv(name, value)
    return terminal(monkeypatch, capsys)


def assert_no_secret(*texts: str | bytes) -> None:
    for text in texts:
        data = text.encode() if isinstance(text, str) else text
        for name, value in SENTINELS.items():
            assert value.encode() not in data, name


def assert_none_below(folder: Path) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 3
    for path in files:
        assert_no_secret(path.read_bytes(), str(path))


def test_a_training_its_evaluation_and_its_errors(material: Path, lm_saes: Terminal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    wandb = ModuleType("wandb")
    run = SimpleNamespace(log=lambda *args, **kwargs: told.append((args, kwargs)), finish=lambda: None)
    wandb.init = lambda **kwargs: (told.append(kwargs), run)[1]  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    folder = tmp_path / "run"
    path = settings_file(tmp_path, training(material, folder, wandb={"wandb_project": "x"}, eval=True, eval_config={"total_eval_tokens": 200}))
    said = [
        lm_saes("train", path),
        lm_saes("train", path),
        lm_saes("evaluate", folder),
        lm_saes("show", folder, "--n", 1),
        lm_saes("train", path, "--dry-run"),
    ]
    assert [one.code for one in said[:4]] == [0, 2, 0, 0]
    assert told
    assert_no_secret(*(one.out + one.error for one in said), repr(told))
    assert_none_below(folder)


def test_a_sweep_and_a_cache(material: Path, lm_saes: Terminal, tmp_path: Path) -> None:
    path = settings_file(tmp_path, training(material, tmp_path / "sweep"))
    said = [lm_saes("sweep", path, "--grid", "trainer.lr=1e-3,1e-4")]
    path = settings_file(tmp_path, generation(material, tmp_path / "cache"))
    said += [lm_saes("generate", path), lm_saes("cache", "show", tmp_path / "cache")]
    assert [one.code for one in said] == [0, 0, 0]
    assert_no_secret(*(one.out + one.error for one in said))
    assert_none_below(tmp_path)


@pytest.mark.parametrize(
    "error",
    [
        ValueError(f"Illegal header value b'Bearer {SENTINELS['HF_TOKEN']}\\n'"),
        OSError(f"403 for https://user:{SENTINELS['WANDB_API_KEY']}@host/model"),
        RuntimeError("401 for https://cdn.host/x?Expires=1&Signature=abcdef~gh"),
    ],
)
def test_errors_of_the_hub(error: Exception, lm_saes: Terminal) -> None:
    said = str(hub.explain(error, "somebody/model", "the model"))
    assert_no_secret(said)
    assert "abcdef~gh" not in said
    assert "***" in said


def test_credentials_in_settings_are_refused_and_not_repeated(material: Path, lm_saes: Terminal, tmp_path: Path) -> None:
    """Settings are written to the run's folder, so a key in them would be there too."""
    for value in (SENTINELS["HF_TOKEN"], f"https://me:{SENTINELS['WANDB_API_KEY']}@host/text.jsonl"):
        for name in ("model__model_name", "datasets__text__dataset_name_or_path", "sae_name", "sae__hook_point_in"):
            table = training(material, tmp_path / "run", **{name: value})
            line = lm_saes("train", settings_file(tmp_path, table)).line
            assert line == (
                f"{name.replace('__', '.')} holds a key or a password, and settings are written to the run's folder; pass it as HF_TOKEN or WANDB_API_KEY "
                "in the environment"
            )
            with pytest.raises(LmSaesError) as caught:
                TrainSAESettings.model_validate(table)
            assert_no_secret(str(caught.value))
    said = lm_saes("train", settings_file(tmp_path, training(material, tmp_path / "run")), "--sae_name", SENTINELS["HF_TOKEN"])
    assert_no_secret(said.line)
    unknown = lm_saes("train", settings_file(tmp_path, {**training(material, tmp_path / "run"), "wandb_api_key": SENTINELS["WANDB_API_KEY"]}))
    assert unknown.line.endswith("TrainSAESettings has no field 'wandb_api_key'")
    assert not (tmp_path / "run").exists()


def test_names_that_only_look_like_addresses_are_taken() -> None:
    for name in ("org/model", "./a@b", "/data/user@host/model", "https://host/x", "hf_model"):
        assert validated(LanguageModelConfig, {"model_name": name}).model_name == name
        assert validated(DatasetConfig, {"dataset_name_or_path": name}).dataset_name_or_path == name


def test_a_hub_that_is_not_reached_says_nothing_of_the_token(lm_saes: Terminal) -> None:
    with pytest.raises(LanguageModelError) as caught:
        hub.fetch("somebody/nothing", ["config.json"], "the dictionary", LanguageModelError, token=SENTINELS["HF_TOKEN"])
    assert_no_secret(str(caught.value), repr(caught.value.__cause__))
    assert HOOK not in str(caught.value)
