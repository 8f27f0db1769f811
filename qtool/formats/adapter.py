"""LoRA adapters beside a model, as PEFT 0.17 has them: a folder with adapter_config.json and adapter_model.safetensors.

Shapes: O out features, I in features, R rank.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from qtool.checkpoint.writer import write_json
from qtool.errors import QtoolError
from qtool.scheme import ActivationScheme

if TYPE_CHECKING:
    from torch import Tensor

    from qtool.models.blockwise import Source

CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."


class Adapted:
    """A source whose linears are changed by an adapter: W + (alpha / R) B A, transposed where they lie so."""

    def __init__(self, source: Source, folder: Path) -> None:
        from safetensors import safe_open

        self.source, self.shapes = source, source.shapes
        try:
            config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
            self.share, self.transposed = float(config["lora_alpha"]) / int(config["r"]), bool(config["fan_in_fan_out"])
            with safe_open(folder / WEIGHTS, framework="pt") as stored:
                self.tensors = {n.removeprefix(PREFIX): stored.get_tensor(n).float() for n in stored.keys()}  # noqa: SIM118
        except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError) as error:
            raise QtoolError(f"{folder} is no LoRA adapter: {' '.join(str(error).split())}") from None
        unknown = sorted(n for n in self.tensors if f"{n.rpartition('.lora_')[0]}.weight" not in self.shapes)
        if unknown:
            raise QtoolError(f"the adapter in {folder} is of another model: it has `{unknown[0]}`")

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        tensors = self.source.read(names)
        for name, tensor in tensors.items():
            module = name.removesuffix(".weight")
            if f"{module}.lora_A.weight" in self.tensors:
                change_OI = self.tensors[f"{module}.lora_B.weight"] @ self.tensors[f"{module}.lora_A.weight"]
                tensor.add_(change_OI.T if self.transposed else change_OI, alpha=self.share)
        return tensors

    def read_rows(self, name: str, rows: Tensor) -> Tensor:
        if f"{name.removesuffix('.weight')}.lora_A.weight" in self.tensors:
            return self.read([name])[name][rows]
        return self.source.read_rows(name, rows)

    def roundings(self, unit: str) -> Mapping[str, tuple[ActivationScheme, Tensor | None]]:
        return self.source.roundings(unit)

    def kv_scales(self, unit: str) -> tuple[ActivationScheme, Tensor, Tensor] | None:
        return self.source.kv_scales(unit)


def write_adapter(folder: Path, tensors: Mapping[str, Tensor], rank: int, transposed: bool) -> None:
    """An adapter of B A [O, I] on whatever model it is loaded onto; `transposed`: that stores its weights [in, out]."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    modules = sorted({name.removeprefix(PREFIX).rpartition(".lora_")[0] for name in tensors})
    targets = sorted({module.rpartition(".")[2] for module in modules})
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": None, "r": rank, "lora_alpha": rank,
        "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": transposed, "inference_mode": True,
        "target_modules": targets,
    }  # fmt: skip
    write_json(folder / CONFIG, config)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS, {"format": "pt"})
