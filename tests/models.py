"""Tiny randomly initialised models, saved with a byte-level tokenizer, so that no hub is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers as t
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

SMALL: dict[str, Any] = {"vocab_size": 256, "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4}
LLAMA = {**SMALL, "intermediate_size": 48, "max_position_embeddings": 512}

CONFIGS: dict[str, Any] = {
    "llama-gqa": lambda: t.LlamaConfig(**LLAMA, num_key_value_heads=2),
    "llama-mha": lambda: t.LlamaConfig(**LLAMA, num_key_value_heads=4),
    "llama-mqa": lambda: t.LlamaConfig(**LLAMA, num_key_value_heads=1),
    "qwen3": lambda: t.Qwen3Config(**LLAMA, num_key_value_heads=2, head_dim=16),
    "gpt-neox": lambda: t.GPTNeoXConfig(**LLAMA, rotary_pct=0.25),
    "phi": lambda: t.PhiConfig(**LLAMA, num_key_value_heads=2),
    "gpt2": lambda: t.GPT2Config(vocab_size=256, n_layer=2, n_embd=32, n_head=4, n_positions=512),
}
"""Grouped, multi-head and multi-query attention, QK-norm, partial rotary, learned positions."""

REFUSED: dict[str, Any] = {
    "mistral-sliding": lambda: t.MistralConfig(**LLAMA, num_key_value_heads=2, sliding_window=16),
    "gemma3-mixed": lambda: t.Gemma3TextConfig(
        **LLAMA,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "mamba": lambda: t.MambaConfig(vocab_size=256, hidden_size=32, num_hidden_layers=2, state_size=4),
}


def save_model(config: Any, folder: Path) -> Path:
    """A model with weights from a fixed seed, and its tokenizer."""
    torch.manual_seed(0)
    t.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    t.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder
