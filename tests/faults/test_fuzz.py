"""Random harm to every kind of file that is read: it is taken, or refused in one line. Never another exception.

The quick form runs with every test run; `-m slow` runs the long one, and prints how many examples it tried.
"""

from __future__ import annotations

import copy
import io
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lm_saes import tensor_files
from lm_saes.activations.cache import ActivationCache
from lm_saes.activations.cache_format import MANIFEST_FILE
from lm_saes.activations.foreign_cache import open_activations
from lm_saes.analysis.features import Feature
from lm_saes.cli import recipe
from lm_saes.comparison import compare
from lm_saes.config import (
    ActivationFactoryConfig,
    DatasetConfig,
    EvaluateSAESettings,
    InitializerConfig,
    LanguageModelConfig,
    SAEConfig,
    SweepSAESettings,
    TrainerConfig,
    TrainSAESettings,
    load_settings,
)
from lm_saes.config.base import parse_overrides, read_config_file
from lm_saes.config.generation import ActivationWriterConfig, GenerateActivationsSettings
from lm_saes.config.synthetic import SyntheticBenchmarkConfig
from lm_saes.display import evaluation_table, read_json
from lm_saes.errors import LmSaesError, WeightsError
from lm_saes.models import SparseDictionary
from lm_saes.records import settings_of_run
from lm_saes.training.checkpoint import find_checkpoint, read_checkpoint
from tests.activations.caches import write
from tests.faults.terminal import generation, training
from tests.models.variants import build

HOOK = "blocks.0.hook_resid_post"
QUICK, LONG = 40, 300
TRIED: dict[str, int] = {}


def fuzz(name: str, check: Callable[..., Any], *strategies: st.SearchStrategy[Any], examples: int) -> None:
    """Run `check` on that many examples. It may raise nothing but an error of one line."""

    def one(values: tuple[Any, ...]) -> None:
        TRIED[name] = TRIED.get(name, 0) + 1
        refusal(lambda: check(*values))

    quiet = settings(max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    quiet(given(st.tuples(*strategies))(one))()
    if examples > QUICK:
        print(f"{name}: {TRIED[name]:,} examples")


def refusal(read: Callable[[], Any]) -> None:
    """Read, or be refused in one line."""
    said = ""
    try:
        read()
    except LmSaesError as error:
        said = str(error) or "\n"
    assert said.isprintable()
    assert len(said) < 2200


def both(function: Callable[..., Any]) -> Any:
    """A test in its quick and its long form."""
    return pytest.mark.parametrize("examples", [QUICK, pytest.param(LONG, marks=pytest.mark.slow)], ids=["quick", "long"])(function)


# ------------------------------------------------------------------------------------------------------------- harm


NUMBERS = st.sampled_from([0, -1, 1, 2**31, 2**63, 2**64, -(2**63), 10**30, 1e308, -1e308, 5e-324, 0.5, -0.0])
WORDS = st.one_of(
    st.text(max_size=8), st.sampled_from(["", "none", "auto", "cuda:99", "../..", "/", "\x00", "\x1b[31m", "\ud800", "float32", "demo", "1e999", "nan", "x" * 5000])
)  # fmt: skip
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), NUMBERS, st.floats(), WORDS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(WORDS, inner, max_size=3)),
    max_leaves=6,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values in a table."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in inner for place in places(item, (*path, key)))] if path else [p for k, i in inner for p in places(i, (k,))]


@st.composite
def harmed_tables(draw: st.DrawFn, table: dict[str, Any], most: int = 3) -> dict[str, Any]:
    """The table with a few of its values replaced, removed, or others beside them."""
    table = copy.deepcopy(table)
    for _ in range(draw(st.integers(1, most))):
        known = places(table)
        if not known:
            return table
        *way, last = draw(st.sampled_from(known))
        holder: Any = table
        for step in way:
            holder = holder[step]
        match draw(st.sampled_from(["replace", "replace", "remove", "beside"])):
            case "replace":
                holder[last] = draw(VALUES)
            case "remove":
                del holder[last]
            case _ if isinstance(holder, dict):
                holder[draw(WORDS)] = draw(VALUES)
            case _:
                holder.append(draw(VALUES))
    return table


@st.composite
def harmed_bytes(draw: st.DrawFn, data: bytes, front: int | None = None) -> bytes:
    """The bytes with a few of them flipped, cut off, doubled or replaced; among the first `front` above all."""
    out = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        if not out:
            break
        near = st.integers(0, min(front or len(out), len(out)) - 1)
        place = draw(st.one_of(near, st.integers(0, len(out) - 1)))
        match draw(st.sampled_from(["flip", "flip", "cut", "insert", "replace", "double"])):
            case "flip":
                out[place] ^= 1 << draw(st.integers(0, 7))
            case "cut":
                del out[place:]
            case "insert":
                out[place:place] = draw(st.binary(min_size=1, max_size=8))
            case "replace":
                new = draw(st.sampled_from([b"\0" * 8, b"\xff" * 8, b"9" * 20, b"[[[[[[", b'"', b"-", b"{}", b"null", b"1e999"]))
                out[place : place + len(new)] = new
            case _:
                out[place:place] = out[place : place + 64]
    return bytes(out)


# --------------------------------------------------------------------------------------------------------- settings


def table_of(file: str) -> dict[str, Any]:
    return read_config_file(recipe(file))


MATERIAL = Path("material")
TRAINING = training(MATERIAL, Path("run"), eval_config={"total_eval_tokens": 5}, wandb={"wandb_project": "x"}, stream_seed=3)
SETTINGS: dict[type, dict[str, Any]] = {
    TrainSAESettings: TRAINING,
    EvaluateSAESettings: {**{name: TRAINING[name] for name in ("sae_name", "model", "datasets", "activation_factory")}, "sae": {"pretrained_name_or_path": "x"}},
    SweepSAESettings: {
        **{name: TRAINING[name] for name in ("model", "datasets", "activation_factory")},
        "items": [{"sae_name": name, "sae": TRAINING["sae"], "trainer": {"lr": 0.1}, "initializer": {"n_batches": 2}} for name in "ab"],
    },
    GenerateActivationsSettings: {**generation(MATERIAL, Path("cache")), "buffer_shuffle": {"perm_seed": 1}, "override_dtype": "int8"},
    ActivationWriterConfig: {"hook_points": [HOOK], "dtype": "int8", "n_shards": 2, "start_shard": 1},
    SAEConfig: SAEConfig(hook_point_in=HOOK, d_model=16, expansion_factor=4).as_dict(),
    TrainerConfig: TrainerConfig().as_dict(),
    InitializerConfig: InitializerConfig().as_dict(),
    ActivationFactoryConfig: TRAINING["activation_factory"],
    LanguageModelConfig: LanguageModelConfig().as_dict(),
    DatasetConfig: DatasetConfig().as_dict(),
    SyntheticBenchmarkConfig: SyntheticBenchmarkConfig().as_dict(),
}  # fmt: skip


@both
@pytest.mark.parametrize("cls", SETTINGS, ids=lambda cls: cls.__name__)
def test_tables_of_settings(cls: Any, tmp_path: Path, examples: int) -> None:
    """As JSON, which YAML reads too; what is taken can be written and read again."""

    def check(table: dict[str, Any], suffix: str) -> None:
        path = tmp_path / f"settings{suffix}"
        path.write_bytes(json.dumps(table).encode())
        taken = load_settings(cls, path)
        (tmp_path / "again.json").write_text(json.dumps(taken.as_dict(), allow_nan=False))
        assert load_settings(cls, tmp_path / "again.json") == taken

    fuzz(f"settings of {cls.__name__}", check, harmed_tables(SETTINGS[cls]), st.sampled_from([".json", ".json", ".yaml"]), examples=examples)


@both
@pytest.mark.parametrize("suffix", [".toml", ".json", ".yaml"])
def test_bytes_of_settings(tmp_path: Path, suffix: str, examples: int) -> None:
    whole = {".toml": recipe("demo").read_bytes(), ".json": json.dumps(TRAINING, indent=1).encode(), ".yaml": json.dumps(TRAINING, indent=1).encode()}

    def check(data: bytes) -> None:
        path = tmp_path / f"settings{suffix}"
        path.write_bytes(data)
        load_settings(TrainSAESettings, path)

    fuzz(f"bytes of {suffix} settings", check, harmed_bytes(whole[suffix]), examples=examples)


@both
def test_words_of_a_command(examples: int) -> None:
    words = st.lists(st.one_of(st.from_regex(r"--[a-z_.=0-9\[\]{}-]{0,20}", fullmatch=True), WORDS), max_size=5)
    fuzz(
        "options of the command line", lambda given: load_settings(TrainSAESettings, recipe("demo"), parse_overrides(given)), words, examples=examples
    )


# ------------------------------------------------------------------------------------------------------ dictionaries


@pytest.fixture
def sae(tmp_path: Path) -> Path:
    build({"act_fn": "jumprelu", "norm_activation": "inference"}).save_pretrained(tmp_path / "sae")
    return tmp_path / "sae"


@both
def test_tables_of_dictionaries(sae: Path, examples: int) -> None:
    table = json.loads((sae / "config.json").read_text())

    def check(harmed: dict[str, Any], strict: bool) -> None:
        (sae / "config.json").write_text(json.dumps(harmed))
        SparseDictionary.from_pretrained(sae, strict_loading=strict, device="cpu")

    fuzz("config.json of dictionaries", check, harmed_tables(table), st.booleans(), examples=examples)


@both
def test_bytes_of_weights(sae: Path, examples: int) -> None:
    path = sae / "sae_weights.safetensors"
    data = path.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")

    def check(harmed: bytes) -> None:
        path.write_bytes(harmed)
        SparseDictionary.from_pretrained(sae)

    fuzz("bytes of safetensors", check, harmed_bytes(data, header), examples=examples)


@both
def test_headers_of_weights(sae: Path, examples: int) -> None:
    path = sae / "sae_weights.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")

    def check(harmed: dict[str, Any]) -> None:
        text = json.dumps(harmed).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
        SparseDictionary.from_pretrained(sae, strict_loading=False)

    fuzz("headers of safetensors", check, harmed_tables(json.loads(data[8 : 8 + length])), examples=examples)


OTHERS: dict[str, tuple[dict[str, Any], dict[str, torch.Tensor]]] = {
    "sae_lens": (
        {"architecture": "topk", "d_in": 4, "d_sae": 6, "k": 2, "dtype": "float32", "apply_b_dec_to_input": True, "normalize_activations": "none",
         "metadata": {"hook_name": HOOK, "sae_lens_version": "6.0.0"}, "rescale_acts_by_decoder_norm": True},
        {"W_enc": torch.ones(4, 6), "b_enc": torch.zeros(6), "W_dec": torch.ones(6, 4), "b_dec": torch.zeros(4)},
    ),
    "sparsify": (
        {"k": 2, "activation": "topk", "transcode": False, "skip_connection": False},
        {"encoder.weight": torch.ones(6, 4), "encoder.bias": torch.zeros(6), "W_dec": torch.ones(6, 4), "b_dec": torch.zeros(4)},
    ),
    "dictionary_learning": (
        {"trainer": {"dict_class": "AutoEncoderTopK", "k": 2, "submodule_name": "resid_post_layer_0"}},
        {"encoder.weight": torch.ones(6, 4), "encoder.bias": torch.zeros(6), "decoder.weight": torch.ones(4, 6), "b_dec": torch.zeros(4)},
    ),
}  # fmt: skip


@both
@pytest.mark.parametrize("library", OTHERS)
def test_tables_of_other_libraries(tmp_path: Path, library: str, examples: int) -> None:
    from safetensors.torch import save_file

    table, tensors = OTHERS[library]
    config = "config.json" if library == "dictionary_learning" else "cfg.json"
    if library == "dictionary_learning":
        torch.save(tensors, tmp_path / "ae.pt")
    else:
        save_file(tensors, tmp_path / ("sae.safetensors" if library == "sparsify" else "sae_weights.safetensors"))

    def check(harmed: dict[str, Any]) -> None:
        (tmp_path / config).write_text(json.dumps(harmed))
        SparseDictionary.from_pretrained(tmp_path, hook_point_in=HOOK)

    check(table)
    fuzz(f"{config} of {library}", check, harmed_tables(table), examples=examples)


def pt(compressed: bool = False) -> bytes:
    out = io.BytesIO()
    torch.save({"a": torch.arange(12.0).reshape(3, 4), "b": torch.ones(2, dtype=torch.bfloat16)}, out)
    if compressed:
        packed = io.BytesIO()
        with zipfile.ZipFile(out) as whole, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as copied:
            for entry in whole.infolist():
                copied.writestr(entry.filename, whole.read(entry))
        out = packed
    return out.getvalue()


def legacy_pt() -> bytes:
    out = io.BytesIO()
    torch.save({"a": torch.arange(12.0).reshape(3, 4)}, out, _use_new_zipfile_serialization=False)
    return out.getvalue()


def npz(compressed: bool = False) -> bytes:
    out = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(out, W_enc=np.arange(12.0).reshape(3, 4), b_enc=np.ones(4, dtype=np.float32))
    return out.getvalue()


def npy() -> bytes:
    out = io.BytesIO()
    np.save(out, np.arange(12, dtype=np.float32).reshape(3, 4))
    return out.getvalue()


FILES: dict[str, tuple[bytes, Callable[[Path], Any]]] = {
    "a.pt": (pt(), lambda path: tensor_files.read_torch(path, WeightsError)),
    "legacy.pt": (legacy_pt(), lambda path: tensor_files.read_torch(path, WeightsError)),
    "packed.pt": (pt(compressed=True), lambda path: tensor_files.read_torch(path, WeightsError)),
    "a.npz": (npz(), lambda path: tensor_files.read_npz(path, WeightsError)),
    "packed.npz": (npz(compressed=True), lambda path: tensor_files.read_npz(path, WeightsError)),
    "a.npy": (npy(), lambda path: open_activations(str(path), [HOOK]).read(0, [HOOK])),
}


@both
@pytest.mark.parametrize("name", FILES)
def test_bytes_of_tensor_files(tmp_path: Path, name: str, examples: int) -> None:
    data, read = FILES[name]

    def check(harmed: bytes) -> None:
        (tmp_path / name).write_bytes(harmed)
        read(tmp_path / name)

    fuzz(f"bytes of {name}", check, harmed_bytes(data), examples=examples)


# ----------------------------------------------------------------------------------------------------- caches and runs


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    write(folder, dtype="int8")
    return folder


def read_cache(folder: Path) -> None:
    opened = ActivationCache(folder)
    for group in range(min(opened.n_groups, 3)):
        opened.read(group, [HOOK], origin=True)
    opened.contexts(0)


@both
def test_manifests(cache: Path, tmp_path: Path, examples: int) -> None:
    shutil.copytree(cache, tmp_path, dirs_exist_ok=True)
    table = json.loads((cache / MANIFEST_FILE).read_text())

    def check(harmed: dict[str, Any]) -> None:
        (tmp_path / MANIFEST_FILE).write_text(json.dumps(harmed))
        read_cache(tmp_path)

    fuzz("manifests of caches", check, harmed_tables(table), examples=examples)


@both
def test_shards(cache: Path, tmp_path: Path, examples: int) -> None:
    """The manifest agrees with the harmed file's length, so that what is read is looked at."""
    shutil.copytree(cache, tmp_path, dirs_exist_ok=True)
    table = json.loads((cache / MANIFEST_FILE).read_text())
    victim = tmp_path / table["shards"][0]["file"]
    data = victim.read_bytes()

    def check(harmed: bytes) -> None:
        victim.write_bytes(harmed)
        table["shards"][0]["bytes"] = max(8, len(harmed))
        (tmp_path / MANIFEST_FILE).write_text(json.dumps(table))
        read_cache(tmp_path)

    fuzz("bytes of shards", check, harmed_bytes(data, 8 + int.from_bytes(data[:8], "little")), examples=examples)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder, made by the trainer, with what the commands leave there."""
    from lm_saes.training.trainer import Trainer
    from tests.training.synthetic import SyntheticStream, make_dictionary

    folder = tmp_path_factory.mktemp("runs") / "run"
    Trainer(TrainerConfig(total_training_tokens=64 * 4, exp_result_path=str(folder), n_checkpoints=1, log_frequency=1)).fit(
        make_dictionary(), SyntheticStream()
    )
    (folder / "settings.json").write_text(json.dumps({"versions": {}, **TRAINING, "resolved": {}}))
    (folder / "evaluation.json").write_text(json.dumps({"sae": {"metrics/l0": 4.0, "metrics/explained_variance": 0.5}, "pca-8": {"metrics/l0": 8.0}}))
    context = {"tokens": [1, 2], "texts": ["a", "b"], "activations": [0.0, 1.0], "peak": 1}
    (folder / "features.json").write_text(
        json.dumps({"n": 1, "features": [{"index": 0, "density": 0.1, "max_activation": 1.0, "contexts": [context]}]})
    )
    return folder


@both
@pytest.mark.parametrize("name", ["metrics.jsonl", "evaluation.json", "features.json", "settings.json", "failure.json"])
def test_files_of_a_run(run: Path, tmp_path: Path, name: str, examples: int) -> None:
    for path in run.iterdir():
        if path.is_file():
            shutil.copy(path, tmp_path)
    (tmp_path / "failure.json").write_text('{"step": 3, "error": "step 4: NaN"}')
    members = [TrainSAESettings.model_validate(training(MATERIAL, tmp_path))]
    data = (tmp_path / name).read_bytes()

    def check(harmed: bytes) -> None:
        (tmp_path / name).write_bytes(harmed)
        compare(members)
        evaluation_table(read_json(tmp_path / "evaluation.json") or {})
        features = (read_json(tmp_path / "features.json") or {}).get("features")
        for feature in features if isinstance(features, list) else []:
            try:
                Feature.from_dict(feature)
            except ValueError:  # found again, says `features_of_run`
                continue
        settings_of_run(tmp_path)

    fuzz(f"bytes of {name}", check, harmed_bytes(data), examples=examples)


@both
@pytest.mark.parametrize("name", ["state.json", "stream/state.json", "optimizer.safetensors", "config.json"])
def test_files_of_a_checkpoint(run: Path, tmp_path: Path, name: str, examples: int) -> None:
    newest = find_checkpoint(run)
    copied = tmp_path / "checkpoints" / newest.name
    shutil.copytree(newest, copied)
    data = (copied / name).read_bytes()

    def check(harmed: bytes) -> None:
        (copied / name).write_bytes(harmed)
        for read in (lambda: find_checkpoint(tmp_path), lambda: read_checkpoint(copied), lambda: SparseDictionary.from_pretrained(copied)):
            refusal(read)

    fuzz(f"bytes of a checkpoint's {name}", check, harmed_bytes(data), examples=examples)


@pytest.mark.slow
def test_how_many_were_tried() -> None:
    """Runs last: the count of the long form."""
    print(f"\n{sum(TRIED.values()):,} examples in {len(TRIED)} kinds")
    assert sum(TRIED.values()) >= 10_000
