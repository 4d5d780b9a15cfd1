"""Golden files of the parity with sae-lens: what it computes from given weights, makes of dictionaries that we wrote for it, and loses in training.

Run in an environment of its own that has sae-lens, with this library's sources and tests on the path (they need torch, pydantic and jaxtyping):

    python -m venv golden && golden/bin/pip install torch==2.13.0 sae-lens==6.54.12
    PYTHONPATH=src:. golden/bin/python scripts/make_sae_lens_golden.py

Everything goes to tests/golden/sae_lens/:

    read/<case>/        a folder as sae-lens wrote it (cfg.json, sae_weights.safetensors), and outputs.safetensors: x, codes, reconstruction
    written/<case>.safetensors   tensors of a folder that `to_saelens` wrote and sae-lens loaded, its cfg.json in the header, and the same outputs
    training/<case>.safetensors  the losses of every step of `SAETrainer` in float64 and float32, and the weights at the end
    auxk.safetensors             TopK's auxiliary loss on one batch
    jumprelu.safetensors         JumpReLU's losses on one batch and their gradients, threshold included
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sae_lens
import torch
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.gated_sae import GatedSAE, GatedSAEConfig
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig, JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
from sae_lens.saes.matryoshka_batchtopk_sae import MatryoshkaBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAEConfig
from sae_lens.saes.sae import SAE, SAEMetadata, TrainStepInput
from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig, StandardTrainingSAE, StandardTrainingSAEConfig
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig, TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.saes.transcoder import (
    JumpReLUSkipTranscoder,
    JumpReLUSkipTranscoderConfig,
    JumpReLUTranscoder,
    JumpReLUTranscoderConfig,
    SkipTranscoder,
    SkipTranscoderConfig,
    Transcoder,
    TranscoderConfig,
)
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.sae_trainer import SAETrainer
from safetensors.torch import load_file, save_file

from lm_saes.interop import to_saelens
from tests.parity import recipes
from tests.parity.recipes import GOLDEN, HOOK, HOOK_OUT, D, F, K

SCALING_FACTOR = 0.62


def given(sae: SAE[Any], seed: int = 0) -> SAE[Any]:
    """The same dictionary with the recipe's weights."""
    weights = recipes.weights(seed)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            parameter.copy_(weights[name])
    return sae.eval()


def outputs(sae: SAE[Any]) -> dict[str, torch.Tensor]:
    x = recipes.inputs()
    with torch.no_grad():
        return {"x": x, "codes": sae.encode(x), "reconstruction": sae(x)}


def metadata(**more: Any) -> SAEMetadata:
    return SAEMetadata(model_name="some-model", hook_name=HOOK, **more)


def base(**options: Any) -> dict[str, Any]:
    return {"d_in": D, "d_sae": F, "metadata": metadata(), **options}


def read_cases(folder: Path) -> None:
    """Folders of every kind that we read."""
    transcoder = {"d_out": D, "apply_b_dec_to_input": False, "metadata": metadata(hook_name_out=HOOK_OUT)}
    finished = {
        "standard": StandardSAE(StandardSAEConfig(**base())),
        "standard_without_subtraction": StandardSAE(StandardSAEConfig(**base(apply_b_dec_to_input=False))),
        "standard_constant_norm": StandardSAE(StandardSAEConfig(**base(normalize_activations="constant_norm_rescale"))),
        "topk": TopKSAE(TopKSAEConfig(**base(k=K))),
        "topk_rescaled": TopKSAE(TopKSAEConfig(**base(k=K, rescale_acts_by_decoder_norm=True))),
        "jumprelu": JumpReLUSAE(JumpReLUSAEConfig(**base())),
        "gated": GatedSAE(GatedSAEConfig(**base())),
        "transcoder": Transcoder(TranscoderConfig(**base(**transcoder))),
        "jumprelu_transcoder": JumpReLUTranscoder(JumpReLUTranscoderConfig(**base(**transcoder))),
        "skip_transcoder": SkipTranscoder(SkipTranscoderConfig(**base(**transcoder))),
        "jumprelu_skip_transcoder": JumpReLUSkipTranscoder(JumpReLUSkipTranscoderConfig(**base(**transcoder))),
    }
    for name, sae in finished.items():
        given(sae).save_model(folder / name)
        save_file(outputs(SAE.load_from_disk(folder / name)), folder / name / "outputs.safetensors")

    # A factor on the input that the folder does not hold; sae-lens folds it after loading.
    sae = given(StandardSAE(StandardSAEConfig(**base(normalize_activations="expected_average_only_in"))))
    sae.save_model(folder / "standard_scaled")
    sae.fold_activation_norm_scaling_factor(SCALING_FACTOR)
    save_file({**outputs(sae), "scaling_factor": torch.tensor(SCALING_FACTOR)}, folder / "standard_scaled" / "outputs.safetensors")

    # BatchTopK: as it is saved when training ends, and as a checkpoint before, with the factor beside it. The codes are those of inference.
    for name, rescale in (("batchtopk", True), ("batchtopk_without_rescaling", False)):
        cfg = BatchTopKTrainingSAEConfig(**base(k=K, normalize_activations="expected_average_only_in", rescale_acts_by_decoder_norm=rescale))
        sae = given(BatchTopKTrainingSAE(cfg))
        sae.topk_threshold.fill_(recipes.THRESHOLD)
        sae.save_model(folder / f"{name}_checkpoint")
        ActivationScaler(SCALING_FACTOR).save(str(folder / f"{name}_checkpoint" / "activation_scaler.json"))
        sae.fold_activation_norm_scaling_factor(SCALING_FACTOR)
        sae.save_inference_model(folder / name)
        result = outputs(SAE.load_from_disk(folder / name))
        for kind in (name, f"{name}_checkpoint"):
            save_file(result, folder / kind / "outputs.safetensors")

    # A checkpoint of JumpReLU's training; thresholds are not negative there.
    sae = given(JumpReLUTrainingSAE(JumpReLUTrainingSAEConfig(**base())))
    sae.threshold.data.clamp_(min=0)
    sae.save_model(folder / "jumprelu_checkpoint")
    save_file(outputs(sae), folder / "jumprelu_checkpoint" / "outputs.safetensors")

    # The flat table of versions before 6, which sae-lens still reads.
    old = {"d_in": D, "d_sae": F, "dtype": "torch.float32", "device": "cpu", "hook_point": HOOK, "hook_point_head_index": None,
           "model_name": "some-model", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}, "normalize_activations": False,
           "sae_lens_training_version": "3.1.0"}  # fmt: skip
    target = folder / "topk_before_version_6"
    shutil.copytree(folder / "topk", target)
    (target / "cfg.json").write_text(json.dumps(old))
    weights = load_file(target / "sae_weights.safetensors")
    save_file(weights, target / "sae_weights.safetensors")
    save_file(outputs(SAE.load_from_disk(target)), target / "outputs.safetensors")


def written_cases(folder: Path) -> None:
    """Folders that we wrote, loaded by sae-lens."""
    folder.mkdir()
    with tempfile.TemporaryDirectory() as work:
        for name in recipes.EXPORTS:
            to_saelens(recipes.ours(name), Path(work) / name)
            sae = SAE.load_from_disk(Path(work) / name)
            cfg = (Path(work) / name / "cfg.json").read_text()
            save_file({**load_file(Path(work) / name / "sae_weights.safetensors"), **outputs(sae)}, folder / f"{name}.safetensors", {"cfg": cfg})


def batches(dtype: torch.dtype) -> Iterator[torch.Tensor]:
    for step in range(recipes.STEPS):
        yield recipes.batch(step).to(dtype)


def train(sae: Any, dtype: torch.dtype) -> tuple[list[dict[str, float]], Any]:
    """The losses of each step of sae-lens' own trainer, and the dictionary."""
    with torch.no_grad():
        for name, tensor in recipes.initial_weights().items():
            getattr(sae, name).copy_(tensor)
    cfg = SAETrainerConfig(
        total_training_samples=recipes.STEPS * recipes.BATCH, train_batch_size_samples=recipes.BATCH, lr=recipes.LR, lr_end=recipes.LR,
        lr_warm_up_steps=recipes.LR_WARM_UP, logger=LoggingConfig(log_to_wandb=False),
    )  # fmt: skip
    losses: list[dict[str, float]] = []

    class Recorder(SAETrainer):
        def _train_step(self, sae: Any, sae_in: torch.Tensor) -> Any:
            output = super()._train_step(sae, sae_in)
            losses.append({"loss": output.loss.item(), **{name: value.item() for name, value in output.losses.items()}})
            return output

    return losses, Recorder(cfg, sae, batches(dtype)).fit()


def training(folder: Path) -> None:
    folder.mkdir()
    tensors: dict[str, dict[str, torch.Tensor]] = {}
    for dtype in (torch.float64, torch.float32):
        shape = {"d_in": recipes.TRAIN_D, "d_sae": recipes.TRAIN_F, "dtype": str(dtype).removeprefix("torch."), "apply_b_dec_to_input": False}
        saes = {
            "relu_l1": StandardTrainingSAE(StandardTrainingSAEConfig(**shape, l1_coefficient=recipes.L1, l1_warm_up_steps=recipes.L1_WARM_UP)),
            "topk": TopKTrainingSAE(TopKTrainingSAEConfig(**shape, k=recipes.TRAIN_K)),
            "batchtopk": BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**shape, k=recipes.TRAIN_K)),
            "matryoshka": MatryoshkaBatchTopKTrainingSAE(
                MatryoshkaBatchTopKTrainingSAEConfig(**shape, k=recipes.TRAIN_K, matryoshka_widths=[*recipes.PREFIXES, recipes.TRAIN_F])
            ),
        }
        for name, sae in saes.items():
            losses, trained = train(sae, dtype)
            kept, prefix = tensors.setdefault(name, {}), shape["dtype"]
            for term in losses[0]:
                kept[f"{prefix}/{term}"] = torch.tensor([step[term] for step in losses], dtype=dtype)
            if dtype == torch.float64:
                kept |= {f"{prefix}/{key}": getattr(trained, key).detach().clone().float() for key in ("W_enc", "b_enc", "W_dec", "b_dec")}
            if name in {"batchtopk", "matryoshka"}:
                kept[f"{prefix}/topk_threshold"] = trained.topk_threshold.clone()
    for name, kept in tensors.items():
        save_file(kept, folder / f"{name}.safetensors")


def auxk(path: Path) -> None:
    """sae-lens' auxiliary loss where every pre-activation is positive: it does not rectify what it selects."""
    options = {"dtype": "float64", "apply_b_dec_to_input": False, "rescale_acts_by_decoder_norm": False}
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=D, d_sae=F, k=K, **options))
    with torch.no_grad():
        for name, tensor in recipes.weights().items():
            if hasattr(sae, name):
                getattr(sae, name).copy_(tensor)
        sae.b_enc += 10
    dead = torch.arange(F) % 2 == 0
    x = recipes.inputs().double()
    output = sae.training_forward_pass(TrainStepInput(x, {}, dead, 0, is_logging_step=False))
    tensors = {"auxiliary_loss": output.losses["auxiliary_reconstruction_loss"].detach(), "mse": output.losses["mse_loss"].detach(), "dead": dead}
    save_file(tensors, path)


def jumprelu(path: Path) -> None:
    """Gradients of the reconstruction loss and the tanh penalty; the straight-through estimator reaches the threshold alone, as by default."""
    options = {
        "jumprelu_bandwidth": recipes.BANDWIDTH,
        "jumprelu_sparsity_loss_mode": "tanh",
        "l0_coefficient": recipes.TANH,
        "jumprelu_tanh_scale": 4.0,
    }
    cfg = JumpReLUTrainingSAEConfig(d_in=D, d_sae=F, dtype="float64", apply_b_dec_to_input=False, **options)
    sae = JumpReLUTrainingSAE(cfg)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            parameter.copy_(recipes.weights()[name])
        sae.threshold.copy_(recipes.positive_thresholds())
    output = sae.training_forward_pass(TrainStepInput(recipes.inputs().double(), {"l0": recipes.TANH}, None, 0, is_logging_step=False))
    output.loss.backward()
    tensors = {name: value.detach() for name, value in output.losses.items()} | {
        name: p.grad for name, p in sae.named_parameters() if p.grad is not None
    }
    save_file(tensors, path)


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    print("sae-lens", sae_lens.__version__)
    shutil.rmtree(GOLDEN, ignore_errors=True)
    GOLDEN.mkdir(parents=True)
    read_cases(GOLDEN / "read")
    written_cases(GOLDEN / "written")
    training(GOLDEN / "training")
    auxk(GOLDEN / "auxk.safetensors")
    jumprelu(GOLDEN / "jumprelu.safetensors")
    for path in sorted(GOLDEN.rglob("*")):
        if path.is_file():
            print(f"{path.stat().st_size:7d} {path.relative_to(GOLDEN)}")
