"""Fixtures that make tiny checkpoints, tokenizers and texts: no network, a few tenths of a second each.

What they return is shared by the whole session: a test that changes files copies the folder first.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side, and small products gain nothing from threads
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from hypothesis import settings

settings.register_profile("same", derandomize=True)  # `--hypothesis-profile default` looks for new cases
settings.load_profile("same")

VOCABULARY = 320  # rows of the embedding: more than the tokenizer has, as in many real models
TOKENS = 300  # of the tokenizer
BOS, EOS = "<s>", "</s>"
WORDS = """
    weight scale group block column error tensor layer model token round grid search code bits nearest value
    matrix input output moment factor order damping shard header journal recipe scheme method format the a of
    in and to is that for with each one two four eight every after before between never always
""".split()  # noqa: SIM905 (shorter than a list)

SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,  # large enough that attention and logits are far from flat
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
# What each architecture has besides: small windows, so that rows of 32 tokens feel them. None: it has no such field.
OWN: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "qwen3": {"head_dim": 32},
    "gemma2": {
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 8,
        "final_logit_softcapping": 5.0,
        "attn_logit_softcapping": 1.0,
    },
    "gemma3_text": {
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "phi3": {"sliding_window": 8, "original_max_position_embeddings": 128},
    "gpt_neox": {"num_key_value_heads": None},
    "gpt2": {"num_key_value_heads": None, "intermediate_size": None, "n_inner": 128},
    "opt": {"num_key_value_heads": None, "intermediate_size": None, "ffn_dim": 128, "init_std": 0.1},
}

MakeModel = Callable[..., Path]


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    """A byte-level BPE tokenizer of 300 tokens, trained here, that puts `<s>` before every text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENS,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences(200), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, 0)]
    )
    assert tokenizer.get_vocab_size() == TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        model_max_length=SMALL["max_position_embeddings"],
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> MakeModel:
    """`make_model(kind="llama", dtype="bfloat16", tied=True, shards=False, **overrides) -> Path`.

    A folder with a random model of two layers (hidden 64, intermediate 128, 4 heads on 2 key-value heads,
    vocabulary 320) and a tokenizer of 300 tokens, as `save_pretrained` writes it. `kind` is a key of
    ARCHITECTURES; `overrides` are fields of its config. With `shards`, several files and an index. Norms and
    biases are random as well. The same arguments give the same folder: copy it before changing it.
    """
    made: dict[str, Path] = {}

    def make(
        kind: str = "llama", dtype: str = "bfloat16", tied: bool = True, shards: bool = False, **overrides: Any
    ) -> Path:
        key = json.dumps([kind, dtype, tied, shards, overrides], sort_keys=True)
        if key not in made:
            folder = tmp_path_factory.mktemp(f"{kind}-{dtype}-{'tied' if tied else 'untied'}")
            build_model(kind, tied, overrides).to(getattr(torch, dtype)).save_pretrained(
                folder, max_shard_size="60KB" if shards else "1GB"
            )
            tiny_tokenizer.save_pretrained(folder)
            made[key] = folder
        return made[key]

    return make


@pytest.fixture(scope="session")
def calibration_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .jsonl file with a `text` field: 150 short texts, well over 60 rows of 32 tokens of the tiny tokenizer."""
    path = tmp_path_factory.mktemp("text") / "calibration.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in sentences(150)), encoding="utf-8")
    return path


def build_model(kind: str, tied: bool, overrides: dict[str, Any]) -> torch.nn.Module:
    """A random float32 model in which no parameter is trivial; the same for the same arguments."""
    from transformers import AutoConfig, AutoModelForCausalLM

    own = {key: value for key, value in {**SMALL, **OWN[kind]}.items() if value is not None}
    config = AutoConfig.for_model(kind, **{**own, "tie_word_embeddings": tied, **overrides})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def sentences(count: int) -> list[str]:
    """Made-up sentences of known words; the same ones every time."""
    chance = random.Random(0)
    return [" ".join(chance.choices(WORDS, k=chance.randint(8, 24))) + "." for _ in range(count)]
