"""Tiny random language models of every supported family, saved in Hugging Face format with a tokenizer trained in-process. Nothing is downloaded.

Weights depend on the family alone; norm weights and biases are perturbed, so that leaving one out shows. Width 32, 3 layers, 4 heads.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "def encode(x):\n    return (x @ W_E + b_E).relu()\n",
    "Sparse autoencoders find features in the residual stream of a language model.",
    "Übung macht den Meister, naïve café, 東京, привет мир.",
    "import math\n\nfor i in range(10):\n    print(i, math.sqrt(i))\n",
]
VOCABULARY, CONTEXT, WIDTH, LAYERS = 320, 64, 32, 3
_COMMON = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT, "initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1,
}  # fmt: skip
_GROUPED = _COMMON | {"num_key_value_heads": 2}
_GEMMA = _GROUPED | {"head_dim": 12}  # heads * head_dim = 48: hook_z is wider than the residual stream
_MOE = _GROUPED | {"num_experts_per_tok": 2}
_ENCODER = _COMMON | {"type_vocab_size": 2}

FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {"vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": 4, "n_positions": CONTEXT,
             "initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", _COMMON),
    "gpt_neox_sequential": ("GPTNeoXConfig", "GPTNeoXForCausalLM", _COMMON | {"use_parallel_residual": False}),
    "llama": ("LlamaConfig", "LlamaForCausalLM", _GROUPED),
    "mistral": ("MistralConfig", "MistralForCausalLM", _GROUPED),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", _GROUPED),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", _GROUPED | {"head_dim": 12}),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", _GEMMA),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", _GEMMA | {"sliding_window": 8}),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", _GEMMA | {"sliding_window": 8}),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", _MOE | {"num_local_experts": 4}),
    "qwen2_moe": ("Qwen2MoeConfig", "Qwen2MoeForCausalLM", _MOE | {"num_experts": 4, "moe_intermediate_size": 24,
                  "shared_expert_intermediate_size": 24}),
    "qwen3_moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", _MOE | {"num_experts": 4, "moe_intermediate_size": 24}),
    "bert": ("BertConfig", "BertForMaskedLM", _ENCODER),
    "roberta": ("RobertaConfig", "RobertaForMaskedLM", _ENCODER | {"max_position_embeddings": CONTEXT + 2}),
    "distilbert": ("DistilBertConfig", "DistilBertForMaskedLM", {"vocab_size": VOCABULARY, "dim": WIDTH, "hidden_dim": 48, "n_layers": LAYERS,
                   "n_heads": 4, "max_position_embeddings": CONTEXT, "initializer_range": 0.2, "pad_token_id": 1}),
}  # fmt: skip
CAUSAL = [name for name in FAMILIES if name not in ("bert", "roberta", "distilbert")]
ENCODERS = ["bert", "roberta", "distilbert"]


def byte_level_tokenizer(vocabulary: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """Byte-level BPE as in GPT-2: `<|endoftext|>` (BOS and EOS) is 0, `<|pad|>` is 1."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    specials = ["<|endoftext|>", "<|pad|>"]
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=specials, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=specials[0], eos_token=specials[0], pad_token=specials[1])


def wordpiece_tokenizer() -> PreTrainedTokenizerFast:
    """WordPiece as in BERT: `[CLS]` 0, `[PAD]` 1, `[SEP]` 2, `[UNK]` 3, `[MASK]` 4, then the characters and some words of `SENTENCES`.

    The vocabulary is listed, not trained: the trainer of the tokenizers library breaks ties by chance.
    """
    specials = ["[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]"]
    normalizer, splitter = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    words = sorted({word for sentence in SENTENCES for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(sentence))})
    characters = sorted({character for word in words for character in word})
    pieces = dict.fromkeys([*specials, *characters, *(f"##{character}" for character in characters), "##es", "##ing", *words[::2]])
    vocabulary = {piece: index for index, piece in enumerate(list(pieces)[:VOCABULARY])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.decoder = normalizer, splitter, decoders.WordPiece()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, cls_token="[CLS]", pad_token="[PAD]", sep_token="[SEP]", unk_token="[UNK]", mask_token="[MASK]"
    )


def tiny_model(family: str, **overrides: Any) -> Any:
    """A random model of the family, in eval mode. `overrides` change its configuration."""
    config_class, model_class, arguments = FAMILIES[family]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = getattr(transformers, model_class)(getattr(transformers, config_class)(**(arguments | overrides)))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def tiny_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """The tokenizer that goes with the family."""
    return wordpiece_tokenizer() if family in ("bert", "distilbert") else byte_level_tokenizer()


def save_tiny(family: str, folder: Path, **overrides: Any) -> Path:
    """Save a tiny random model of the family and its tokenizer into `folder` (made if missing), in Hugging Face format; returns the folder.

    `family` is one of `FAMILIES`. Load it with `LanguageModelConfig(model_name=str(folder))`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        tiny_model(family, **overrides).save_pretrained(folder)
    finally:
        if bars:
            transformers.utils.logging.enable_progress_bar()
    tiny_tokenizer(family).save_pretrained(folder)
    return folder
