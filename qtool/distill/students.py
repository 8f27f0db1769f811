"""The first weights of a student that is cut out of its teacher, written tensor by tensor.

Layers stay as they are; the less important ones are those that change the hidden states least (block influence,
ShortGPT, arXiv 2403.03853, sec. 3.2). Of widths those channels stay that are most active (Minitron, arXiv
2407.14679, sec. 2.2): of the hidden states by the mean magnitude of the norms' outputs, all blocks together, because
one residual stream goes through all; of the MLP by that of what enters its last linear; of heads by the root mean
square of their outputs. With grouped-query attention whole groups go, and inside a group the least active heads.

Shapes: N tokens, L blocks, E hidden size, H heads, D size of a head, M size of the MLP.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qtool.calibration.rows import Rows
from qtool.calibration.stats import VECTORS
from qtool.calibration.tokens import TokenRows
from qtool.checkpoint.beside import rest_of_files
from qtool.checkpoint.writer import Safetensors, StagedOutput, write_json
from qtool.distill.cut import Cut
from qtool.formats.weights import Weights
from qtool.headers import TORCH_NAMES
from qtool.models.blockwise import BlockModel
from qtool.models.loading import config_tree, load_config, load_tokenizer
from qtool.models.widths import EACH_HEAD, HIDDEN, KEY, MLP, QUERY, Sizes
from qtool.plan import unit_of

Progress = Callable[[str, int, int, str], None]


@dataclass
class Importance:
    """What the teacher's parts do, over the tokens of some rows."""

    blocks_L: Tensor  # 1 - mean cosine of what enters and what leaves
    hidden_E: Tensor
    heads_LH: Tensor
    mlp_LM: Tensor


@dataclass(frozen=True)
class Choice:
    """What of the teacher stays: its blocks, and the indexes along each kind of axis, for every block that stays."""

    blocks: list[int]
    hidden: list[int]
    heads: list[list[int]]  # of queries; one list for each block
    kv_heads: list[list[int]]
    mlp: list[list[int]]

    def to_tree(self) -> dict[str, Any]:
        return {"blocks": self.blocks, "hidden": self.hidden, "heads": self.heads, "kv_heads": self.kv_heads,
                "mlp": self.mlp}  # fmt: skip


def measure(model: BlockModel, rows: TokenRows, heads: int, batch_tokens: int, progress: Progress) -> Importance:
    """Run the teacher over the rows, block by block."""
    stream = Rows(model, rows, batch_tokens, cross=False)
    attention, output, up, down = (source.linears[0] for source in model.architecture.inputs)
    influence: list[Tensor] = []
    hidden_E: Tensor | None = None
    heads_L: list[Tensor] = []
    mlp_L: list[Tensor] = []
    for index in range(len(model.blocks)):
        name = model.block_name(index)
        with model.block(index) as block:
            stream.enter(index)
            before = list(stream.stream.hidden)
            stats = stream.measure(block, [attention, output, up, down], {VECTORS}, advance=True)
        influence.append(1 - _mean_cosine(before, stream.stream.hidden))
        moments = {linear: stats[linear].moments(f"{name}.{linear}") for linear in stats}
        for linear in (attention, up):
            vectors = moments[linear].vectors
            assert vectors
            hidden_E = vectors.mean_abs_I.double() + (0 if hidden_E is None else hidden_E)
        square_HD = moments[output].diagonal_I.double().reshape(heads, -1)
        heads_L.append(square_HD.sum(1).sqrt())
        vectors = moments[down].vectors
        assert vectors
        mlp_L.append(vectors.mean_abs_I.double())
        progress("importance", index + 1, len(model.blocks), f"{name}: influence {float(influence[-1]):.4f}")
    assert hidden_E is not None
    return Importance(*(x.cpu() for x in (torch.stack(influence), hidden_E, torch.stack(heads_L), torch.stack(mlp_L))))


def choose(cut: Cut, importance: Importance | None) -> Choice:
    """What stays; without importance all but the blocks that the cut leaves out."""
    before, after = cut.before, cut.after
    if cut.blocks is not None:
        blocks = list(cut.blocks)
    else:
        assert importance
        blocks = largest(importance.blocks_L, after.blocks)
    if importance is None:
        assert not cut.is_narrower
        every = {n: list(range(n)) for n in (before.hidden, before.heads, before.kv_heads, before.mlp)}
        return Choice(blocks, every[before.hidden], *([every[n]] * len(blocks) for n in (
            before.heads, before.kv_heads, before.mlp)))  # fmt: skip
    heads, kv_heads = [], []
    for block in blocks:
        groups, members = _heads(importance.heads_LH[block], before.kv_heads, after.kv_heads, after.heads)
        kv_heads.append(groups)
        heads.append(members)
    mlp = [largest(importance.mlp_LM[block], after.mlp) for block in blocks]
    return Choice(blocks, largest(importance.hidden_E, after.hidden), heads, kv_heads, mlp)


def largest(scores: Tensor, count: int) -> list[int]:
    """The indexes of the `count` largest, in order; of equal ones the first."""
    return sorted(scores.argsort(descending=True, stable=True)[:count].tolist())


def _heads(scores_H: Tensor, groups: int, wanted_groups: int, wanted: int) -> tuple[list[int], list[int]]:
    """The groups that stay and their heads: as many of each group, the groups whose best heads are the best."""
    scores_GS = scores_H.reshape(groups, -1)
    each = wanted // wanted_groups
    kept = largest(scores_GS.sort(dim=1, descending=True).values[:, :each].sum(1), wanted_groups)
    size = scores_GS.shape[1]
    return kept, [group * size + head for group in kept for head in largest(scores_GS[group], each)]


def student_tensor(cut: Cut, choice: Choice, weights: Weights, name: str) -> Tensor:
    """One tensor of the student, in the type of the cut; what is not narrower has the very bytes of the teacher."""
    source, block, axes = cut.source(name, choice.blocks)
    dtype = getattr(torch, TORCH_NAMES[cut.infos[name].dtype]) if cut.infos[name].dtype in TORCH_NAMES else None
    is_packed = source.removesuffix(".weight") in weights.schemes
    if source in weights.checkpoint.tensors and not is_packed:
        value = weights.checkpoint.read(source)
    else:
        value = weights.read([source])[source]
    for axis, parts in enumerate(axes):
        if parts:
            value = value.index_select(axis, torch.tensor(_indexes(cut.before, choice, block, parts)))
    return value if dtype is None else value.to(dtype)


def _indexes(before: Sizes, choice: Choice, block: int | None, parts: tuple[str, ...]) -> list[int]:
    """What stays along an axis with these parts one after the other."""
    kept: list[int] = []
    start = 0
    for part in parts:
        width = before.head_dim
        if part == HIDDEN:
            chosen = choice.hidden
        else:
            assert block is not None
            chosen = {MLP: choice.mlp, QUERY: choice.heads, KEY: choice.kv_heads, EACH_HEAD: choice.heads}[part][block]
        if part in (HIDDEN, MLP):
            width = 1
        elif part == EACH_HEAD:
            width = 3 * before.head_dim
        kept += [start + index * width + inner for index in chosen for inner in range(width)]
        start += before.count(part)
    return kept


def student_config(cut: Cut, choice: Choice, home: Path) -> dict[str, Any]:
    """config.json of the student of a teacher at `home`: its sizes, and what is said of each layer by itself."""
    config = {**config_tree(home), **cut.config_changes}
    config.pop("quantization_config", None)
    if len(choice.blocks) != cut.before.blocks:
        kinds = getattr(load_config(home), "layer_types", None)
        if kinds:
            config["layer_types"] = [kinds[block] for block in choice.blocks]
        if isinstance(first := config.get("max_window_layers"), int):
            config["max_window_layers"] = sum(block < first for block in choice.blocks)
    return config


def write_student(
    folder: Path, cut: Cut, choice: Choice, weights: Weights, identity: Mapping[str, Any], progress: Progress
) -> None:
    """Write the student into a folder of its own, whole or not at all; interrupted, it goes on.

    Its memory is one tensor.
    """
    staged = StagedOutput(folder, Safetensors().files(list(cut.infos.values())), identity, force=True)
    units = units_of(cut.infos)
    for number, (unit, names) in enumerate(units.items(), 1):
        if unit not in staged.done:
            for name in names:
                staged.write(name, student_tensor(cut, choice, weights, name))
            staged.finish_unit(unit, {})
        progress("student", number, len(units), unit)
    home = weights.checkpoint.home
    write_json(staged.folder / "config.json", student_config(cut, choice, home))
    staged.write_index()
    staged.copy_files(rest_of_files(weights.checkpoint))
    if home.is_file():
        load_tokenizer(home).save_pretrained(staged.folder)
    staged.publish(
        {"identity": identity, "choice": choice.to_tree(), "files": [{"name": p.name} for p in staged.files()]}
    )


def units_of(names: Iterable[str]) -> dict[str, list[str]]:
    """The tensors in the units in which they are written."""
    units: dict[str, list[str]] = {}
    for name in names:
        units.setdefault(unit_of(name), []).append(name)
    return units


def _mean_cosine(before: list[Tensor], after: list[Tensor]) -> Tensor:
    """Over all tokens of all batches [B, T, E], float64."""
    cosines = [
        torch.nn.functional.cosine_similarity(x.double(), y.double(), dim=-1).flatten()
        for x, y in zip(before, after, strict=True)
    ]
    return torch.cat(cosines).mean()
