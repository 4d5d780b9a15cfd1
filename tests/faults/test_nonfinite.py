"""NaN and infinity in training: the run stops, or passes over the batch by setting. Never silently, and the batch is kept."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lm_saes.config import TrainerConfig
from lm_saes.errors import NonFiniteError
from lm_saes.training.nonfinite import MOST_IN_A_ROW, MOST_KEPT, NonFiniteWatch, finite_batches
from lm_saes.training.trainer import Trainer
from tests.training.synthetic import HOOK, SyntheticStream, make_dictionary
from tests.training.test_trainer import Recorder


@pytest.fixture
def trainer_config(tmp_path: Path) -> Callable[..., TrainerConfig]:
    """A configuration for `steps` steps of 64 tokens, in a folder of its own."""
    return lambda steps, folder="run", **options: TrainerConfig(total_training_tokens=64 * steps, exp_result_path=str(tmp_path / folder), **options)


BAD = [float("nan"), float("inf"), -float("inf")]


class Faulty(SyntheticStream):
    """Batches (counted from 1) in `bad` hold a number that is not finite."""

    def __init__(self, bad: Any, number: float = math.nan, **options: Any) -> None:
        super().__init__(**options)
        self.bad, self.number = set(bad), number

    def __next__(self) -> dict[str, Any]:
        batch = super().__next__()
        if self.position in self.bad:
            batch[HOOK][3, 2] = self.number
        return batch


class Without(SyntheticStream):
    """The same batches, but for those in `bad`."""

    def __init__(self, bad: Any) -> None:
        super().__init__()
        self.bad = set(bad)

    def __next__(self) -> dict[str, Any]:
        while self.position + 1 in self.bad:
            self.position += 1
        return super().__next__()


def lines(cfg: TrainerConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(cfg.exp_result_path) / "metrics.jsonl").read_text().splitlines()]


def kept(cfg: TrainerConfig) -> list[str]:
    return sorted(path.name for path in Path(cfg.exp_result_path).glob("nonfinite_*"))


def constant(**options: Any) -> dict[str, Any]:
    """Schedules that do not depend on the number of the step, so that a run that passes over batches can be compared with one that never saw them."""
    return {
        "lr_scheduler_name": "constant", "l1_coefficient_warmup_steps": 0, "n_checkpoints": 0,
        "log_frequency": 1, **options,
    }  # fmt: skip


@pytest.mark.parametrize("number", BAD)
@pytest.mark.parametrize("act_fn", ["relu", "jumprelu", "topk", "batchtopk"])
@pytest.mark.filterwarnings("ignore:act_fn .* without a sparsity loss:UserWarning")
def test_a_skipped_batch_leaves_no_trace_but_its_count(act_fn: str, number: float, trainer_config: Any) -> None:
    """Weights, statistics, thresholds and token counts are those of a run on a stream without the batch."""
    bad = {1, 4, 5}
    cfg, other = trainer_config(12, **constant(non_finite="skip")), trainer_config(9, "other", **constant())
    sae, clean = make_dictionary(act_fn, norm_activation="batch-wise"), make_dictionary(act_fn, norm_activation="batch-wise")
    seen = Recorder()
    Trainer(cfg, loggers=[seen]).fit(sae, Faulty(bad, number))
    Trainer(other).fit(clean, Without(bad))
    assert all(torch.equal(value, clean.state_dict()[name]) for name, value in sae.state_dict().items())
    assert [row["details/n_skipped_batches"] for row in lines(cfg)] == [1, 1, 1, 2, 3, 3, 3, 3, 3, 3, 3, 3]
    assert lines(cfg)[-1]["details/n_training_tokens"] == 9 * 64
    assert ["losses/overall_loss" in row for row in lines(cfg)] == [step not in bad for step in range(1, 13)]
    assert lines(cfg)[-1]["losses/overall_loss"] == lines(other)[-1]["losses/overall_loss"]
    assert kept(cfg) == [f"nonfinite_step_{step}.safetensors" for step in sorted(bad)]
    path = Path(cfg.exp_result_path) / "nonfinite_step_4.safetensors"
    assert not torch.isfinite(load_file(path)[HOOK]).all()
    said = f"step 4: NaN or infinity in the activations at {HOOK}; the batch is skipped, 2 so far, and in {path}"
    assert [text for text in seen.messages if "skipped" in text][1] == said


def test_stopping_is_the_default_and_names_the_batch(trainer_config: Any) -> None:
    cfg = trainer_config(10, n_checkpoints=10, check_point_save_mode="linear")
    with pytest.raises(NonFiniteError) as caught:
        Trainer(cfg).fit(make_dictionary(), Faulty({4}))
    path = Path(cfg.exp_result_path) / "nonfinite_step_4.safetensors"
    assert str(caught.value) == (
        f"step 4: NaN or infinity in the activations at {HOOK}; the weights are those before this step, the batch is in {path}; "
        'remove them from the stream, run the language model in float32 or bfloat16, or set non_finite = "skip"'
    )
    assert json.loads((Path(cfg.exp_result_path) / "failure.json").read_text())["step"] == 3
    Trainer(cfg.replace(non_finite="skip"), resume=True, allow_changes=["non_finite"]).fit(make_dictionary(), Faulty({4}))
    assert lines(cfg)[-1]["step"] == 10


@pytest.mark.parametrize("stopped_at", [2, 4, 5, 6, 9])
def test_resuming_while_skipping_is_exact(stopped_at: int, trainer_config: Any) -> None:
    bad = {3, 4, 5, 9}
    options = {"non_finite": "skip", "n_checkpoints": 12, "check_point_save_mode": "linear", "log_frequency": 1}
    whole, cut = trainer_config(12, "whole", **options), trainer_config(12, "cut", **options)
    once, again = make_dictionary("batchtopk"), make_dictionary("batchtopk")
    Trainer(whole).fit(once, Faulty(bad))

    class Killed(Faulty):
        def __next__(self) -> dict[str, Any]:
            if self.position == stopped_at:
                raise SystemExit
            return super().__next__()

    with pytest.raises(SystemExit):
        Trainer(cut).fit(again, Killed(bad))
    resumed = make_dictionary("batchtopk")
    Trainer(cut, resume=True).fit(resumed, Faulty(bad))
    assert all(torch.equal(value, once.state_dict()[name]) for name, value in resumed.state_dict().items())
    assert kept(cut) == kept(whole)
    last = "checkpoints/step_12/optimizer.safetensors"
    ours, theirs = load_file(Path(whole.exp_result_path) / last), load_file(Path(cut.exp_result_path) / last)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours if not name.startswith("random/"))

    def timeless(cfg: TrainerConfig) -> list[dict[str, Any]]:
        return [{name: value for name, value in row.items() if not name.startswith("time/")} for row in lines(cfg)]

    assert timeless(whole) == timeless(cut)


def test_the_batches_that_are_kept_are_bounded_and_every_doubling_is_said(trainer_config: Any) -> None:
    bad = set(range(2, 80, 2))  # 39 of them
    cfg, seen = trainer_config(80, **constant(non_finite="skip")), Recorder()
    Trainer(cfg, loggers=[seen]).fit(make_dictionary(), Faulty(bad))
    assert len(kept(cfg)) == MOST_KEPT
    said = [text for text in seen.messages if "is skipped" in text]
    assert [int(text.split("skipped, ")[1].split()[0]) for text in said] == [1, 2, 3, 4, 5, 6, 7, 8, 16, 32]
    assert said[-1].endswith("32 so far, and not saved (8 others are)")
    assert lines(cfg)[-1]["details/n_skipped_batches"] == len(bad)


def test_too_many_in_a_row_stop_the_run(trainer_config: Any) -> None:
    cfg, sae = trainer_config(60, **constant(non_finite="skip")), make_dictionary()
    with pytest.raises(NonFiniteError, match=rf"step {MOST_IN_A_ROW + 11}: .*as in the {MOST_IN_A_ROW} batches before it, which were skipped"):
        Trainer(cfg).fit(sae, Faulty(set(range(11, 61))))
    assert all(torch.isfinite(value).all() for value in sae.state_dict().values())
    reached = trainer_config(60, "reached", **constant(non_finite="skip"))
    Trainer(reached).fit(make_dictionary(), Faulty(set(range(11, 11 + MOST_IN_A_ROW))))


def test_a_skipped_step_does_not_keep_the_controller_from_starting(trainer_config: Any) -> None:
    options = constant(non_finite="skip", sparsity_loss_type="tanh", target_l0=3.0)
    cfg, sae = trainer_config(40, **options), make_dictionary("relu")
    Trainer(cfg).fit(sae, Faulty({1}))
    coefficients = [row["details/l1_coefficient"] for row in lines(cfg)]
    assert len(set(coefficients[2:])) > 10


def test_gradients_that_are_not_finite_are_skipped_too(trainer_config: Any) -> None:
    cfg, sae = trainer_config(6, **constant(non_finite="skip")), make_dictionary()
    steps = iter(range(1, 100))
    sae.W_D.register_hook(lambda gradient: gradient * (math.inf if next(steps) == 3 else 1.0))  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
    seen = Recorder()
    Trainer(cfg, loggers=[seen]).fit(sae, SyntheticStream())
    assert any("step 3: NaN or infinity in the gradient of W_D; the batch is skipped" in text for text in seen.messages)
    assert all(torch.isfinite(value).all() for value in sae.state_dict().values())


def test_a_full_folder_of_batches_still_lets_the_same_step_be_written_again(tmp_path: Path) -> None:
    watch = NonFiniteWatch(tmp_path, "skip")
    for step in range(1, MOST_KEPT + 3):
        watch.check(step, {"x": torch.full((2,), math.nan)}, ["the loss"], torch.tensor([math.nan]))
    assert len(list(tmp_path.iterdir())) == MOST_KEPT
    again = NonFiniteWatch(tmp_path, "skip")
    assert not again.check(3, {"x": torch.full((5,), math.nan)}, ["the loss"], torch.tensor([math.nan]))
    assert load_file(tmp_path / "nonfinite_step_3.safetensors")["x"].shape == (5,)


def test_hook_points_that_share_memory_are_saved_too(tmp_path: Path) -> None:
    x = torch.full((2,), math.nan)
    with pytest.raises(NonFiniteError, match="the batch is in"):
        NonFiniteWatch(tmp_path).check(1, {"a": x, "b": x}, ["the loss"], torch.tensor([math.nan]))
    assert set(load_file(tmp_path / "nonfinite_step_1.safetensors")) == {"a", "b"}


def test_initialisation_passes_over_such_batches_where_the_run_does() -> None:
    said: list[str] = []
    stream = finite_batches(Faulty({1, 3}), [HOOK], said.append)
    assert all(torch.isfinite(next(stream)[HOOK]).all() for _ in range(5))
    assert len(said) == 2
    assert said[0] == f"initialisation: NaN or infinity in the activations at {HOOK}; the batch is skipped, 1 so far"
    masked = Faulty({1})
    first = next(masked)
    first["mask"][3] = False
    assert next(finite_batches([first], [HOOK], said.append)) is first
    with pytest.raises(NonFiniteError, match=f"{MOST_IN_A_ROW + 1} batches in a row"):
        next(finite_batches(Faulty(range(1, 1000)), [HOOK], said.append))


def test_with_scaled_gradients_a_skipped_batch_leaves_the_scale_alone(trainer_config: Any) -> None:
    """float16: the scaler sees neither the gradients nor an overflow, and takes the next step."""
    cfg, sae = trainer_config(8, **constant(non_finite="skip", amp_dtype="float16")), make_dictionary()
    trainer = Trainer(cfg.replace(n_checkpoints=1))
    trainer.fit(sae, Faulty({2, 3}))
    state = json.loads((Path(cfg.exp_result_path) / "checkpoints" / "step_8" / "state.json").read_text())
    other = trainer_config(6, "other", **constant(amp_dtype="float16", n_checkpoints=1))
    clean = make_dictionary()
    Trainer(other).fit(clean, Without({2, 3}))
    expected = json.loads((Path(other.exp_result_path) / "checkpoints" / "step_6" / "state.json").read_text())
    assert state["scaler"] == expected["scaler"]
    assert all(torch.equal(value, clean.state_dict()[name]) for name, value in sae.state_dict().items())
