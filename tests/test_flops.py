"""Operations of a prefill, held against torch's own counter on real runs."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import transformers
from conftest import FIXTURES
from models import CONFIGS
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from kvpack.cache.flops import Network, network_of_capture, network_of_config
from kvpack.cache.metadata import CaptureMetadata, parse_metadata
from kvpack.capture import Identity, Model, load_model
from kvpack.capture.run import parameters

TOKENS = 24


def counted(network: Any, tokens: int) -> int:
    """Operations of single steps, as torch counts them: each token attends to those before it and no others."""
    network.set_attn_implementation("eager")
    model = Model(Identity("m", "", None, None), network, None)
    cache = DynamicCache(config=network.config)
    ids = torch.arange(tokens)[None] % 200
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        for at in range(tokens):
            model.logits(ids[:, at : at + 1], cache)
    return int(counter.get_total_flops())


def metadata(network: Any, head_dim: int) -> CaptureMetadata:
    """What a capture records of the model."""
    config = network.config
    model = {
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "head_dim": head_dim,
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        **parameters(Model(Identity("m", "", None, None), network, None)),
    }
    return parse_metadata({"model": json.dumps(model)})


def not_matrices(network: Any) -> int:
    """Weights that no token is multiplied by as a matrix: norms, biases but the head's, learned positions."""
    positions = [p for name, p in network.named_parameters() if name.endswith("wpe.weight")]
    vectors = [p for name, p in network.named_parameters() if p.ndim == 1 and not name.startswith("lm_head")]
    total: int = sum(p.numel() for p in vectors + positions)
    return total


@pytest.mark.parametrize("name", CONFIGS)
def test_a_captures_numbers_give_what_torch_counts(name: str) -> None:
    config = CONFIGS[name]()
    network = transformers.AutoModelForCausalLM.from_config(config).eval()
    dims = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    found = network_of_capture(metadata(network, dims))
    assert found is not None
    extra = 2 * not_matrices(network) * TOKENS
    assert found.prediction(TOKENS) - extra == counted(network, TOKENS)
    assert found.prediction(TOKENS) - found.prefill(TOKENS) == 2 * config.vocab_size * config.hidden_size * TOKENS


@pytest.mark.parametrize("name", ["llama-gqa", "llama-mha", "llama-mqa", "qwen3"])
def test_a_configuration_gives_what_torch_counts(name: str) -> None:
    config = CONFIGS[name]()
    network = transformers.AutoModelForCausalLM.from_config(config).eval()
    found = network_of_config(json.loads(config.to_json_string(use_diff=False)))
    assert found is not None
    assert found.prediction(TOKENS) == counted(network, TOKENS)


def test_the_embedded_model() -> None:
    """By configuration and by metadata, which counts norms too: 0.03 percent more."""
    network = load_model(None, device="cpu").network
    by_config = network_of_config(json.loads((FIXTURES / "smollm2-135m-config.json").read_text()))
    by_capture = network_of_capture(metadata(network, 64))
    assert by_config is not None
    assert by_capture is not None
    assert by_capture.weights - by_config.weights == not_matrices(network) == (2 * 30 + 1) * 576
    assert by_config.prediction(TOKENS) == counted(network, TOKENS)


def test_a_prefill_attends_to_each_pair_once() -> None:
    network = Network(layers=3, query_heads=5, head_dim=7, weights=11, output_head=13)
    steps = [2 * 11 + 4 * 3 * 5 * 7 * (at + 1) for at in range(40)]
    assert [network.prefill(n) for n in range(41)] == [sum(steps[:n]) for n in range(41)]


@pytest.mark.parametrize(("name", "billions"), [("llama-3-8b", 8.03), ("llama-3-70b", 70.55)])
def test_larger_configurations_have_their_published_size(name: str, billions: float) -> None:
    """With embedding and output head, which are two matrices; published: 8.03B and 70.6B parameters."""
    found = network_of_config(json.loads((FIXTURES / f"{name}-config.json").read_text()))
    assert found is not None
    assert (found.weights + 2 * found.output_head) / 1e9 == pytest.approx(billions, abs=0.005)


WHOLE = {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "head_dim": 8,
    "hidden_size": 32,
    "vocab_size": 256,
    "parameters": 20000,
    "embedding_parameters": 8192,
}


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("value", [None, 0, -1, "9", True, 1.5, 1 << 70, [], {}])
def test_what_a_capture_does_not_record_is_not_guessed(name: str, value: object) -> None:
    assert network_of_capture(parse_metadata({"model": json.dumps(WHOLE)})) is not None
    assert network_of_capture(parse_metadata({"model": json.dumps({**WHOLE, name: value})})) is None


def test_old_captures_and_other_shapes_have_no_count() -> None:
    assert network_of_capture(parse_metadata({})) is None
    assert network_of_capture(parse_metadata({"model": json.dumps({**WHOLE, "embedding_parameters": 20000})})) is None
    for config in ({}, {"model_type": "gpt2"}, json.loads(CONFIGS["gpt-neox"]().to_json_string(use_diff=False))):
        assert network_of_config(config) is None
