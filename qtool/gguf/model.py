"""What llama.cpp calls the tensors of a model, how their rows lie, and its hyperparameters, both ways.

Names are those of the `gguf` package's maps, which llama.cpp's own converter uses. llama.cpp (0.3.36 of its Python
package) has no sliding windows in the architectures llama, qwen2, qwen3 and phi3: there `notes` say where a model would
differ, and a file read back has none, but for phi3, whose files name a window that llama.cpp passes over. Never imports
torch.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from qtool.errors import QtoolError, UsageError
from qtool.gguf import attention, hyperparameters, rope
from qtool.gguf.architectures import ARCHITECTURES, HIDDEN, NESTED, SHAPES, Architecture
from qtool.gguf.hyperparameters import Keys

if TYPE_CHECKING:
    import numpy as np

EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
NOT_STORED = (".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias")  # ends of names of buffers
OTHER_MODELS = ("vision_tower.", "multi_modal_projector.")  # beginnings, after an optional `model.`
SPECIAL = ("bos", "eos", "padding")


@dataclass(frozen=True)
class GGUFModel:
    """A model as llama.cpp stores it. Tensor names are those of the checkpoint, as transformers writes them."""

    architecture: str  # of llama.cpp
    name: str
    values: Mapping[str, Any]  # hyperparameters, by their names in config.json
    rope: Mapping[str, Any]  # qtool.gguf.rope
    windows: tuple[bool, ...]  # which blocks have one; empty where llama.cpp knows none
    tied: bool
    biased: frozenset[str]  # modules that have a bias, relative to a block or whole
    notes: tuple[str, ...]  # where llama.cpp computes something else than transformers
    table: Architecture

    @classmethod
    def of_config(cls, config: Mapping[str, Any], name: str | None = None) -> GGUFModel:
        """The model of a config.json; of one that holds several, the language model.

        Raises UsageError saying what llama.cpp cannot do, QtoolError for numbers that are none.
        """
        name = name or PurePath(str(config.get("_name_or_path") or "")).name or "model"
        kind = str(config.get("model_type"))
        if kind in NESTED:
            nested, tied = config.get("text_config"), config.get("tie_word_embeddings", True)
            config = {**(nested if isinstance(nested, Mapping) else {}), "tie_word_embeddings": tied}
            kind = NESTED[kind]
        if kind not in ARCHITECTURES:
            raise UsageError(
                f"qtool cannot write the architecture `{kind}` for llama.cpp", f"it can: {', '.join(ARCHITECTURES)}"
            )
        if any(config.get(key) for key in EXPERTS):
            raise UsageError("qtool writes no mixtures of experts for llama.cpp")
        table = ARCHITECTURES[kind]
        values = hyperparameters.from_config(config, table)
        known = {**table.defaults, **config}
        biased = {module for key, group in table.biases.items() for module in group if not key or config.get(key)}
        attention.check_scale(known, table, values)
        return cls(
            architecture=table.name,
            name=name,
            values=values,
            rope=rope.from_config(config, table, values["head_dim"]),
            windows=attention.windows(known, table, values),
            tied=bool(known.get("tie_word_embeddings", False)),
            biased=frozenset(biased),
            notes=attention.notes(known, table, values),
            table=table,
        )

    @property
    def blocks(self) -> int:
        """How many decoder blocks it has."""
        return int(self.values["num_hidden_layers"])

    @cached_property
    def tensors(self) -> dict[str, str]:
        """What llama.cpp calls each tensor of the checkpoint: all there are, in the order of the model."""
        table = self.table
        first, last = table.outside
        modules = [(first, first)]
        modules += [(f"{table.layers}.{block}.{m}", m) for block in range(self.blocks) for m in table.modules]
        modules += [(last, last)] + [(table.head, table.head)] * (not self.tied)
        names = name_map(table.name, self.blocks)
        found = {}
        for module, relative in modules:
            for part in ("weight", "bias") if relative in self.biased else ("weight",):
                found[f"{module}.{part}"] = f"{names.get_name(module)}.{part}"
        return found

    @cached_property
    def checkpoint_names(self) -> dict[str, str]:
        """The inverse of `tensors`."""
        return {stored: name for name, stored in self.tensors.items()}

    def gguf_name(self, name: str) -> str | None:
        """What llama.cpp calls a tensor of the checkpoint; None for one that is `left_out`.

        Raises UsageError for a tensor that it has no place for.
        """
        if self.left_out(name):
            return None
        own = self._own(name)
        if own not in self.tensors:
            raise UsageError(
                f"llama.cpp has no place for `{name}` in the architecture {self.architecture} with {self.blocks} blocks"
            )
        return self.tensors[own]

    def left_out(self, name: str) -> str | None:
        """Why a tensor of the checkpoint is not in a file, or None."""
        own = self._own(name)
        if self.tied and own == f"{self.table.head}.weight":
            return "tied to the embedding"
        if own.removeprefix("model.").startswith(OTHER_MODELS):
            return "llama.cpp keeps it in another file"
        return "not in a GGUF file" if own.endswith(NOT_STORED) else None

    def problem(self, shapes: Mapping[str, tuple[int, ...]], where: str = "config.json") -> str | None:
        """What llama.cpp misses among tensors of these names and shapes [out, in], or would not load; None if nothing.

        Names are those of the checkpoint, and `where` is what says how the model is; other tensors are passed over.
        """
        given: dict[str, tuple[int, ...]] = {}
        for name, shape in shapes.items():
            own = self._own(name)
            if own in given:
                return f"`{name}` is there twice, under two names"
            given[own] = shape
        lengths = hyperparameters.lengths(self.values)
        for name in self.tensors:
            module, _, part = name.rpartition(".")
            wanted = SHAPES.get(module.rpartition(".")[2], (HIDDEN,))[: 1 if part == "bias" else 2]
            shape = tuple(lengths[length] for length in wanted)
            if name not in given:
                return f"there is no tensor `{name}`, but {where} says {self.architecture} with {self.blocks} blocks"
            if given[name] != shape:
                said = f"[{', '.join(wanted)}] = {list(shape)}"
                return f"`{name}` has the shape {list(given[name])}, but {where} says {said}"
        return None

    def hf_name(self, gguf_name: str) -> str | None:
        """What the checkpoint calls a tensor of llama.cpp; None for one that it does not have (factors of rotary
        embeddings)."""
        return self.checkpoint_names.get(gguf_name)

    def row_order(self, name: str, rows: int) -> list[int] | None:
        """Row i of llama.cpp's tensor is this row of the checkpoint's, weights and biases alike. None: as it is.

        Raises QtoolError where `rows` are not the heads that config.json counts.
        """
        import numpy as np

        module = self._own(name).rpartition(".")[0]
        order = next((o for suffix, o in self.table.rows.items() if module.endswith(f".{suffix}")), None)
        if order is None:
            return None
        heads = self.values[order.heads]
        whole = self.values["head_dim"] * (3 if order.parts == 3 else 1)
        if rows != heads * whole:
            raise QtoolError(f"`{name}` has {rows} rows, which are not {heads} heads of {whole}")
        lying = np.arange(rows).reshape(heads, order.parts, -1).transpose(order.axes)
        return [int(row) for row in lying.reshape(-1)]

    def offset(self, name: str) -> float:
        """What is added to the values on writing: llama.cpp's norms have no 1 + weight."""
        return self.table.norm_offset if self._own(name).endswith("norm.weight") else 0.0

    def metadata(self) -> dict[str, Any]:
        """Keys of the file, without those of the tokenizer, general.file_type and general.quantization_version."""
        keys = hyperparameters.metadata(self.values, self.table)
        if any(self.windows):
            pattern = attention.pattern_of(self.windows, self.table.window_period)
            keys["attention.sliding_window_pattern"] = pattern
        elif self.windows:
            keys["attention.sliding_window"] = 0
        keys |= rope.metadata(self.rope, self.values["head_dim"])
        general = {"general.architecture": self.architecture, "general.type": "model", "general.name": self.name}
        return general | {f"{self.architecture}.{key}": value for key, value in keys.items()}

    def extra(self) -> dict[str, np.ndarray]:
        """Float32 tensors that the file has besides, by llama.cpp's names."""
        return rope.tensors(self.rope, self.values["head_dim"])

    def _own(self, name: str) -> str:
        """A tensor's name as transformers writes it, of the spellings that files use."""
        for there, here in self.table.aliases:
            if name.startswith(there):
                return here + name.removeprefix(there)
        return name


def config_of(
    metadata: Mapping[str, Any], tensor_names: Collection[str], extra: Mapping[str, np.ndarray] | None = None
) -> dict[str, Any]:
    """A config.json for transformers' AutoConfig, of a model that computes what llama.cpp does with this file.

    `extra` are the tensors of a file that rope.TENSORS names. A key that is missing means what llama.cpp takes it for.
    Raises QtoolError naming the key or tensor that is damaged, missing or unknown.
    """
    extra = extra or {}
    name = metadata.get("general.architecture")
    kind = next((kind for kind, table in ARCHITECTURES.items() if table.name == name), None)
    if kind is None:
        known = sorted({table.name for table in ARCHITECTURES.values()})
        raise QtoolError(f"the GGUF file is of architecture {name!r:.60}; qtool reads {', '.join(known)}")
    if metadata.get("general.type", "model") != "model":
        raise QtoolError(f"the GGUF file is no model: its general.type is {metadata['general.type']!r:.60}")
    if metadata.get(f"{name}.expert_count"):
        raise QtoolError("the GGUF file is a mixture of experts, which qtool does not read")
    table = ARCHITECTURES[kind]
    keys = Keys(metadata, table.name)
    values = hyperparameters.from_keys(keys, table)
    given = {tensor: extra[tensor] for tensor in rope.TENSORS if tensor in extra}
    for tensor in set(rope.TENSORS) & set(tensor_names) - set(given):
        raise QtoolError(f"tensor `{tensor}` of the GGUF file was not read")
    rotary = rope.from_keys(keys, table, values["head_dim"], values["max_position_embeddings"], given)
    config = {"model_type": kind, "architectures": [table.causal_lm], **values}
    if not table.head_dim:
        del config["head_dim"]
    config |= {name: allowed[0] for name, allowed in table.fixed.items()}
    names = name_map(table.name, 1)
    for key, group in table.biases.items():
        first = f"{table.layers}.0.{group[0]}"
        if key:
            config[key] = f"{names.get_name(first)}.bias" in tensor_names
    config["tie_word_embeddings"] = table.fixed.get("tie_word_embeddings", ("output.weight" not in tensor_names,))[0]
    config["rope_parameters"] = rope.parameters(rotary)
    if rotary["rope_type"] == "longrope":
        config["original_max_position_embeddings"] = rotary["original_max_position_embeddings"]
    if table.window_period:
        config |= attention.from_keys(keys, table, values)
    for special in SPECIAL:
        token = metadata.get(f"tokenizer.ggml.{special}_token_id")
        inside = isinstance(token, int) and 0 <= token < values["vocab_size"]
        config[f"{special.replace('padding', 'pad')}_token_id"] = token if inside else None
    _check_tensors(GGUFModel.of_config(config), tensor_names)
    return config


def name_map(architecture: str, blocks: int) -> Any:
    """The `gguf` package's tensor names of an architecture of llama.cpp."""
    import gguf

    found = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture)
    return gguf.get_tensor_name_map(found, blocks)


def _check_tensors(model: GGUFModel, there: Collection[str]) -> None:
    """Raises QtoolError for a tensor of the model that the file lacks, or one of the file that the model has not."""
    wanted, given = set(model.checkpoint_names), set(there) - set(rope.TENSORS)
    for name in sorted(wanted - given):
        raise QtoolError(f"the GGUF file has no tensor `{name}`, which every {model.architecture} of its kind has")
    for name in sorted(given - wanted):
        raise QtoolError(f"the GGUF file has a tensor `{name}`, which no {model.architecture} has in transformers")
