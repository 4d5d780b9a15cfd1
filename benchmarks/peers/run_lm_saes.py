"""This library's arm of `end_to_end.py`: `train_sae` with the default loggers, clipping on."""

from __future__ import annotations

from importlib.metadata import version

from run_common import Clock, quality, start

from lm_saes import TrainSAESettings, ops, train_sae
from lm_saes.lm.language_model import load_model
from lm_saes.training.step import TrainingStep


def main() -> None:
    run, answer = start()
    hook = f"blocks.{run.layer}.hook_resid_post"
    settings = TrainSAESettings.model_validate(
        {
            "sae_name": "end-to-end",
            "device_type": "cpu",
            "sae": {"hook_point_in": hook, "d_model": run.d_model, "expansion_factor": run.d_sae / run.d_model, "act_fn": "topk", "top_k": run.k},
            "initializer": {"bias_init_method": "geometric_median", "grid_search_init_norm": True, "init_encoder_bias_with_mean_hidden_pre": True},
            "trainer": {
                "total_training_tokens": run.tokens, "lr": run.lr, "lr_scheduler_name": "constant",
                "clip_grad_norm": 1.0, "n_checkpoints": 0, "exp_result_path": run.output,
            },
            "model": {"model_name": run.model, "local_files_only": True},
            "datasets": {"text": {"dataset_name_or_path": run.text}},
            "activation_factory": {
                "sources": [{"name": "text"}], "hook_points": [hook], "batch_size": run.batch, "context_size": run.context,
                "model_batch_size": run.rows, "buffer_size": run.buffer,
            },
        }
    )  # fmt: skip
    clock = Clock()
    clock.count_calls(TrainingStep, "__call__")
    sae = train_sae(settings)
    times = clock.read()
    assert settings.model is not None
    model = load_model(settings.model.replace(device="cpu"))

    found = quality(run, lambda ids: model.capture(ids, None, [hook])[hook], lambda x: (sae.features({hook: x}), sae.reconstruct({hook: x})))
    answer(**times, **found, version=f"{version('lm-saes')} ({ops.explain()})")


if __name__ == "__main__":
    main()
