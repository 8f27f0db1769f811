"""Rows that the model writes itself, for when there is no data: LLM-QAT, arXiv 2305.17888, sec. 2.1.

Each row begins with BOS, where the tokenizer adds one, and a random token; the next few are the most likely ones, and
the rest is sampled from the whole distribution at temperature 1. Special tokens are left out, so that every row has
its full length. The whole model is in memory in float32, and every token is one pass over all its weights for 16 rows:
128 rows of 512 tokens take 4096 passes.

Shapes: B rows of a batch, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qtool.calibration.texts import SELF, check_source
from qtool.calibration.tokens import DEFAULT_ROWS, Tokenizer, TokenRows, calibration_rows, make_rows, row_length
from qtool.errors import QtoolError
from qtool.formats.weights import Weights
from qtool.gguf.checkpoint import open_checkpoint
from qtool.models.architectures import architecture_of
from qtool.models.loading import load_config
from qtool.recipe import DataSpec

LIKELIEST = 4  # tokens after the first that are the most likely ones; 3 to 5 in the paper
BATCH = 16  # rows at once: a constant, because float rounding in another batch would make other rows
Progress = Callable[[str, int, int, str], None]


def rows_of(
    spec: DataSpec, root: Path, tokenizer: Tokenizer, context: int, device: torch.device, progress: Progress
) -> TokenRows:
    """Calibration rows from wherever `spec` says, the model itself included."""
    if spec.source == SELF:
        return self_rows(root, spec, tokenizer, device, progress)
    return calibration_rows(spec, tokenizer, context)


def self_rows(
    root: Path, spec: DataSpec, tokenizer: Tokenizer, device: torch.device, progress: Progress = lambda *_: None
) -> TokenRows:
    """`spec.rows` rows of `spec.seqlen` tokens by the model in `root`; the same ones for the same seed and device type.

    Raises QtoolError when the model does not fit into memory or does not give finite logits.
    """
    check_source(spec, calibrating=True)
    model = _whole_model(root, device)
    length = row_length(spec, int(getattr(model.config, "max_position_embeddings", 0) or 2048))
    wanted = spec.rows or DEFAULT_ROWS
    allowed_V = torch.zeros(model.config.vocab_size, dtype=torch.bool)
    allowed_V[: len(tokenizer.inner)] = True
    allowed_V[[i for i in tokenizer.inner.all_special_ids if i < len(allowed_V)]] = False
    chance = torch.Generator().manual_seed(spec.seed)
    rows: list[list[int]] = []
    while len(rows) < wanted:
        progress("generate", len(rows), wanted, f"rows of {length} tokens by the model itself")
        rows += _batch(model, min(BATCH, wanted - len(rows)), length, tokenizer.bos, allowed_V, chance, device)
    progress("generate", wanted, wanted, f"rows of {length} tokens by the model itself")
    return make_rows(rows, SELF)


def _batch(
    model: Any, rows: int, length: int, bos: list[int], allowed_V: Tensor, chance: torch.Generator, device: torch.device
) -> list[list[int]]:
    usable = allowed_V.nonzero().flatten()
    first_B1 = usable[torch.randint(len(usable), (rows, 1), generator=chance)]
    tokens_BT = torch.cat([torch.tensor([bos] * rows, dtype=torch.long).reshape(rows, -1), first_B1], dim=1)
    start, new_BT, cache = tokens_BT.shape[1], tokens_BT, None
    with torch.no_grad():
        while tokens_BT.shape[1] < length:
            output = model(input_ids=new_BT.to(device), past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = output.past_key_values
            logits_BV = output.logits[:, -1].float().cpu()
            if not logits_BV.isfinite().all():
                raise QtoolError("the model's logits are not finite, so it cannot write its own data")
            logits_BV = logits_BV.masked_fill(~allowed_V, -torch.inf)
            if tokens_BT.shape[1] < start + LIKELIEST:
                new_BT = logits_BV.argmax(-1, keepdim=True)
            else:
                new_BT = torch.multinomial(logits_BV.softmax(-1), 1, generator=chance)
            tokens_BT = torch.cat([tokens_BT, new_BT], dim=1)
    return [[int(token) for token in row[:length]] for row in tokens_BT]


def _whole_model(root: Path, device: torch.device) -> Any:
    """The model of a checkpoint in float32, from the tensors of its safetensors files."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # transformers 5.17 draws one on stderr, even in a pipe
    checkpoint = open_checkpoint(root)
    architecture = architecture_of(checkpoint.config, root)
    weights = Weights(checkpoint)
    needed, free = sum(4 * prod(shape) for shape in weights.shapes.values()), _free_bytes(device)
    if free is not None and needed > free:
        raise QtoolError(
            f"`--data self` holds the whole model in memory: {needed / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free",
            "give text with --data, which needs one block at a time",
        )
    try:
        config = load_config(root)
        with torch.device("meta"):
            kind = type(AutoModelForCausalLM.from_config(config))
    except Exception as error:  # a config.json may be wrong in any way
        raise QtoolError(f"transformers cannot use the config of {root}: {' '.join(str(error).split())}") from None
    options = {"attn_implementation": architecture.attention, "dtype": torch.float32}
    model = kind.from_pretrained(None, config=config, state_dict=weights.read(weights.shapes), **options)
    return model.to(device).eval()


def _free_bytes(device: torch.device) -> int | None:
    """Memory for the taking on a device, where that is known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) * 1024
    except (OSError, StopIteration):
        return None
