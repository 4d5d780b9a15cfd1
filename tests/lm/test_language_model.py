"""Loading, refusing, and raw text to activations."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub import errors as hub
from safetensors.torch import load_file, save_file

from lm_saes.config import LanguageModelConfig
from lm_saes.errors import DataError, DeviceError, LanguageModelError
from lm_saes.lm.demo import demo_folder
from lm_saes.lm.huggingface import HuggingFaceLanguageModel
from lm_saes.lm.language_model import TokenizerOnlyLanguageModel, load_model
from tests.lm.test_hook_points import language_model
from tests.lm.tiny_models import CAUSAL, FAMILIES, LAYERS, WIDTH, byte_level_tokenizer, save_tiny, tiny_model, tiny_tokenizer, wordpiece_tokenizer


def config(folder: Path | str, **fields: Any) -> LanguageModelConfig:
    return LanguageModelConfig(model_name=str(folder), device="cpu", **fields)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: save_tiny(family, tmp_path_factory.mktemp("models") / family) for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_is_the_model(family: str, saved: dict[str, Path], capfd: pytest.CaptureFixture[str]) -> None:
    lm = load_model(config(saved[family]))
    assert capfd.readouterr() == ("", "")  # no bars, no chatter
    truth = language_model(family)
    ids = torch.tensor([[0, 9, 40, 33, 120]])
    assert torch.equal(lm.logits(ids), truth.logits(ids))
    assert (lm.d_model, lm.n_layers, lm.max_context, lm.is_causal) == (WIDTH, LAYERS, 64, family in CAUSAL)
    provenance = lm.provenance()
    assert provenance == json.loads(json.dumps(provenance))
    if family != "qwen2":  # transformers puts its own Qwen2Tokenizer, with another splitting rule, in place of the saved one
        assert provenance["tokenizer_hash"] == truth.provenance()["tokenizer_hash"]
    assert provenance["dtype"] == "float32"
    assert provenance["model_name"] == str(saved[family])


def test_the_bundled_model() -> None:
    lm = load_model(config("demo"))
    assert lm.provenance()["model_name"] == "demo"
    assert lm.provenance()["dtype"] == "float32"  # stored in half precision, computed in the dtype asked for
    assert all(parameter.dtype == torch.float32 for parameter in lm.model.parameters())  # pyright: ignore[reportAttributeAccessIssue]
    assert lm.max_context == 512
    assert lm.hook_width(f"blocks.{lm.n_layers // 2}.hook_resid_post") == lm.d_model
    text = "def f(x):\n    return x + 1\n"
    assert "".join(lm.token_texts(lm.tokenize(text).ids)) == text
    assert lm.separator_ids == [lm.eos_token_id]
    assert demo_folder().is_dir()


def test_dtype_and_context_follow_the_configuration(saved: dict[str, Path]) -> None:
    lm = load_model(config(saved["llama"], dtype="bfloat16", max_length=16))
    assert lm.capture(torch.tensor([[1, 2]]), None, ["blocks.0.hook_mlp_out"])["blocks.0.hook_mlp_out"].dtype == torch.bfloat16
    assert lm.max_context == 16
    assert load_model(config(saved["llama"], max_length=4096)).max_context == 64


def test_ids_and_their_overrides(saved: dict[str, Path]) -> None:
    lm = load_model(config(saved["gpt2"]))
    assert (lm.bos_token_id, lm.eos_token_id, lm.pad_token_id, lm.separator_ids) == (0, 0, 1, [0])
    assert lm.special_token_ids == {0, 1}
    changed = load_model(config(saved["gpt2"], bos_token_id=5, eos_token_id=6, pad_token_id=7))
    assert (changed.bos_token_id, changed.eos_token_id, changed.pad_token_id, changed.separator_ids) == (5, 6, 7, [6])
    assert changed.special_token_ids == {0, 1, 5, 6, 7}
    encoder = load_model(config(saved["bert"]))
    assert (encoder.bos_token_id, encoder.eos_token_id, encoder.pad_token_id) == (0, 2, 1)  # [CLS], [SEP], [PAD]
    bare = byte_level_tokenizer()
    bare.bos_token = bare.eos_token = bare.pad_token = None
    none = HuggingFaceLanguageModel.from_model(tiny_model("gpt2"), bare)
    assert (none.bos_token_id, none.eos_token_id, none.pad_token_id, none.separator_ids) == (None, None, None, [])


def test_from_model_keeps_the_model_and_names_it() -> None:
    model = tiny_model("llama")
    lm = HuggingFaceLanguageModel.from_model(model, tiny_tokenizer("llama"))
    assert lm.model is model
    assert lm.cfg.model_name == "LlamaForCausalLM"
    assert lm.cfg.dtype == torch.float32
    with pytest.raises(LanguageModelError, match="no language-model head"):
        HuggingFaceLanguageModel.from_model(model.model, tiny_tokenizer("llama")).logits(torch.tensor([[1]]))


def test_weights_may_lie_elsewhere_than_the_tokenizer(saved: dict[str, Path], tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    lm = load_model(config(saved["llama"], model_from_pretrained_path=tmp_path))
    assert torch.equal(lm.logits(torch.tensor([[3, 4]])), language_model("llama").logits(torch.tensor([[3, 4]])))


# ---------------------------------------------------------------------------------------------- raw text


def test_raw_text_to_activations(saved: dict[str, Path]) -> None:
    lm = load_model(config(saved["llama"]))
    raw = {"text": ["The lazy dog", "x"], "meta": [{"from": "a"}, {"from": "b"}]}
    hook = "blocks.1.hook_resid_post"
    batch = lm.to_activations(raw, [hook])
    ids = [[0, *lm.tokenize(text).ids] for text in raw["text"]]
    length = len(ids[0])
    assert batch["tokens"].tolist() == [ids[0], ids[1] + [1] * (length - len(ids[1]))]
    assert batch["attention_mask"].tolist() == [[True] * length, [True] * len(ids[1]) + [False] * (length - len(ids[1]))]
    assert batch["mask"].tolist() == [[False] + [True] * (length - 1), [False, True] + [False] * (length - 2)]
    assert batch["meta"] == raw["meta"]
    torch.testing.assert_close(batch[hook][0], lm.capture(torch.tensor(ids[:1]), None, [hook])[hook][0], rtol=1e-5, atol=1e-5)
    spans = lm.trace(raw)
    assert [span and raw["text"][0][span[0] : span[1]] for span in spans[0]] == [None, *lm.token_texts(ids[0][1:])]
    assert spans[1] == [None, (0, 1)] + [None] * (length - 2)


def test_n_context_cuts_and_pads(saved: dict[str, Path]) -> None:
    lm = load_model(config(saved["llama"], prepend_bos=False))
    batch = lm.to_activations({"text": ["abcdefgh", "a"]}, ["hook_embed"], n_context=4)
    assert batch["hook_embed"].shape == (2, 4, WIDTH)
    assert batch["attention_mask"].sum(1).tolist() == [4, 1]
    assert [len(row) for row in lm.trace({"text": "abcdefgh"}, n_context=20)] == [20]
    assert len(lm.trace({"text": "z" * 500})[0]) == 64
    with pytest.raises(LanguageModelError, match="n_context must be between 1 and"):
        lm.trace({"text": "a"}, n_context=65)


def test_special_tokens_in_the_text_are_no_positions_of_the_text(saved: dict[str, Path]) -> None:
    lm = load_model(config(saved["llama"], prepend_bos=False))
    raw = {"text": "a<|endoftext|>b"}
    assert lm.to_activations(raw, ["hook_embed"])["mask"].tolist() == [[True, False, True]]
    assert lm.trace(raw) == [[(0, 1), None, (14, 15)]]


def test_encoders_get_their_special_tokens_at_both_ends(saved: dict[str, Path]) -> None:
    lm = load_model(config(saved["bert"], prepend_bos=False))
    batch = lm.to_activations({"text": ["the quick fox " * 40, "the fox"]}, ["blocks.0.hook_resid_post"])
    assert batch["tokens"].shape == (2, 64)
    assert batch["tokens"][:, 0].tolist() == [0, 0]
    assert batch["tokens"][0, -1] == 2
    assert batch["mask"][0].sum() == 62
    lengths = batch["attention_mask"].sum(1)
    assert batch["tokens"][1, lengths[1] - 1] == 2


def test_an_empty_text_without_bos_is_a_row_of_padding(saved: dict[str, Path]) -> None:
    batch = load_model(config(saved["llama"], prepend_bos=False)).to_activations({"text": ["", "ab"]}, ["hook_embed"])
    assert not batch["mask"][0].any()
    assert torch.isfinite(batch["hook_embed"]).all()


@pytest.mark.parametrize("raw", [{}, {"text": []}, {"text": [3]}, {"text": ["a"], "meta": [{}, {}]}])
def test_raw_data_that_is_none(raw: dict[str, Any], saved: dict[str, Path]) -> None:
    with pytest.raises(DataError, match=r"raw data must be|one entry for each"):
        language_model("gpt2").preprocess_raw_data(raw)


def test_tokenizer_only(saved: dict[str, Path]) -> None:
    lm = load_model(config(saved["llama"], backend="tokenizer_only"))
    assert isinstance(lm, TokenizerOnlyLanguageModel)
    assert lm.trace({"text": "ab"}) == load_model(config(saved["llama"])).trace({"text": "ab"})
    calls: list[Callable[[], Any]] = [
        lambda: lm.capture(torch.tensor([[1]]), None, ["hook_embed"]),
        lambda: lm.logits(torch.tensor([[1]])),
        lambda: lm.hook_width("hook_embed"),
        lambda: lm.to_activations({"text": "a"}, ["hook_embed"]),
    ]
    for call in calls:
        with pytest.raises(LanguageModelError, match="tokenizer only"):
            call()
    assert lm.provenance()["tokenizer_hash"] == load_model(config(saved["llama"])).provenance()["tokenizer_hash"]


# ---------------------------------------------------------------------------------------------- what cannot be loaded


def refusal(cfg: LanguageModelConfig) -> str:
    with pytest.raises(LanguageModelError) as error:
        load_model(cfg)
    message = str(error.value)
    assert "\n" not in message
    assert error.value.__cause__ is None
    return message


def response(status: int) -> Any:
    """As much of an HTTP answer as the hub client's errors look at, whichever HTTP library it uses."""
    return SimpleNamespace(status_code=status, headers={}, request=None)


@pytest.mark.parametrize("part", ["tokenizer", "config"])
@pytest.mark.parametrize(
    ("error", "words"),
    [
        (hub.RepositoryNotFoundError("404", response=response(404)), ["no repository 'some/model'", "https://huggingface.co/some/model", "HF_TOKEN"]),
        (hub.GatedRepoError("403", response=response(403)), ["gated", "https://huggingface.co/some/model", "HF_TOKEN", "hf auth login"]),
        (hub.RevisionNotFoundError("404", response=response(404)), ["no such revision", "https://huggingface.co/some/model"]),
        (hub.LocalEntryNotFoundError("offline"), ["not in the local cache", "https://huggingface.co/some/model", "HF_HUB_OFFLINE"]),
        (hub.OfflineModeIsEnabled("offline"), ["not in the local cache", "https://huggingface.co/some/model"]),
        (ConnectionError("no route"), ["not in the local cache"]),
    ],
)
def test_what_the_hub_says_becomes_one_line(part: str, error: Exception, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub client is made to fail; transformers' own handling of that runs for real."""

    def refuse(*_: Any, **__: Any) -> None:
        raise error

    if part == "config":
        monkeypatch.setattr("lm_saes.lm.huggingface.load_tokenizer", lambda cfg: byte_level_tokenizer())
    monkeypatch.setattr("transformers.utils.hub.hf_hub_download", refuse)
    monkeypatch.setattr("transformers.utils.hub.snapshot_download", refuse)
    message = refusal(config("some/model"))
    assert all(word in message for word in words), message


def test_the_hub_is_not_reached_when_offline() -> None:
    assert "not in the local cache" in refusal(config("some/model-that-nobody-has-cached"))


def test_names_that_are_neither_hub_names_nor_folders(tmp_path: Path) -> None:
    assert f"there is no folder {tmp_path}/missing" in refusal(config(tmp_path / "missing"))
    assert "no such folder" in refusal(config("a b/c d"))


def test_folders_without_what_is_needed(saved: dict[str, Path], tmp_path: Path) -> None:
    assert str(tmp_path) in refusal(config(tmp_path))
    tiny_tokenizer("llama").save_pretrained(tmp_path)
    assert "config.json" in refusal(config(tmp_path))
    (tmp_path / "config.json").write_text((saved["llama"] / "config.json").read_text())
    assert "does not hold the model" in refusal(config(tmp_path))
    torch.save(tiny_model("llama").state_dict(), tmp_path / "pytorch_model.bin")  # a pickle is not opened
    assert "safetensors" in refusal(config(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    assert "does not hold the model" in refusal(config(tmp_path))


def test_weights_that_lack_a_tensor_are_not_filled_with_noise(saved: dict[str, Path], tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert "lack 1 tensors of a LlamaForCausalLM, among them model.layers.1.mlp.up_proj.weight" in refusal(config(tmp_path))


def test_a_model_published_without_its_head_has_activations_but_no_logits(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    lm = load_model(config(tmp_path))
    ids, name = torch.tensor([[3, 4]]), "ln_final.hook_normalized"
    assert torch.equal(lm.capture(ids, None, [name])[name], language_model("llama").capture(ids, None, [name])[name])
    with pytest.raises(LanguageModelError, match="no logits"):
        lm.logits(ids)


def test_a_tokenizer_of_another_model(tmp_path: Path) -> None:
    tiny_model("llama", vocab_size=100).save_pretrained(tmp_path)
    byte_level_tokenizer().save_pretrained(tmp_path)
    assert "goes up to id 319 but" in refusal(config(tmp_path))
    with pytest.raises(LanguageModelError, match="embeds 100 tokens"):
        HuggingFaceLanguageModel.from_model(tiny_model("llama", vocab_size=100), byte_level_tokenizer())
    HuggingFaceLanguageModel.from_model(tiny_model("llama"), wordpiece_tokenizer())  # smaller is fine: embeddings are often padded


def test_code_in_a_repository_is_not_run_unasked(saved: dict[str, Path], tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    table = json.loads((tmp_path / "config.json").read_text())
    table |= {"model_type": "its_own", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(table))
    (tmp_path / "code.py").write_text("raise SystemExit('ran')")
    assert "trust_remote_code=True" in refusal(config(tmp_path))


def test_encoder_decoders_are_refused(tmp_path: Path) -> None:
    transformers.T5Config(vocab_size=320).save_pretrained(tmp_path)
    byte_level_tokenizer().save_pretrained(tmp_path)
    assert "encoder-decoder" in refusal(config(tmp_path))


def test_an_absent_device_is_named_before_anything_is_loaded() -> None:
    with pytest.raises(DeviceError):
        load_model(LanguageModelConfig(model_name="some/model", device="cuda:99"))


def test_loading_leaves_the_users_settings_alone(saved: dict[str, Path]) -> None:
    logging = transformers.utils.logging
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    load_model(config(saved["gpt2"]))
    with pytest.raises(LanguageModelError):
        load_model(config("some/model"))
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
    assert logging.set_tqdm_hook(None) is None
