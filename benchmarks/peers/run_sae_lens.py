"""SAELens' arm of `end_to_end.py`: `LanguageModelSAETrainingRunner`, TopK, without Weights & Biases.

Variants, with commas: "sparse" sets `use_sparse_activations` (and `rescale_acts_by_decoder_norm` off, which it needs); "huggingface" reads
the language model through Hugging Face instead of TransformerLens, its default.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import torch
from datasets import load_dataset
from run_common import Clock, Run, quality, start
from sae_lens import LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner, TopKTrainingSAEConfig
from sae_lens.config import LoggingConfig
from sae_lens.load_model import HookedProxyLM
from sae_lens.training.sae_trainer import SAETrainer
from transformer_lens import HookedTransformer
from transformer_lens import loading_from_pretrained as loading
from transformers import AutoModelForCausalLM, AutoTokenizer


def hooked_transformer(folder: str) -> HookedTransformer:
    """A Hugging Face folder as a HookedTransformer without processing; its own `from_pretrained` takes names of known models only."""
    hf_model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    cfg = loading.get_pretrained_model_config(folder, fold_ln=False, device="cpu", dtype=torch.float32)
    model = HookedTransformer(cfg, AutoTokenizer.from_pretrained(folder), move_to_device=False)
    state = loading.get_pretrained_state_dict(folder, cfg, hf_model, dtype=torch.float32)
    model.load_and_process_state_dict(
        state, fold_ln=False, center_writing_weights=False, center_unembed=False, fold_value_biases=False, refactor_factored_attn_matrices=False
    )
    return model


def load(run: Run, variants: list[str], hook: str) -> Any:
    if "huggingface" in variants:
        return HookedProxyLM(AutoModelForCausalLM.from_pretrained(run.model, dtype=torch.float32), AutoTokenizer.from_pretrained(run.model), [hook])
    return hooked_transformer(run.model)


def main() -> None:
    run, answer = start()
    variants = run.variant.split(",")
    hook = f"gpt_neox.layers.{run.layer}" if "huggingface" in variants else f"blocks.{run.layer}.hook_resid_post"
    sparse = {"use_sparse_activations": True, "rescale_acts_by_decoder_norm": False} if "sparse" in variants else {}
    cfg = LanguageModelSAERunnerConfig(
        sae=TopKTrainingSAEConfig(d_in=run.d_model, d_sae=run.d_sae, k=run.k, device="cpu", dtype="float32", **sparse),
        hook_name=hook, dataset_path=run.text, is_dataset_tokenized=False, streaming=False, context_size=run.context,
        training_tokens=run.tokens, train_batch_size_tokens=run.batch, store_batch_size_prompts=run.rows,
        n_batches_in_buffer=run.buffer // run.context, lr=run.lr, device="cpu", checkpoint_path=None, output_path=run.output,
        logger=LoggingConfig(log_to_wandb=False),
    )  # fmt: skip
    clock = Clock()
    clock.count_calls(SAETrainer, "step")
    model = load(run, variants, hook)
    dataset = load_dataset("json", data_files=run.text, split="train")
    sae = LanguageModelSAETrainingRunner(cfg, override_dataset=dataset, override_model=model).run()
    times = clock.read()
    found = quality(
        run,
        lambda ids: model.run_with_cache(ids, names_filter=[hook], stop_at_layer=run.layer + 1)[1][hook],
        lambda x: (sae.encode(x).to_dense(), sae(x)),
    )
    answer(**times, **found, version=version("sae-lens"))


if __name__ == "__main__":
    main()
