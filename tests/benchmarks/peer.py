"""One model quantized by llm-compressor 0.14, through its `oneshot`, on token rows that it is given.

RECIPE is `METHOD:SCHEME` or `TRANSFORM+METHOD:SCHEME` with a preset of llm-compressor's and its own defaults, such
as `gptq:W4A16`, `awq+rtn:W4A16_ASYM`, `smoothquant+gptq:W8A8`. ROWS is a JSON list of rows of token ids. Prints one
JSON object with the seconds after the imports. Runs under a Python that has llm-compressor, not under qtool's.

    python tests/benchmarks/peer.py MODEL OUT ROWS RECIPE
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

SMOOTHING = 0.8  # as in llm-compressor's own example for W8A8


def modifiers(recipe: str) -> list[Any]:
    """llm-compressor's modifiers for a recipe, in the order in which they run."""
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
    from llmcompressor.modifiers.transform.spinquant import SpinQuantModifier

    steps, _, scheme = recipe.partition(":")
    *transforms, method = steps.split("+")
    before = {
        "awq": AWQModifier,
        "smoothquant": lambda: SmoothQuantModifier(smoothing_strength=SMOOTHING),
        "spinquant": lambda: SpinQuantModifier(rotations=["R1", "R2"], transform_type="hadamard"),
    }
    last = {"rtn": QuantizationModifier, "gptq": GPTQModifier}[method]
    return [*(before[name]() for name in transforms), last(targets="Linear", scheme=scheme, ignore=["lm_head"])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument("rows", type=Path)
    parser.add_argument("recipe")
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.pipelines.cache import IntermediatesCache
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not torch.accelerator.is_available():  # llmcompressor 0.14.0.1 pins memory for AWQ even where nothing can
        IntermediatesCache.pin_memory = lambda self, *_, **__: None
    recipe = modifiers(options.recipe)
    started = time.perf_counter()
    rows = json.loads(options.rows.read_text())
    data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto")
    model = oneshot(
        model=model,
        tokenizer=tokenizer,
        recipe=recipe,
        dataset=data,
        max_seq_length=max(map(len, rows)),
        num_calibration_samples=len(rows),
        shuffle_calibration_samples=False,
    )
    model.save_pretrained(options.out, save_compressed=True)
    tokenizer.save_pretrained(options.out)
    print(json.dumps({"wall_s": time.perf_counter() - started}), flush=True)


if __name__ == "__main__":
    main()
