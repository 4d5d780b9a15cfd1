"""What the terminal shows: the peak always, never wider than asked, and text as it is."""

from __future__ import annotations

import io
import unicodedata

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from rich.console import Console

from lm_saes import display
from lm_saes.analysis.features import Context, Feature

TOKENS = st.lists(st.text(max_size=12), min_size=1, max_size=12)


def printed(renderable, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None, highlight=False)
    console.print(renderable)
    return console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]  # a StringIO


@settings(max_examples=200, deadline=None, derandomize=True)
@given(texts=TOKENS, width=st.integers(4, 60), marked=st.booleans(), data=st.data())
def test_a_context_holds_its_peak_and_fits(texts, width, marked, data):
    peak = data.draw(st.integers(0, len(texts) - 1))
    texts[peak] = "PEAK" if width >= 6 else "é"
    line = display.context_line(texts, [1.0] * len(texts), peak, 1.0, width, marked)
    assert texts[peak] in line.plain
    assert line.cell_len <= width
    assert "\n" not in line.plain


@pytest.mark.parametrize("width", [1, 2, 5])
def test_a_peak_wider_than_the_line_is_cut(width):
    assert display.context_line(["語" * 40], [1.0], 0, 1.0, width).cell_len <= width


def test_a_context_takes_two_tokens_before_the_peak_for_one_after():
    line = display.context_line(list("abcdefghi"), [0.0] * 9, 4, 1.0, 4)
    assert line.plain == "cdef"
    assert display.context_line(list("abc"), [0.0] * 3, 0, 1.0, 80).plain == "abc"


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text(max_size=30))
def test_nothing_that_a_terminal_obeys_is_printed(text):
    shown = display.visible(text)
    assert not {unicodedata.category(character) for character in shown} & {"Cc", "Cf", "Cs", "Zl", "Zp"}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("[bold]x[/bold]", "[bold]x[/bold]"),
        (")\n", ")↵ "),
        ("\n\n    return", "↵ return"),
        ("\t", "→"),
        ("x        =", "x  ="),
        ("\x1b[31m", "␛[31m"),
        ("\u202e", "�"),
        ("東京", "東京"),
    ],
)
def test_text_is_shown_as_it_is(text, shown):
    line = display.context_line([text], [1.0], 0, 1.0, 40)
    assert line.plain == shown
    assert shown.rstrip() in printed(line)


def test_warmth_follows_the_activation_and_silent_tokens_are_cold():
    line = display.context_line(["a", "b", "c"], [0.0, 0.5, 2.0], 1, 1.0, 40)
    silent, warm, hottest = (str(span.style) for span in line.spans)
    assert silent == "grey62"
    assert "rgb(255,176,0)" in hottest or "#ffb000" in hottest
    assert warm != hottest


def test_a_card_shows_as_many_contexts_as_asked_and_says_when_there_is_none():
    context = Context([1, 2], ["left", " peak"], [0.0, 2.0], 1)
    card = printed(display.feature_card(Feature(7, 0.0125, 2.0, [context] * 3), 60, 2, marked=True))
    assert card.count("left« peak»") == 2
    assert "feature 7   fires on 1.250% of tokens   max 2.00" in card
    assert "did not fire" in printed(display.feature_card(Feature(7, 0.0, 0.0, []), 60))


def test_a_table_of_metrics_shows_what_is_undefined_as_a_dash_and_leaves_out_what_nobody_has():
    table = printed(display.evaluation_table({"sae": {"metrics/l0": 31.5, "metrics/delta_ce": None}, "pca-4": {"metrics/delta_ce": 0.25}}))
    rows = {line.split("  ")[0]: line.split()[-2:] for line in table.splitlines()}
    assert rows["L0"] == ["31.50", "–"]
    assert rows["ΔCE (nats per token)"] == ["–", "+0.2500"]
    assert "cosine" not in table


def test_a_summary_names_the_model_the_dictionary_and_the_text():
    settings = {
        "sae": {"hook_point_in": "a", "hook_point_out": "b", "d_model": 8, "expansion_factor": 4, "act_fn": "topk", "top_k": 3},
        "trainer": {"total_training_tokens": 12_000},
        "model": {"model_name": "[red]gpt[/red]"},
        "datasets": {"web": {"dataset_name_or_path": "c4"}, "unused": {"dataset_name_or_path": "x"}},
        "activation_factory": {"sources": [{"name": "web"}, {"name": "demo"}]},
    }
    rows = dict(display.summary_rows(settings))
    assert rows["dictionary"] == "transcoder of 32 latents over 8 dimensions, topk, k = 3"
    assert (rows["hook point"], rows["text"], rows["tokens"]) == ("a → b", "web (c4), demo", "12,000")
    assert "[red]gpt[/red]" in printed(display.rows_table(list(rows.items())))
    of_disk = {"sources": [{"name": "web", "path": "caches/web"}, {"name": "own", "path": {"a": "one", "b": "two"}}]}
    rows = dict(display.summary_rows({**settings, "model": None, "activation_factory": of_disk}))
    assert "model" not in rows
    assert "text" not in rows
    assert rows["activations"] == "web (caches/web), own (one, two)"
    tuned = dict(display.summary_rows({**settings, "sae": {"pretrained_name_or_path": "runs/x"}}))
    assert tuned["dictionary"] == "fine-tuned from runs/x"


def test_a_file_that_holds_no_object_is_none(tmp_path):
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "bad.json").write_bytes(b"\xff")
    assert [display.read_json(tmp_path / name) for name in ("list.json", "bad.json", "missing.json")] == [None, None, None]


def test_wide_characters_count_as_the_two_cells_that_they_take():
    assert display.context_line(["語", "語", "語"], [1.0] * 3, 2, 1.0, 5).plain == "語語"


@pytest.mark.parametrize(
    ("largest", "shown"), [(143.2149, "max 143.21"), (1.0, "max 1.00"), (0.10234, "max 0.102"), (3e-5, "max 3e-05"), (0.0, "max 0.00")]
)
def test_small_activations_keep_their_digits(largest, shown):
    assert shown in printed(display.feature_card(Feature(7, 0.0125, largest, []), 60))
