"""Which settings follow from an inspection. The rules stand in one table, `RULES`, each with where it comes from.

Every rule answers one question a user has before training. Its answer holds settings to paste (or none, where the defaults are right), one
line that says why, and the number that decided. Thresholds are kept here, under the names that the rules use.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from lm_saes.inspection.report import HookPointReport

MEAN_MATTERS = 0.01
"""Share of the second moment below which a mean is not worth a decoder bias that starts there."""
MEDIAN_DIFFERS = 0.1
"""Distance of geometric median and mean, in standard deviations, from which on it matters which one is taken."""
CENTRE_GAMMA = 5.0
"""gamma from which on centring decides whether latents live."""
LOW_RANK = 0.75
"""Share of the dimensions that hold 99 % of the variance, below which activations count as low-rank: half-way between the 60 % of attention
outputs and the 90 % of MLP outputs and the residual stream that arXiv 2508.16929 reports."""
COLLAPSED = 0.02
"""Effective rank over the width below which nearly all variance lies in a handful of directions."""
WIDE_NORMS = 4.0
"""95 % quantile of the norms over their 5 % quantile: above, the longest tokens weigh more than 16 times the shortest in the squared error."""


class Answer(NamedTuple):
    """What one rule says about one hook point."""

    settings: dict[str, Any]
    """Dotted names and values; empty where nothing has to be set."""
    reason: str
    """One line, with {} where the number goes, if it goes anywhere."""
    measured: float


@dataclass(frozen=True)
class Rule:
    """A question, how it is answered, and where the rule comes from."""

    topic: str
    unit: str
    """"%" or "": how the measured number is written."""
    source: str
    judge: Callable[[HookPointReport], Answer]


@dataclass(frozen=True)
class Advice:
    """A rule's answer for one hook point."""

    topic: str
    settings: dict[str, Any]
    template: str
    measured: float
    unit: str
    source: str

    @property
    def reason(self) -> str:
        """Why, in one line."""
        return reasons([self])[0]

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {"topic": self.topic, "settings": self.settings, "reason": self.reason, "measured": self.measured, "source": self.source}


def advise(report: HookPointReport) -> tuple[Advice, ...]:
    """The answers of all rules, in the order of the table."""
    return tuple(Advice(rule.topic, *rule.judge(report), rule.unit, rule.source) for rule in RULES)


def reasons(answers: Sequence[Advice]) -> list[str]:
    """The reasons of one rule for several hook points, each once, with the range of what was measured."""
    lines = []
    for template in dict.fromkeys(answer.template for answer in answers):
        values, unit = [answer.measured for answer in answers if answer.template == template], answers[0].unit
        low, high = _number(min(values), unit), _number(max(values), unit)
        span = low if low == high else f"{low} to {high}"
        lines.append(template.format(f"{span} %" if unit == "%" else span))
    return lines


def _number(value: float, unit: str) -> str:
    scaled = 100 * value if unit == "%" else value
    return f"{scaled:.2g}" if abs(scaled) < 10 else f"{scaled:,.0f}"


# ----------------------------------------------------------------------------------------------------------------- rules


def _decoder_bias(report: HookPointReport) -> Answer:
    share, distance = report.mean_share or 0.0, report.median_distance or 0.0
    if share < MEAN_MATTERS:
        return Answer({}, "zero, the default, will do; the mean holds {} of the second moment", share)
    reason = "the mean holds {} of the second moment"
    if distance >= MEDIAN_DIFFERS:
        reason += ", and the geometric median, which long vectors cannot drag along, lies elsewhere"
    return Answer({"initializer.bias_init_method": "geometric_median"}, reason, share)


def _encoder_bias(report: HookPointReport) -> Answer:
    if report.gamma is None:
        return Answer({}, "the activations do not vary", 0.0)
    if report.gamma >= CENTRE_GAMMA:
        reason = "‖mean‖ is {} times the spread (γ): without it, latents that point away from the mean never fire"
    else:
        reason = f"‖mean‖ is {{}} times the spread (γ); below {CENTRE_GAMMA:g} it is a precaution that costs nothing"
    return Answer({"initializer.init_encoder_bias_with_mean_hidden_pre": True}, reason, report.gamma)


def _active_subspace(report: HookPointReport) -> Answer:
    everything, inner = report.dimensionality, report.dimensionality_without_outliers
    if everything.variance_99 == 0:
        return Answer({}, "the activations do not vary", 0.0)
    if everything.variance_99_share >= LOW_RANK:
        return Answer({}, "not needed, 99 % of the variance takes {} of the dimensions", everything.variance_99_share)
    if inner is not None and inner.variance_99_share >= LOW_RANK:
        return Answer(
            {}, "no, outlier dimensions hide a full rank; without them 99 % of the variance takes {} of the dimensions", inner.variance_99_share
        )
    return Answer(
        {"initializer.initialize_W_D_with_active_subspace": True, "initializer.d_active_subspace": "auto"},
        '99 % of the variance lies in {} of the dimensions; latents that start outside tend to die. "auto" is the effective rank (a smaller '
        "subspace was better at some hook points and worse at others); in dictionaries of 32 D latents or more, trainer.optimizer_class = "
        '"sparseadam" keeps more of them alive besides',
        everything.variance_99_share,
    )


def _whitening(report: HookPointReport) -> Answer:
    share = report.dimensionality.effective_rank_share
    if share < COLLAPSED:
        return Answer({}, "nearly all variance lies in a handful of directions (effective rank {} of the width): whiten; this version cannot", share)
    return Answer({}, "not needed, the effective rank is {} of the width", share)


def _normalisation(report: HookPointReport) -> Answer:
    low, high = report.norm_quantiles["5%"], report.norm_quantiles["95%"]
    spread = high / low if low > 0 else 1.0
    reason = "norms lie within a factor of {} (5 % to 95 %)"
    if spread > WIDE_NORMS:
        reason = 'norms differ by a factor of {} (5 % to 95 %), so long vectors rule the loss; "token-wise" weighs all alike but cannot be folded'
    return Answer({"sae.norm_activation": "dataset-wise"}, reason, spread)


def _outlier_filter(report: HookPointReport) -> Answer:
    outliers = report.outlier_tokens
    if outliers.count == 0:
        return Answer({}, f"the default is right, no norm exceeds {outliers.factor:g} × the median", 0.0)
    reason = f"keep the filter on: tokens above {outliers.factor:g} × the median norm hold {{}} of Σ‖x‖²"
    return Answer({"activation_factory.outlier_norm_factor": outliers.factor}, reason, outliers.squares_share)


def _special_tokens(report: HookPointReport) -> Answer:
    ratios = [token.ratio for token in report.special_tokens if token.ratio is not None]
    if not ratios:
        return Answer({}, "this text has none", 0.0)
    return Answer({}, "dropped by default (ignore_token_ids); the mean norm of the longest is {} × the median of the others", max(ratios))


_FEATURE_DEATH = "Simon, Adams and Zou, arXiv 2605.31518"
RULES: tuple[Rule, ...] = (
    Rule("decoder bias", "%", "Gao et al., arXiv 2406.04093 (b_D starts at the geometric median); thresholds are ours", _decoder_bias),
    Rule("centred pre-activations", "", f"{_FEATURE_DEATH} (γ predicts the latents dead at the start, centring revives them); 5 is second-hand", _encoder_bias),
    Rule("active subspace", "%", "Wang et al., arXiv 2508.16929 (attention outputs near 60 %, others near 90 %); the threshold lies between; benchmarks/active_subspace", _active_subspace),
    Rule("whitening", "%", f"{_FEATURE_DEATH} (centring is not enough where few directions hold all variance); 2 % is second-hand", _whitening),
    Rule("normalisation", "", 'docs/concepts.md, "Two spaces, and folding"; the spread of 4 is ours', _normalisation),
    Rule("outlier filter", "%", "Sun et al., arXiv 2402.17762 (massive activations); the factor is that of the stream's filter", _outlier_filter),
    Rule("special tokens", "", "Sun et al., arXiv 2402.17762 (they sit on starting and separating tokens)", _special_tokens),
)  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------- settings


def same_advice(reports: Iterable[HookPointReport]) -> list[list[HookPointReport]]:
    """Hook points grouped by the settings that are advised, in the order in which they came."""
    groups: dict[str, list[HookPointReport]] = {}
    for report in reports:
        groups.setdefault(json.dumps([answer.settings for answer in report.advice]), []).append(report)
    return list(groups.values())


def as_toml(reports: Sequence[HookPointReport]) -> str:
    """The settings for hook points of one group of `same_advice`, to paste into a configuration file: each reason is a comment above its
    setting; questions that need no setting are answered in comments at the end."""
    sections: dict[str, list[str]] = {}
    remarks = []
    for answers in zip(*(report.advice for report in reports), strict=True):
        lines = [line for reason in reasons(answers) for line in _comment(reason)]
        if not answers[0].settings:
            remarks += [line for reason in reasons(answers) for line in _comment(f"{answers[0].topic}: {reason}")]
        for name, value in answers[0].settings.items():
            section, _, field = name.partition(".")
            sections.setdefault(section, []).extend([*lines, f"{field} = {json.dumps(value)}"])
            lines = []
    blocks = ["\n".join([f"[{section}]", *lines]) for section, lines in sorted(sections.items())]
    return "\n\n".join([*blocks, "\n".join(remarks)] if remarks else blocks) + "\n"


def _comment(text: str) -> list[str]:
    """A comment that a terminal of 80 columns does not break: what is pasted must stay TOML."""
    return textwrap.wrap(text, 78, initial_indent="# ", subsequent_indent="#   ", break_long_words=False)
