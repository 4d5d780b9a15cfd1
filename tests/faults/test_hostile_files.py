"""Hostile files of every kind that the library reads: an error of one line, in bounded memory and time, and nothing in them is run."""

from __future__ import annotations

import ast
import json
import os
import pickle
import shutil
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import lm_saes
from lm_saes import tensor_files
from lm_saes.activations.cache import ActivationCache
from lm_saes.activations.cache_format import MANIFEST_FILE
from lm_saes.activations.cache_progress import Progress, progress_name
from lm_saes.activations.foreign_cache import open_activations
from lm_saes.activations.text import load_dataset
from lm_saes.config import DatasetConfig, LanguageModelConfig, SAEConfig, SweepSAESettings, TrainSAESettings, load_settings
from lm_saes.config.base import parse_overrides, validated
from lm_saes.errors import ConfigError, DataError, LmSaesError, WeightsError
from lm_saes.files import inside
from lm_saes.lm.demo import demo_folder
from lm_saes.lm.language_model import load_model
from lm_saes.models import SparseDictionary
from lm_saes.training.checkpoint import find_checkpoint, read_checkpoint
from tests.activations.caches import write
from tests.faults.hostile import JSON, PICKLES, SAFETENSORS, npz_bomb, refusal
from tests.models.variants import build

SOURCE = Path(lm_saes.__file__).parent
HOOK = "blocks.0.hook_resid_post"


# ------------------------------------------------------------------------------------------------- nothing is unpickled


def calls(path: Path) -> list[tuple[str, ast.Call]]:
    return [(ast.unparse(node.func), node) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]


def keywords(call: ast.Call) -> dict[str, Any]:
    return {word.arg: word.value.value for word in call.keywords if word.arg and isinstance(word.value, ast.Constant)}


def test_no_line_of_the_library_unpickles_or_runs_what_it_reads() -> None:
    """`torch.load` with weights_only and `np.load` without pickles, each in one file; nothing that evaluates; safe YAML only."""
    loads: list[tuple[str, str]] = []
    for path in sorted(SOURCE.rglob("*.py")):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            names = (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [str(node.module)]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            for name in names:
                assert name.split(".")[0] not in {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}, f"{path} imports {name}"
        for name, call in calls(path):
            where = f"{path.relative_to(SOURCE)}:{call.lineno}"
            assert name not in {"eval", "exec", "compile", "__import__", "os.system", "yaml.load", "yaml.full_load", "yaml.unsafe_load"}, where
            assert keywords(call).get("trust_remote_code") is not True, where
            if name.endswith(".load") and name.split(".")[0] in {"torch", "np", "numpy"}:
                loads.append((path.name, name))
                wanted = ("weights_only", True) if name == "torch.load" else ("allow_pickle", False)
                assert keywords(call).get(wanted[0]) is wanted[1], where
            if name in {"load_file", "safe_open", "safetensors.torch.load_file", "np.fromfile", "np.memmap", "torch.from_file", "torch.jit.load"}:
                assert path.name == "tensor_files.py", where
    assert sorted(loads) == [("tensor_files.py", "np.load"), ("tensor_files.py", "np.load"), ("tensor_files.py", "torch.load")]


def test_json_has_one_reader() -> None:
    """What is parsed elsewhere is what the library itself or the command line has just made."""
    own = {"files.py", "cache_samples.py", "tokenization.py"}
    found = {path.name for path in SOURCE.rglob("*.py") for name, _ in calls(path) if name in {"json.loads", "json.load"}}
    assert found == own


@pytest.mark.parametrize("pickled", PICKLES)
@pytest.mark.parametrize("form", ["plain", "zip"])
def test_code_in_a_pickle_does_not_run(tmp_path: Path, pickled: str, form: str) -> None:
    mark, path = tmp_path / "it-ran", tmp_path / "ae.pt"
    payload = ("c" + pickled if not pickled.startswith("c") else pickled).format(mark).encode()
    if form == "plain":
        path.write_bytes(payload)
    else:
        torch.save({"a": torch.zeros(2)}, tmp_path / "whole.pt")
        with zipfile.ZipFile(tmp_path / "whole.pt") as whole, zipfile.ZipFile(path, "w") as copy:
            for entry in whole.infolist():
                copy.writestr(entry.filename, payload if entry.filename.endswith("data.pkl") else whole.read(entry))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pickle.loads(payload)
    assert mark.exists()  # it would have
    mark.unlink()
    refusal(lambda: tensor_files.read_torch(path, WeightsError), "ae.pt")
    refusal(lambda: open_activations(str(path), [HOOK]), "ae.pt")
    assert not mark.exists()


def test_objects_in_numpy_files_are_not_unpickled(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "params.npz", W_enc=np.array([{"a": 1}], dtype=object))
    assert "Python objects" in refusal(lambda: open_activations(str(tmp_path / "a.npy"), [HOOK]), "a.npy")
    assert "allow_pickle=False" in refusal(lambda: tensor_files.read_npz(tmp_path / "params.npz", WeightsError), "params.npz")


# ------------------------------------------------------------------------------------------------------- dictionaries


@pytest.fixture
def sae(tmp_path: Path) -> Path:
    build({"act_fn": "jumprelu", "norm_activation": "inference"}).save_pretrained(tmp_path / "sae")
    return tmp_path / "sae"


@pytest.mark.parametrize("harm", JSON)
def test_tables_of_a_dictionary(sae: Path, harm: str) -> None:
    (sae / "config.json").write_bytes(JSON[harm])
    refusal(lambda: SparseDictionary.from_pretrained(sae), "config.json")
    refusal(lambda: SAEConfig.from_pretrained(sae), "config.json")
    (sae / "lm_config.json").write_bytes(JSON[harm])
    refusal(lambda: LanguageModelConfig.from_pretrained_sae(sae), "lm_config.json")


@pytest.mark.parametrize("harm", SAFETENSORS)
def test_weights_of_a_dictionary(sae: Path, harm: str) -> None:
    (sae / "sae_weights.safetensors").write_bytes(SAFETENSORS[harm])
    refusal(lambda: SparseDictionary.from_pretrained(sae), "sae")


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    "change",
    [
        {"d_model": 2**62}, {"d_model": 10**30}, {"expansion_factor": 1e300}, {"d_model": 10**6, "expansion_factor": 10**6}, {"d_model": -1},
        {"top_k": 10**40}, {"d_model": "5; rm"}, {"act_fn": ["relu"]}, {"hook_point_in": {"a": 1}}, {"hook_point_in": "\x1b[31m\nblocks"},
        {"hook_point_in": "a\x00b"}, {"sae_type": "\x1b]0;title\x07"}, {"sae_type": ["sae"]}, {"sae_type": {}}, {"schema_version": "1"}, {"schema_version": 10**9},
        {"matryoshka": {"widths": [10**18]}}, {"dataset_average_activation_norm": {HOOK: -1}}, {"unknown": 1}, {"x" * 10**6: 1},
    ],
    ids=str,
)  # fmt: skip
def test_absurd_configurations_of_a_dictionary(sae: Path, change: dict[str, Any], strict: bool) -> None:
    table = json.loads((sae / "config.json").read_text())
    (sae / "config.json").write_text(json.dumps({**table, **change}))
    if change == {"hook_point_in": "\x1b[31m\nblocks"}:  # a name like any other, until it is shown
        return
    refusal(lambda: SparseDictionary.from_pretrained(sae, strict_loading=strict))


def test_what_is_built_is_no_larger_than_the_weights(sae: Path) -> None:
    weights = load_file(sae / "sae_weights.safetensors")
    table = json.loads((sae / "config.json").read_text())
    (sae / "config.json").write_text(json.dumps({**table, "d_model": 10**5, "expansion_factor": 1000}))
    save_file({"b_D": torch.zeros(10**5)}, sae / "sae_weights.safetensors")
    assert "W_D is missing" in refusal(lambda: SparseDictionary.from_pretrained(sae, strict_loading=False))
    save_file(weights, sae / "sae_weights.safetensors")
    assert "W_D has shape" in refusal(lambda: SparseDictionary.from_pretrained(sae, strict_loading=False))


def test_a_saved_dictionary_cannot_ask_for_code_to_be_trusted(sae: Path) -> None:
    (sae / "lm_config.json").write_text(json.dumps({"model_name": "somebody/model", "trust_remote_code": True}))
    assert not LanguageModelConfig.from_pretrained_sae(sae).trust_remote_code
    assert LanguageModelConfig.from_pretrained_sae(sae, trust_remote_code=True).trust_remote_code
    (sae / "lm_config.json").unlink()
    table = json.loads((sae / "config.json").read_text())
    table["provenance"] = {"model": {"model_name": "somebody/model", "trust_remote_code": True}}
    (sae / "config.json").write_text(json.dumps(table))
    assert not LanguageModelConfig.from_pretrained_sae(sae).trust_remote_code


# ------------------------------------------------------------------------------------------ dictionaries of other libraries


@pytest.mark.parametrize("harm", JSON)
@pytest.mark.parametrize(("config", "weights"), [("cfg.json", "sae_weights.safetensors"), ("cfg.json", "sae.safetensors"), ("config.json", "ae.pt")])
def test_tables_of_other_libraries(tmp_path: Path, config: str, weights: str, harm: str) -> None:
    (tmp_path / config).write_bytes(JSON[harm])
    (tmp_path / weights).write_bytes(SAFETENSORS["empty"])
    refusal(lambda: SparseDictionary.from_pretrained(tmp_path, hook_point_in=HOOK), str(tmp_path))


@pytest.mark.parametrize(
    "table",
    [
        {"architecture": "topk", "k": 1e308}, {"architecture": "topk", "k": "many"}, {"architecture": ["topk"]}, {"activation_fn_kwargs": [1]},
        {"metadata": []}, {"metadata": {"a": [[]]}, "normalize_activations": {}}, {"hook_name": {"a": 1}}, {"normalize_activations": "expected_average_only_in"},
        {"architecture": "standard", "hook_head_index": {}}, {"dtype": 5, "architecture": None},
    ],
    ids=str,
)  # fmt: skip
def test_odd_tables_of_sae_lens(tmp_path: Path, table: dict[str, Any]) -> None:
    (tmp_path / "cfg.json").write_text(json.dumps(table))
    (tmp_path / "activation_scaler.json").write_text('{"scaling_factor": "x"}')
    save_file({"W_enc": torch.zeros(2, 3)}, tmp_path / "sae_weights.safetensors")
    refusal(lambda: SparseDictionary.from_pretrained(tmp_path))


def test_weights_of_other_libraries(tmp_path: Path) -> None:
    folder = tmp_path / "sparsify"
    folder.mkdir()
    (folder / "cfg.json").write_text('{"k": 2}')
    for data in SAFETENSORS.values():
        (folder / "sae.safetensors").write_bytes(data)
        refusal(lambda: SparseDictionary.from_pretrained(folder, hook_point_in=HOOK), "sparsify")


def test_zip_bombs(tmp_path: Path) -> None:
    (tmp_path / "params.npz").write_bytes(npz_bomb())
    assert os.path.getsize(tmp_path / "params.npz") < 2**20
    said = refusal(lambda: SparseDictionary.from_pretrained(tmp_path, hook_point_in=HOOK), "params.npz", memory=2**28)
    assert "would unfold to 268,435," in said
    np.savez_compressed(tmp_path / "params.npz", W_enc=np.zeros((64, 64), dtype=np.float32))  # small enough to be no harm
    assert tensor_files.read_npz(tmp_path / "params.npz", WeightsError)["W_enc"].shape == (64, 64)


def test_an_npz_whose_header_claims_more_than_there_is(tmp_path: Path) -> None:
    np.savez(tmp_path / "params.npz", W_enc=np.zeros(4, dtype=np.float32))
    data = (tmp_path / "params.npz").read_bytes().replace(b"(4,), ", b"(9999999999,), "[:6])
    (tmp_path / "params.npz").write_bytes(data.replace(b"'shape': (4,)", b"'shape': (9,)"))
    refusal(lambda: tensor_files.read_npz(tmp_path / "params.npz", WeightsError), "params.npz")


def test_compressed_and_expanded_pt_files(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(2**20)}, tmp_path / "whole.pt")
    with zipfile.ZipFile(tmp_path / "whole.pt") as whole, zipfile.ZipFile(tmp_path / "ae.pt", "w", zipfile.ZIP_DEFLATED) as copy:
        for entry in whole.infolist():
            copy.writestr(entry.filename, whole.read(entry))
    assert "it is compressed" in refusal(lambda: tensor_files.read_torch(tmp_path / "ae.pt", WeightsError))
    torch.save({"a": torch.zeros(1).expand(2**20, 2**20)}, tmp_path / "ae.pt")
    assert "larger than the file" in refusal(lambda: tensor_files.read_torch(tmp_path / "ae.pt", WeightsError))
    assert tensor_files.read_torch(tmp_path / "whole.pt", WeightsError)["a"].shape == (2**20,)


# ------------------------------------------------------------------------------------------------------- checkpoints


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from lm_saes.config import TrainerConfig
    from lm_saes.training.trainer import Trainer
    from tests.training.synthetic import SyntheticStream, make_dictionary

    folder = tmp_path_factory.mktemp("runs") / "run"
    Trainer(TrainerConfig(total_training_tokens=64 * 4, exp_result_path=str(folder), n_checkpoints=1)).fit(make_dictionary(), SyntheticStream())
    return find_checkpoint(folder)


@pytest.mark.parametrize("harm", [*JSON, *SAFETENSORS])
def test_checkpoints(checkpoint: Path, tmp_path: Path, harm: str) -> None:
    for name in ("state.json", "stream/state.json", "stream/tensors.safetensors", "optimizer.safetensors"):
        if name.endswith(".json") != (harm in JSON):
            continue
        copy = tmp_path / name.replace("/", "_") / "checkpoints" / checkpoint.name
        shutil.copytree(checkpoint, copy)
        (copy / name).write_bytes(JSON[harm] if harm in JSON else SAFETENSORS[harm])
        refusal(lambda copy=copy: find_checkpoint(copy.parent.parent), name.split("/")[0])
        if harm not in {"beyond floats", "NaN", "infinity", "a key twice"} or name == "state.json":  # found out by the checksum, above
            refusal(lambda copy=copy: read_checkpoint(copy), checkpoint.name)


@pytest.mark.parametrize("name", ["../../../etc", "/etc", "step_1/../../x", "..", "", "step_1\n/etc"])
def test_the_newest_checkpoint_is_in_the_folder(checkpoint: Path, tmp_path: Path, name: str) -> None:
    copy = tmp_path / "run" / "checkpoints" / checkpoint.name
    shutil.copytree(checkpoint, copy)
    (copy.parent / "latest").write_text(name)
    assert find_checkpoint(tmp_path / "run") == copy


# ------------------------------------------------------------------------------------------------------------- caches


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("caches") / "cache"
    write(folder)
    return folder


@pytest.mark.parametrize("harm", JSON)
def test_manifests(cache: Path, tmp_path: Path, harm: str) -> None:
    shutil.copytree(cache, tmp_path, dirs_exist_ok=True)
    (tmp_path / MANIFEST_FILE).write_bytes(JSON[harm])
    refusal(lambda: ActivationCache(tmp_path), MANIFEST_FILE)


@pytest.mark.parametrize("harm", SAFETENSORS)
def test_shards_and_progress(cache: Path, tmp_path: Path, harm: str) -> None:
    shutil.copytree(cache, tmp_path, dirs_exist_ok=True)
    victim = sorted(tmp_path.glob("shard-*"))[0]
    table = json.loads((tmp_path / MANIFEST_FILE).read_text())
    table["shards"][0]["bytes"] = max(8, len(SAFETENSORS[harm]))  # the manifest agrees with it
    (tmp_path / MANIFEST_FILE).write_text(json.dumps(table))
    victim.write_bytes(SAFETENSORS[harm])
    refusal(lambda: [ActivationCache(tmp_path).read(group, [HOOK]) for group in range(3)], victim.name)
    (tmp_path / progress_name(0, 1)).write_bytes(SAFETENSORS[harm])
    refusal(lambda: Progress.load(tmp_path, 0, 1), progress_name(0, 1))


@pytest.mark.parametrize("harm", SAFETENSORS)
def test_foreign_matrices(tmp_path: Path, harm: str) -> None:
    (tmp_path / "a.safetensors").write_bytes(SAFETENSORS[harm])
    if harm != "bytes left over":
        refusal(lambda: open_activations(str(tmp_path), [HOOK]), "a.safetensors")


@pytest.mark.parametrize(
    "header",
    [
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776, 1024), }",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 4), }",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (9223372036854775807, 9223372036854775807), }",
        b"{'descr': '|O', 'fortran_order': False, 'shape': (1, 4), }",
        b"{'descr': __import__('os').system('touch ran'), 'fortran_order': False, 'shape': (1, 4), }",
        b"(" * 5000,
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (0, 4), }",
    ],
)
def test_headers_of_npy_files(tmp_path: Path, header: bytes) -> None:
    text = header + b" " * (-(len(header) + 11) % 64) + b"\n"
    (tmp_path / "a.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + b"\0" * 16)
    refusal(lambda: open_activations(str(tmp_path), [HOOK]), "a.npy")


def test_metadata_beside_chunks(tmp_path: Path) -> None:
    save_file({"activation": torch.zeros(2, 4, 3)}, tmp_path / "chunk-0.safetensors")
    for data in (JSON["nested lists"], JSON["digits"], JSON["not UTF-8"], JSON["NaN"]):
        (tmp_path / "chunk-0.meta.json").write_bytes(data)
        refusal(lambda: open_activations(str(tmp_path), [HOOK]).read(0, [HOOK]), "chunk-0.meta.json")


# ------------------------------------------------------------------------------------------------- names that lead out


OUTSIDE = ["../x", "/etc/passwd", "a/../../x", "..", "", "a\x00b", "a\nb", "..\\x", "C:\\x", "x" * 5000, None, 5, ["a"]]


@pytest.mark.parametrize("name", OUTSIDE, ids=lambda name: repr(name)[:20])
def test_names_in_files_stay_in_their_folder(tmp_path: Path, name: Any) -> None:
    with pytest.raises(WeightsError) as caught:
        inside(tmp_path, name, WeightsError, "index.json")
    assert str(caught.value).isprintable()
    assert inside(tmp_path, "a/b.bin", WeightsError, "index.json") == tmp_path / "a/b.bin"


@pytest.mark.parametrize("name", ["../secret.safetensors", "/tmp/secret.safetensors", "sub/../../secret.safetensors"])
def test_the_index_of_a_language_model_names_its_own_files(tmp_path: Path, name: str) -> None:
    model = tmp_path / "model"
    shutil.copytree(demo_folder(), model)
    (model / "model.safetensors").rename(tmp_path / "secret.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {"transformer.wte.weight": name}}))
    said = refusal(lambda: load_model(LanguageModelConfig(model_name=str(model), device="cpu")), "model.safetensors.index.json")
    assert "nothing outside" in said


@pytest.mark.parametrize("harm", ["nested lists", "cut short", "not UTF-8", "a list", "a key twice"])
def test_the_tables_of_a_language_model(tmp_path: Path, harm: str) -> None:
    model = tmp_path / "model"
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors.index.json"):
        if (name, harm) in {("tokenizer_config.json", "a key twice"), ("config.json", "a key twice"), ("tokenizer.json", "a key twice")}:
            continue  # transformers' own reading
        shutil.copytree(demo_folder(), model)
        (model / name).write_bytes(JSON[harm])
        refusal(lambda: load_model(LanguageModelConfig(model_name=str(model), device="cpu")), "model", memory=4 * 2**30)
        shutil.rmtree(model)


@pytest.mark.parametrize("harm", SAFETENSORS)
def test_the_weights_of_a_language_model(tmp_path: Path, harm: str) -> None:
    model = tmp_path / "model"
    shutil.copytree(demo_folder(), model)
    (model / "model.safetensors").write_bytes(SAFETENSORS[harm])
    refusal(lambda: load_model(LanguageModelConfig(model_name=str(model), device="cpu")), "model", memory=4 * 2**30)


def test_a_language_model_in_a_pickle_is_not_read(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(demo_folder(), model)
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    torch.save(tensors, model / "pytorch_model.bin")
    refusal(lambda: load_model(LanguageModelConfig(model_name=str(model), device="cpu")), "safetensors", memory=4 * 2**30)


def test_code_that_a_language_model_brings_is_not_run(tmp_path: Path) -> None:
    model, mark = tmp_path / "model", tmp_path / "it-ran"
    shutil.copytree(demo_folder(), model)
    table = json.loads((model / "config.json").read_text())
    auto = {"AutoConfig": "code.OwnConfig", "AutoModelForCausalLM": "code.OwnModel"}
    (model / "config.json").write_text(json.dumps({**table, "model_type": "own", "auto_map": auto, "architectures": ["OwnModel"]}))
    (model / "code.py").write_text(f"open({str(mark)!r}, 'w')\n")
    said = refusal(lambda: load_model(LanguageModelConfig(model_name=str(model), device="cpu")), str(model), memory=4 * 2**30)
    assert "set trust_remote_code=True if you trust it" in said
    assert not mark.exists()


def test_hook_points_do_not_lead_out_of_a_folder_of_matrices(tmp_path: Path) -> None:
    np.save(tmp_path / "secret.npy", np.zeros((4, 3), dtype=np.float32))
    (tmp_path / "data").mkdir()
    for hook in ("../secret.npy", "..", str(tmp_path / "secret.npy")):
        said = refusal(lambda hook=hook: open_activations(str(tmp_path / "data"), [hook]))
        assert "nothing outside" in said


def test_datasets_on_disk_name_their_own_files(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_dict({"text": ["a", "b"]}).save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": ["c"]})}).save_to_disk(tmp_path / "two")
    state = json.loads((tmp_path / "one" / "state.json").read_text())
    state["_data_files"] = [{"filename": f"../two/train/{Path(file).name}"} for file in map(str, (tmp_path / "two" / "train").glob("*.arrow"))]
    (tmp_path / "one" / "state.json").write_text(json.dumps(state))
    assert "nothing outside" in refusal(lambda: load_dataset(DatasetConfig(dataset_name_or_path=str(tmp_path / "one"))), "state.json")
    (tmp_path / "two" / "dataset_dict.json").write_text('{"splits": ["../one"]}')
    assert "nothing outside" in refusal(lambda: load_dataset(DatasetConfig(dataset_name_or_path=str(tmp_path / "two"))), "dataset_dict.json")


# ------------------------------------------------------------------------------------------------------------ settings


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        *((f"{harm}.json", data) for harm, data in JSON.items()),
        ("bomb.yaml", BOMB.encode()), ("itself.yaml", b"a: &a [*a]"), ("object.yaml", b'a: !!python/object/apply:os.system ["touch ran"]'),
        ("deep.yaml", b"[" * 5000), ("control.yaml", b"a: \x00"), ("a list.yaml", b"- 1"), ("latin.toml", b'a = "\xe9"'),
        ("deep.toml", b"a = " + b"[" * 100_000), ("dotted.toml", b"a." * 50_000 + b"a = 1"), ("twice.toml", b"a = 1\na = 2"), ("empty.toml", b""), ("what.ini", b"[a]"),
        ("long.toml", b"x" * 1_000_000 + b" = 1"), ("escape.toml", b'"\\u001b[31mred" = 1'),
        ("huge.toml", b"# " + b"x" * (65 * 2**20)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_settings(tmp_path: Path, name: str, data: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    said = refusal(lambda: load_settings(TrainSAESettings, path), name.split(".")[0] if name != "what.ini" else ".ini")
    assert isinstance(said, str)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["../elsewhere", "/tmp/elsewhere", "a/../../b", ""])
def test_the_runs_of_a_sweep_are_in_its_folder(name: str) -> None:
    run = {"sae": {"hook_point_in": HOOK, "d_model": 8, "expansion_factor": 2}, "trainer": {}}
    factory = {"sources": [{"name": "demo"}], "hook_points": [HOOK], "batch_size": 8}
    table = {"items": [{"sae_name": name, **run}], "activation_factory": factory, "model": {"model_name": "demo"}, "exp_result_path": "sweep"}
    refusal(lambda: validated(SweepSAESettings, table), "sae_name names")
    table["items"][0]["trainer"] = {"exp_result_path": "of/its/own"}
    assert validated(SweepSAESettings, table)


def test_options_of_the_command_line() -> None:
    for word in ("--" + "a." * 100_000 + "a", "--a=" + "[" * 100_000, "--a=" + "9" * 10_000):
        refusal(lambda word=word: load_settings(TrainSAESettings, None, parse_overrides([word])))


# ----------------------------------------------------------------------------------------------------------- messages


def test_messages_are_one_line_that_a_terminal_shows_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    error = LmSaesError("a\nb \x1b[31mred\x1b[0m \u202e back \ud800 " + "long " * 10_000 + "end")
    assert str(error).startswith("a b \\x1b[31mred\\x1b[0m \\u202e back \\ud800 long")
    assert str(error).endswith("long end")
    assert len(str(error)) < 2100
    monkeypatch.setenv("HF_TOKEN", "sentinel-token-of-nobody")
    assert str(ConfigError("Illegal header b'Bearer sentinel-token-of-nobody'")) == "Illegal header b'Bearer ***'"
    assert str(DataError("https://me:word@host/x?Signature=abc&Expires=1 hf_" + "a" * 34)) == "https://***@host/x?Signature=***&Expires=1 ***"


def test_names_from_files_are_shown_as_they_are(tmp_path: Path) -> None:
    folder = tmp_path / "sae"
    build({"act_fn": "relu", "norm_activation": "inference"}).save_pretrained(folder)
    weights = load_file(folder / "sae_weights.safetensors")
    save_file({**weights, "\x1b[2J\nerror: all is well": torch.zeros(1)}, folder / "sae_weights.safetensors")
    assert "\\x1b[2J error: all is well is unexpected" in refusal(lambda: SparseDictionary.from_pretrained(folder))
