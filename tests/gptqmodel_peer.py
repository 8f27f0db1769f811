"""Runs gptqmodel in a process of its own, for test_format_gptq_awq: it leaves threads behind and takes long to import.

`load FOLDER...` (with gptqmodel) and `transformers FOLDER...` write what they take each quantized weight and the logits
of TOKENS for, in float16, to FOLDER/peer.safetensors. `quantize MODEL (OUT OPTIONS)...` quantizes MODEL to each OUT.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TORCHDYNAMO_DISABLE": "1"}
os.environ |= {"GPTQMODEL_CPU_WORKERS": "2"}  # gptqmodel 7.7 wants two and gives itself one where there are two cores

import torch
from safetensors.torch import save_file

TOKENS = torch.arange(0, 300, 7)[None]


def load(folder: str) -> torch.nn.Module:
    from gptqmodel import BACKEND, GPTQModel

    backend = BACKEND.AWQ_TORCH if method_of(folder) == "awq" else BACKEND.GPTQ_TORCH
    return GPTQModel.load(folder, device="cpu", backend=backend, dtype=torch.float16).model


def load_with_transformers(folder: str) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM, AwqConfig, GPTQConfig

    ours = AwqConfig(backend="torch_awq") if method_of(folder) == "awq" else GPTQConfig(bits=4, backend="gptq_torch")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16, quantization_config=ours)


def method_of(folder: str) -> str:
    with open(f"{folder}/config.json") as file:
        return json.load(file)["quantization_config"]["quant_method"]


@torch.inference_mode()
def write_weights(folder: str, model: torch.nn.Module) -> None:
    from gptqmodel.nn_modules.qlinear import BaseQuantLinear

    found = {"logits": model(TOKENS).logits.contiguous()}
    for name, module in model.named_modules():
        if isinstance(module, BaseQuantLinear):
            module.bias = None
            found[name] = module(torch.eye(module.in_features, dtype=torch.float16)).T.contiguous()
    save_file(found, f"{folder}/peer.safetensors")


def quantize(model: str, out: str, options: dict[str, Any]) -> None:
    from gptqmodel import GPTQModel
    from gptqmodel.quantization.config import AWQConfig, GPTQConfig

    rows = torch.randint(0, 300, (16, 64), generator=torch.Generator().manual_seed(0)).tolist()
    config = {"gptq": GPTQConfig, "awq": AWQConfig}[options.pop("method")]
    loaded = GPTQModel.load(model, config(device="cpu", offload_to_disk=False, **options))
    loaded.quantize([{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows], batch_size=1)
    loaded.save(out)


def main(what: str, *arguments: str) -> None:
    if what == "quantize":
        for out, options in zip(arguments[1::2], arguments[2::2], strict=True):
            quantize(arguments[0], out, json.loads(options))
        return
    for folder in arguments:
        write_weights(folder, load(folder) if what == "load" else load_with_transformers(folder))


if __name__ == "__main__":
    status = 1
    try:
        main(*sys.argv[1:])
        status = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
