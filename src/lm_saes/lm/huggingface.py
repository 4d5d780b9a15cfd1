"""Hugging Face models, read and edited through forward hooks. The only file that imports transformers."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Self

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from lm_saes.config import LanguageModelConfig
from lm_saes.devices import FastLinear, resolve_device
from lm_saes.errors import LanguageModelError, LmSaesError
from lm_saes.files import inside, read_json_object
from lm_saes.hub import explain
from lm_saes.lm import tokenization
from lm_saes.lm.demo import DEMO_NAME, demo_folder
from lm_saes.lm.hook_points import HookPoints
from lm_saes.lm.hooks import capture, edited, evaluating
from lm_saes.lm.language_model import MLP, Edit, LanguageModel, forward_errors

_MLP_ROWS = 1024
"""Rows that go through an MLP at a time."""


class HuggingFaceLanguageModel(LanguageModel):
    """A causal or encoder model of the transformers library.

    Hook points are the names of `lm_saes.lm.hook_points`: TransformerLens-style ones for GPT-2, GPT-NeoX, Llama, Mistral, Qwen 2 and 3, Gemma 1 to 3,
    Mixtral, the Qwen mixtures of experts, BERT, RoBERTa and DistilBERT (and models built like them), and the path of any module of any model.

    Raises:
        LanguageModelError: the model cannot be loaded, or its tokenizer does not belong to it.
        DeviceError: the device does not exist here.
    """

    def __init__(self, cfg: LanguageModelConfig) -> None:
        device = resolve_device(cfg.device)  # before anything is downloaded
        tokenizer = load_tokenizer(cfg)
        self._adopt(_load_weights(cfg).to(device), tokenizer, cfg)

    @classmethod
    def from_model(cls, model: nn.Module, tokenizer: Any, cfg: LanguageModelConfig | None = None) -> Self:
        """A model that is already loaded: quantised, spread over devices, with adapters. It is neither moved nor changed.

        Raises:
            LanguageModelError: the tokenizer does not belong to the model.
        """
        config: Any = model.config
        if cfg is None:
            cfg = LanguageModelConfig(model_name=getattr(config, "name_or_path", "") or type(model).__name__, dtype=_dtype_of(model))
        self = cls.__new__(cls)
        self._adopt(model, tokenizer, cfg)
        return self

    def _adopt(self, model: nn.Module, tokenizer: Any, cfg: LanguageModelConfig) -> None:
        super().__init__(cfg, tokenizer)
        self.model = model
        self.location = _location(cfg)
        config: Any = model.config
        text_config = config.get_text_config()
        self._embedding: Any = model.get_input_embeddings()  # pyright: ignore[reportCallIssue]
        self.device = self._embedding.weight.device
        self.d_model = int(text_config.hidden_size)
        self.n_layers = int(text_config.num_hidden_layers)
        self.is_causal = _is_causal(config, type(model).__name__)
        self._position_offset = _position_offset(model)
        limit = getattr(text_config, "max_position_embeddings", None)
        self._position_limit = None if limit is None else int(limit) - self._position_offset
        self.max_context = min(cfg.max_length, self._position_limit or cfg.max_length)
        self.hook_points = HookPoints(model, text_config)
        self._widths: dict[str, int] = {}
        unwrapped: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # pyright: ignore[reportCallIssue]
        self._parameters = frozenset(inspect.signature(unwrapped.forward).parameters)
        largest, rows = tokenization.largest_id(tokenizer), int(self._embedding.weight.shape[0])
        if largest >= rows:
            raise LanguageModelError(
                f"the tokenizer goes up to id {largest} but {cfg.model_name} embeds {rows} tokens; use the model's own tokenizer"
            )

    # ------------------------------------------------------------------------------------------ running

    def inputs(self, ids: Tensor, attention_mask: Tensor | None) -> dict[str, Any]:
        """Arguments of the model's forward for rows of ids, on its device; checks what would otherwise fail deep inside it."""
        if ids.ndim != 2 or (attention_mask is not None and attention_mask.shape != ids.shape):
            shape = None if attention_mask is None else tuple(attention_mask.shape)
            raise LanguageModelError(f"ids must be [rows, positions] and the attention mask of the same shape, got {tuple(ids.shape)} and {shape}")
        if self._position_limit is not None and ids.shape[1] > self._position_limit:
            raise LanguageModelError(f"{self.cfg.model_name} takes at most {self._position_limit} tokens in a row, got {ids.shape[1]}")
        largest = int(self._embedding.weight.shape[0]) - 1
        if not ids.is_cuda and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) <= largest:  # asking a GPU would make it wait
            given = f"{int(ids.min())} to {int(ids.max())}"
            raise LanguageModelError(
                f"token ids must be between 0 and {largest} for {self.cfg.model_name}, got {given}; use text that was tokenised for this model"
            )
        inputs: dict[str, Any] = {"input_ids": ids.to(self.device)}
        if "use_cache" in self._parameters:
            inputs["use_cache"] = False
        if attention_mask is not None and not bool(attention_mask.all()):  # a full mask costs time and means nothing
            mask = attention_mask.to(self.device, torch.long)
            inputs["attention_mask"] = mask
            if "position_ids" in self._parameters:  # count tokens, not padding, whichever side that is on
                inputs["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0) + self._position_offset
        return inputs

    @torch.no_grad()  # not inference mode: a dictionary is trained on what is captured
    def capture(self, ids: Tensor, attention_mask: Tensor | None, hook_points: Sequence[str]) -> dict[str, Tensor]:
        inputs = self.inputs(ids, attention_mask)
        sites = {hook_point: self.hook_points.site(hook_point) for hook_point in hook_points}
        if not sites:
            return {}
        with forward_errors(self.cfg.model_name, ids), evaluating(self.model), FastLinear():
            captured = capture(self.model, sites, lambda: self.model(**inputs))
        return {name: tensor.to(self.device) for name, tensor in captured.items()}

    @torch.no_grad()
    def logits(self, ids: Tensor, attention_mask: Tensor | None = None, edits: Mapping[str, Edit] | None = None) -> Tensor:
        inputs = self.inputs(ids, attention_mask)
        sites = {name: (self.hook_points.site(name), edit) for name, edit in (edits or {}).items()}
        errors = nullcontext() if edits else forward_errors(self.cfg.model_name, ids)  # what an edit raises is its own
        with errors, evaluating(self.model), edited(self.model, sites), FastLinear():
            if self.is_causal:
                output = self.model(**inputs)
            else:
                output = self.model(**inputs, output_hidden_states=True)
        result = getattr(output, "logits", None) if self.is_causal else output.hidden_states[-1]
        if result is None:
            raise LanguageModelError(f"{type(self.model).__name__} has no language-model head, so there are no logits; use a model that has one")
        return result

    def hook_width(self, hook_point: str) -> int:
        if hook_point not in self._widths:  # the one way that holds for every module: look
            ids = torch.tensor([[self.bos_token_id or 0]])
            self._widths[hook_point] = int(self.capture(ids, None, [hook_point])[hook_point].shape[-1])
        return self._widths[hook_point]

    def mlp(self, layer: int) -> MLP:
        linear, parts = self.hook_points.mlp(layer)
        weight: Any = None if linear is None else linear.weight
        neurons = None if weight is None else (weight.T if isinstance(linear, Conv1D) else weight).detach().float()

        @torch.no_grad()
        def respond(x: Tensor) -> Tensor:
            answers = []
            with evaluating(self.model):
                for rows in x.split(_MLP_ROWS):
                    h = rows.to(self._embedding.weight)[None]
                    for part in parts:
                        h = part(h)
                        h = h[0] if isinstance(h, tuple) else h  # a mixture of experts may give its routing too
                    answers.append(h[0].to(x.device, torch.float32))
            return torch.cat(answers)

        before = "hook_resid_mid" if self.hook_points.normalizes_after else "ln2.hook_normalized"
        return MLP(f"blocks.{layer}.{before}", f"blocks.{layer}.hook_mlp_out", neurons, respond)

    def provenance(self) -> dict[str, Any]:
        config: Any = self.model.config
        return {
            "model_name": self.cfg.model_name,
            "revision": getattr(config, "_commit_hash", None) or self.cfg.revision,
            "architecture": type(self.model).__name__,
            "model_type": config.model_type,
            "n_layers": self.n_layers,
            "d_model": self.d_model,
            "dtype": str(_dtype_of(self.model)).removeprefix("torch."),
            "tokenizer_hash": self.tokenizer_hash,
            "hook_width_source": "a forward pass of one token",
            "backend": "huggingface",
            **({} if self.cfg.random_weights is None else {"random_weights": self.cfg.random_weights}),
        }


# ---------------------------------------------------------------------------------------------- facts about a model


def _dtype_of(model: nn.Module) -> torch.dtype:
    return next((parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()), torch.float32)


def _is_causal(config: Any, *class_names: str) -> bool:
    """Whether a model predicts the next token. BERT and its kin can be built either way; the class that was saved decides."""
    names = [*class_names, *(getattr(config, "architectures", None) or [])]
    for name in names:
        if "MaskedLM" in name:
            return False
        if "CausalLM" in name or "LMHead" in name or "ConditionalGeneration" in name:
            return True
    return bool(getattr(config, "is_decoder", False)) or config.model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES


def _position_offset(model: nn.Module) -> int:
    """RoBERTa and its kin begin to count positions behind the padding index."""
    for path, module in model.named_modules():
        if path.endswith("embeddings.position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return int(module.padding_idx) + 1  # pyright: ignore[reportArgumentType]
    return 0


# ---------------------------------------------------------------------------------------------- loading


def _location(cfg: LanguageModelConfig) -> str:
    """Where the weights are: a folder or a name on the hub."""
    if cfg.model_from_pretrained_path is not None:
        return cfg.model_from_pretrained_path
    return str(demo_folder()) if cfg.model_name == DEMO_NAME else cfg.model_name


def _source(cfg: LanguageModelConfig) -> dict[str, Any]:
    return {
        "cache_dir": cfg.cache_dir,
        "local_files_only": cfg.local_files_only,
        "revision": cfg.revision,
        "trust_remote_code": cfg.trust_remote_code,
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """No bar for reading weights from disk and no chatter; downloads keep their bar. The user's settings come back afterwards."""
    logging = transformers.utils.logging
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    hook = logging.set_tqdm_hook(lambda factory, args, kwargs: factory(*args, **{**kwargs, "disable": True}))
    try:
        yield
    finally:
        logging.set_tqdm_hook(hook)
        logging.set_verbosity(verbosity)


def load_tokenizer(cfg: LanguageModelConfig) -> Any:
    """The model's tokenizer: beside its weights, else at `model_name`.

    Raises:
        LanguageModelError: it cannot be loaded.
    """
    location = _location(cfg)
    if Path(location).is_dir() and cfg.model_name != DEMO_NAME and not any((Path(location) / name).is_file() for name in _TOKENIZER_FILES):
        location = cfg.model_name
    try:
        with _quiet():
            return transformers.AutoTokenizer.from_pretrained(location, **_source(cfg))
    except Exception as error:  # of transformers, tokenizers, the hub and the disk: they have no common base
        raise explain(error, location, "the tokenizer") from None


_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")


def _check_index(folder: Path) -> None:
    """The index of a model cut into several files names files in its folder only. (What comes from the hub is checked by its client.)

    Raises:
        LanguageModelError: it names others, or is not an index.
    """
    for path in folder.glob("*.safetensors.index.json"):
        names = read_json_object(path, LanguageModelError).get("weight_map")
        for name in set(map(str, names.values())) if isinstance(names, dict) else ():
            inside(folder, name, LanguageModelError, str(path))


def _load_weights(cfg: LanguageModelConfig) -> nn.Module:
    location = _location(cfg)
    if Path(location).is_dir():
        _check_index(Path(location))
    try:
        with _quiet():
            config = transformers.AutoConfig.from_pretrained(location, **_source(cfg))
            if getattr(config, "is_encoder_decoder", False):
                raise LanguageModelError(f"{location} is an encoder-decoder model ({config.model_type}); causal and encoder models are supported")
            auto = transformers.AutoModelForCausalLM if _is_causal(config) else transformers.AutoModel
            if cfg.random_weights is not None:
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(cfg.random_weights)
                    return auto.from_config(config, dtype=cfg.dtype, trust_remote_code=cfg.trust_remote_code).eval()
            loaded: Any = auto.from_pretrained(
                location, config=config, dtype=cfg.dtype, use_safetensors=True, output_loading_info=True, **_source(cfg)
            )
    except LmSaesError:
        raise
    except Exception as error:  # as for the tokenizer
        raise explain(error, location, "the model") from None
    model, report = loaded
    missing = sorted(name for name in report["missing_keys"] if "pooler" not in name)  # BERT's pooler comes after the last hidden state
    head = model.get_output_embeddings()
    if missing and all(model.get_submodule(name.rpartition(".")[0]) is head for name in missing):
        model, missing = model.base_model, []  # published without its head: everything but logits is there
    if missing:
        raise LanguageModelError(f"the weights of {location} lack {len(missing)} tensors of a {type(model).__name__}, among them {missing[0]}")
    return model.eval()
