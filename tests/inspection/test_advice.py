"""The rules of the advice turn where they say, and what they advise is accepted by the configurations."""

from __future__ import annotations

import dataclasses
import tomllib
from typing import Any

import pytest
import torch

from lm_saes.config import ActivationFactoryConfig, InitializerConfig, SAEConfig, TrainerConfig
from lm_saes.inspection.advice import RULES, as_toml, reasons, same_advice
from lm_saes.inspection.inspect import inspect_batches
from lm_saes.inspection.report import Dimensionality, HookPointReport, SpecialToken

PLAIN = inspect_batches([{"h": torch.randn(2000, 20, generator=torch.Generator().manual_seed(0)) + 0.5}], ["h"], tokens=None)["h"]


def changed(**fields: Any) -> HookPointReport:
    return dataclasses.replace(PLAIN, **fields)


def answer(record: HookPointReport, topic: str) -> tuple[dict[str, Any], str]:
    (found,) = (one for one in record.advice if one.topic == topic)
    return found.settings, found.reason


def dims(share: float) -> Dimensionality:
    return Dimensionality(of=100, variance_99=round(100 * share), effective_rank=100 * share)


@pytest.mark.parametrize(
    ("topic", "below", "above", "setting"),
    [
        ("decoder bias", {"mean_share": 0.009}, {"mean_share": 0.011}, {"initializer.bias_init_method": "geometric_median"}),
        (
            "active subspace",
            {"dimensionality": dims(0.76)},
            {"dimensionality": dims(0.74)},
            {"initializer.initialize_W_D_with_active_subspace": True, "initializer.d_active_subspace": "auto"},
        ),
        (
            "outlier filter",
            {},
            {"outlier_tokens": dataclasses.replace(PLAIN.outlier_tokens, count=3, squares_share=0.4)},
            {"activation_factory.outlier_norm_factor": 10.0},
        ),
    ],
)
def test_settings_appear_at_their_threshold(topic: str, below: dict[str, Any], above: dict[str, Any], setting: dict[str, Any]) -> None:
    assert answer(changed(**below), topic)[0] == {}
    assert answer(changed(**above), topic)[0] == setting


def test_a_rank_that_is_low_only_through_outlier_dimensions_needs_no_subspace() -> None:
    settings, reason = answer(changed(dimensionality=dims(0.1), dimensionality_without_outliers=dims(0.9)), "active subspace")
    assert settings == {}
    assert "outlier dimensions" in reason
    assert "90 %" in reason
    assert answer(changed(dimensionality=dims(0.1), dimensionality_without_outliers=dims(0.5)), "active subspace")[0]


@pytest.mark.parametrize(
    ("topic", "calm", "alarming", "words"),
    [
        ("centred pre-activations", {"gamma": 4.9}, {"gamma": 5.1}, "never fire"),
        ("whitening", {"dimensionality": dims(0.03)}, {"dimensionality": dims(0.01)}, "whiten; this version cannot"),
        (
            "normalisation",
            {"norm_quantiles": {"5%": 1.0, "95%": 3.9}},
            {"norm_quantiles": {"5%": 1.0, "95%": 4.1}},
            "token-wise",
        ),
        ("decoder bias", {"median_distance": 0.05}, {"median_distance": 0.2}, "cannot drag along"),
    ],
)
def test_reasons_turn_at_their_threshold(topic: str, calm: dict[str, Any], alarming: dict[str, Any], words: str) -> None:
    assert words not in answer(changed(**calm), topic)[1]
    assert words in answer(changed(**alarming), topic)[1]


def test_what_helps_wide_dictionaries_besides_is_named_where_the_rank_is_low() -> None:
    low, full = (answer(changed(dimensionality=dims(share)), "active subspace")[1] for share in (0.5, 0.9))
    assert 'in dictionaries of 32 D latents or more, trainer.optimizer_class = "sparseadam"' in low
    assert "sparseadam" not in full
    assert TrainerConfig(optimizer_class="sparseadam").optimizer_class == "sparseadam"


def test_the_sink_of_the_special_tokens_is_named() -> None:
    _, reason = answer(changed(special_tokens=(SpecialToken("<s>", 10, 900.0, 90.0), SpecialToken("</s>", 3, 10.0, None))), "special tokens")
    assert "90 ×" in reason
    assert "none" in answer(PLAIN, "special tokens")[1]


def test_activations_that_do_not_vary_get_advice_too() -> None:
    for x in (torch.zeros(30, 4), torch.ones(30, 4)):
        record = inspect_batches([{"h": x}], ["h"], tokens=None)["h"]
        assert len(record.advice) == len(RULES)
        as_toml([record])


EXTREME = {
    "mean_share": 0.9, "gamma": 30.0, "median_distance": 2.0, "dimensionality": dims(0.01), "norm_quantiles": {"5%": 1.0, "95%": 50.0},
    "outlier_tokens": dataclasses.replace(PLAIN.outlier_tokens, count=3, squares_share=0.4), "special_tokens": (SpecialToken("<s>", 10, 900.0, 90.0),),
}  # fmt: skip


@pytest.mark.parametrize("record", [PLAIN, changed(**EXTREME)], ids=["plain", "extreme"])
def test_what_is_pasted_is_toml_that_the_configurations_take_and_a_narrow_terminal_does_not_break(record: HookPointReport) -> None:
    text = as_toml([record])
    assert max(len(line) for line in text.splitlines()) <= 80
    tables = tomllib.loads(text)
    InitializerConfig(**tables["initializer"])
    SAEConfig(hook_point_in="h", d_model=20, expansion_factor=2, **tables["sae"])
    ActivationFactoryConfig(sources=[{"name": "demo"}], hook_points=["h"], batch_size=8, **tables.get("activation_factory", {}))  # pyright: ignore[reportArgumentType]
    assert {f"{section}.{field}": value for section, fields in tables.items() for field, value in fields.items()} == {
        name: value for one in record.advice for name, value in one.settings.items()
    }


def test_every_question_is_answered_with_a_reason_and_a_source() -> None:
    for record in (PLAIN, changed(**EXTREME)):
        text = as_toml([record])
        assert [one.topic for one in record.advice] == [rule.topic for rule in RULES]
        for one in record.advice:
            assert "{" not in one.reason
            assert one.source
            first_words = " ".join(one.reason.split()[:6])
            assert first_words in text.replace("\n#  ", "")


def test_hook_points_with_the_same_settings_share_one_table_and_the_range_of_their_reasons() -> None:
    one, two, other = changed(gamma=0.5), changed(gamma=2.0), changed(dimensionality=dims(0.4))
    assert same_advice([one, other, two]) == [[one, two], [other]]
    answers = [next(found for found in record.advice if found.topic == "centred pre-activations") for record in (one, two)]
    assert "0.5 to 2 times" in reasons(answers)[0]
    assert len(reasons(answers)) == 1
