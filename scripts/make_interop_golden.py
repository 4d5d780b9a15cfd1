"""Golden folders of sparsify, dictionary_learning and Gemma Scope, each made in an environment that has the library concerned:

    python -m venv one && one/bin/pip install torch==2.13.0 eai-sparsify==1.3.3 && PYTHONPATH=. one/bin/python scripts/make_interop_golden.py sparsify
    python -m venv two && two/bin/pip install torch==2.13.0 dictionary-learning==0.1.0 && PYTHONPATH=. two/bin/python scripts/make_interop_golden.py dictionary_learning
    python -m venv three && three/bin/pip install torch==2.13.0 sae-lens==6.54.12 && PYTHONPATH=. three/bin/python scripts/make_interop_golden.py gemma_scope

Each folder under tests/golden/<library>/ is as the library writes it, with `outputs.safetensors` beside: x, codes, reconstruction, as the
library computes them after loading the folder. (Gemma Scope was published without code that writes it: the file is written by NumPy as
published, and loaded and run by sae-lens.)
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from tests.parity import recipes
from tests.parity.recipes import D, F, K

GOLDEN = Path("tests/golden")


def save_outputs(folder: Path, codes: torch.Tensor, reconstruction: torch.Tensor) -> None:
    tensors = {"x": recipes.inputs(), "codes": codes, "reconstruction": reconstruction}
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, folder / "outputs.safetensors")


def sparsify(target: Path) -> None:
    from sparsify import SparseCoder, SparseCoderConfig

    given, x = recipes.weights(), recipes.inputs()
    for name, options in {"layers.3": {}, "transcoder": {"transcode": True}, "skip_transcoder": {"transcode": True, "skip_connection": True}}.items():
        coder = SparseCoder(D, SparseCoderConfig(num_latents=F, k=K, normalize_decoder=False, **options))
        with torch.no_grad():
            coder.encoder.weight.copy_(given["W_enc"].T)
            coder.encoder.bias.copy_(given["b_enc"])
            coder.W_dec.copy_(given["W_dec"])
            coder.b_dec.copy_(given["b_dec"])
            if coder.W_skip is not None:
                coder.W_skip.copy_(given["W_skip"])
        coder.save_to_disk(target / name)
        coder = SparseCoder.load_from_disk(target / name)
        out = coder(x)
        codes = torch.zeros(len(x), F).scatter_(1, out.latent_indices, out.latent_acts.detach())
        save_outputs(target / name, codes, out.sae_out)


def dictionary_learning(target: Path) -> None:
    from dictionary_learning import dictionary as classes
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
    from dictionary_learning.trainers.top_k import AutoEncoderTopK
    from dictionary_learning.utils import load_dictionary

    given, x = recipes.weights(), recipes.inputs()
    theirs = {
        "encoder.weight": given["W_enc"].T, "encoder.bias": given["b_enc"], "decoder.weight": given["W_dec"].T, "bias": given["b_dec"],
        "decoder.bias": given["b_dec"], "decoder_bias": given["b_dec"], "gate_bias": given["b_gate"], "mag_bias": given["b_mag"],
    }  # fmt: skip
    made: dict[str, Any] = {
        "AutoEncoder": classes.AutoEncoder(D, F), "AutoEncoderNew": classes.AutoEncoderNew(D, F), "GatedAutoEncoder": classes.GatedAutoEncoder(D, F),
        "JumpReluAutoEncoder": classes.JumpReluAutoEncoder(D, F), "AutoEncoderTopK": AutoEncoderTopK(D, F, K), "BatchTopKSAE": BatchTopKSAE(D, F, K),
        "MatryoshkaBatchTopKSAE": MatryoshkaBatchTopKSAE(D, F, K, [8, 16]), "BatchTopKSAE_without_threshold": BatchTopKSAE(D, F, K),
    }  # fmt: skip
    for name, dictionary in made.items():
        folder, dict_class = target / name, name.partition("_")[0]
        folder.mkdir(parents=True)
        with torch.no_grad():
            for key, parameter in dictionary.named_parameters():
                parameter.copy_({**given, **theirs}[key])
            if "TopK" in name and "without" not in name:
                dictionary.threshold.fill_(recipes.THRESHOLD)
        torch.save(dictionary.state_dict(), folder / "ae.pt")
        trainer = {"dict_class": dict_class, "activation_dim": D, "dict_size": F, "k": K, "layer": 3, "lm_name": "some-model"}
        (folder / "config.json").write_text(json.dumps({"trainer": {**trainer, "submodule_name": "resid_post_layer_3"}, "buffer": {"ctx_len": 128}}))
        loaded, _ = load_dictionary(str(folder), "cpu")
        codes = loaded.encode(x)
        save_outputs(folder, codes, loaded.decode(codes))


def gemma_scope(target: Path) -> None:
    from sae_lens.loading import pretrained_sae_loaders as loaders
    from sae_lens.saes.sae import SAE

    given = recipes.weights()
    folder = target / "google--gemma-scope-2b-pt-res" / "layer_3" / "width_16k" / "average_l0_5"
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", **{name: given[name].numpy() for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")})
    loaders.hf_hub_download = lambda *_, **__: str(folder / "params.npz")
    cfg, tensors, _ = loaders.gemma_2_sae_huggingface_loader("google/gemma-scope-2b-pt-res", "layer_3/width_16k/average_l0_5")
    sae = SAE.from_dict({**loaders.handle_config_defaulting(cfg), "d_in": D, "d_sae": F, "dtype": "float32", "device": "cpu"})
    sae.load_state_dict(tensors)
    codes = sae.encode(recipes.inputs())
    save_outputs(folder, codes, sae.decode(codes))


if __name__ == "__main__":
    makers = {"sparsify": sparsify, "dictionary_learning": dictionary_learning, "gemma_scope": gemma_scope}
    name = sys.argv[1]
    shutil.rmtree(GOLDEN / name, ignore_errors=True)
    makers[name](GOLDEN / name)
    for path in sorted((GOLDEN / name).rglob("*")):
        if path.is_file():
            print(f"{path.stat().st_size:7d} {path}")
