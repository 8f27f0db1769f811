"""GGUF files: against the gguf package and a naive writer of our own, damaged ones, and models seen through them."""

from __future__ import annotations

import hashlib
import re
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qtool.checkpoint.reader import Checkpoint
from qtool.checkpoint.writer import StagedOutput
from qtool.errors import QtoolError, ReadError, UsageError
from qtool.gguf.checkpoint import GGUFCheckpoint, open_checkpoint
from qtool.gguf.container import GGUFContainer
from qtool.gguf.file import KINDS, MAX_NAME_BYTES, GGUFFile, Metadata, header_bytes
from qtool.gguf.model import GGUFModel
from qtool.headers import TensorInfo

MakeModel = Callable[..., Path]
METADATA: Metadata = {
    "general.architecture": "llama",
    "a.bool": True,
    "a.number": 4294967295,
    "a.float": 0.5,
    "an.empty.string": "",
    "strings": ["a", "", "é\n", "日本"],
    "numbers": [0, -1, 2147483647],
    "floats": [1.5, -0.25],
    "bools": [True, False],
    "no.strings": [],
}
TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8}
TENSORS = [("norm", "f32", (5,)), ("experts", "f16", (2, 3, 8)), ("half", "bf16", (3, 8)), ("q", "q4_k", (2, 512))]


def number(form: str, *values: Any) -> bytes:
    return struct.pack("<" + form, *values)


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return number("Q", len(data)) + data


def naive(
    keys: list[bytes] = [],  # noqa: B006 (never changed)
    tensors: list[bytes] = [],  # noqa: B006
    data: bytes = b"",
    version: int = 3,
    counts: tuple[int, int] | None = None,
    alignment: int = 32,
) -> bytes:
    """A file put together by hand."""
    counts = counts or (len(tensors), len(keys))
    header = b"GGUF" + number("IQQ", version, *counts) + b"".join(keys) + b"".join(tensors)
    return header + bytes(-len(header) % alignment) + data


def tensor(name: str, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    return text(name) + number(f"I{len(shape)}QIQ", len(shape), *shape[::-1], kind, offset)


def u32(key: str, value: int) -> bytes:
    return text(key) + number("II", 4, value)


def save(folder: Path, data: bytes, name: str = "model.gguf") -> Path:
    (folder / name).write_bytes(data)
    return folder / name


def failure(path: Path, kind: type[QtoolError] = QtoolError) -> str:
    """The one line of the error that opening the file ends in."""
    with pytest.raises(kind) as caught:
        GGUFFile(path)
    message = str(caught.value)
    assert str(path.parent) in message
    assert "\n" not in message
    assert len(message) < 600
    return message


def random_file(folder: Path, metadata: Metadata, tensors: list[Any], alignment: int = 32) -> tuple[Path, bytes]:
    """A file of ours with random bytes for tensors."""
    header, offsets, size = header_bytes(metadata, tensors, alignment)
    assert list(offsets) == [name for name, _, _ in tensors]
    generator = np.random.default_rng(0)
    data = header + generator.integers(0, 256, size - len(header), dtype=np.uint8).tobytes()
    return save(folder, data), data


# What we write


def test_a_file_written_out_by_hand(tmp_path: Path) -> None:
    header, offsets, size = header_bytes({"k": 7, "s": ["xy"]}, [("w", "q8_0", (2, 32)), ("b", "f32", (2,))])
    expected = bytes.fromhex(
        "47475546 03000000 0200000000000000 0200000000000000"  # GGUF, version 3, two tensors, two keys
        "0100000000000000 6b 04000000 07000000"  # k, UINT32, 7
        "0100000000000000 73 09000000 08000000 0100000000000000 0200000000000000 7879"  # s, an array of one STRING
        "0100000000000000 77 02000000 2000000000000000 0200000000000000 08000000 0000000000000000"  # w [2, 32] Q8_0
        "0100000000000000 62 01000000 0200000000000000 00000000 6000000000000000"  # b [2] F32, after 2 * 34 bytes
    )
    expected += bytes(-len(expected) % 32)
    assert header == expected
    assert offsets == {"w": len(header), "b": len(header) + 96}
    assert size == len(header) + 96 + 32
    assert size % 32 == 0


def test_the_gguf_package_reads_what_we_write(tmp_path: Path) -> None:
    tensors = [(kind, kind, (2, 512)) for kind in KINDS] + TENSORS
    for alignment in (32, 128):
        path, data = random_file(tmp_path, METADATA, tensors, alignment)
        reader = gguf.GGUFReader(path)
        fields = {key: field for key, field in reader.fields.items() if not key.startswith("GGUF.")}
        expected = METADATA | ({} if alignment == 32 else {"general.alignment": 128})
        assert list(fields) == list(expected)
        assert {key: fields[key].contents() for key in fields if key != "no.strings"} == {
            key: value for key, value in expected.items() if key != "no.strings"
        }
        types = {key: [kind.name for kind in fields[key].types] for key in fields}
        assert types["a.number"] == ["UINT32"]
        assert types["numbers"] == ["ARRAY", "INT32"]
        assert types["floats"] == ["ARRAY", "FLOAT32"]
        ours = GGUFFile(path)
        assert ours.metadata == expected
        assert [(x.name, x.tensor_type.name.lower()) for x in reader.tensors] == [x[:2] for x in tensors]
        for found, (name, kind, shape) in zip(reader.tensors, tensors, strict=True):
            mine = ours.tensors[name]
            assert (mine.kind, mine.shape) == (kind, shape)
            assert tuple(found.shape[::-1]) == shape
            assert (found.data_offset, found.n_bytes) == (mine.offset, mine.size_bytes)
            assert found.data.tobytes() == data[mine.offset : mine.offset + mine.size_bytes]
            assert ours.read(name).reshape(-1).view(torch.uint8).numpy().tobytes() == found.data.tobytes()


def test_the_alignment_is_that_of_the_file() -> None:
    header, offsets, size = header_bytes({"general.alignment": 64, "k": 1}, [("w", "f32", (1,))])
    assert (header, offsets, size) == header_bytes({"k": 1}, [("w", "f32", (1,))])


def test_the_table_of_types_is_that_of_the_gguf_package() -> None:
    for kind, block in KINDS.items():
        known = gguf.GGMLQuantizationType[kind.upper()]
        assert (known.value, gguf.GGML_QUANT_SIZES[known]) == (block.number, (block.weights, block.size_bytes))


@pytest.mark.parametrize("value", [-1, 2**32, 1e60, [2**31], ["\ud800"], "\ud800"])
def test_values_that_do_not_fit_their_type(value: Any) -> None:
    with pytest.raises(QtoolError, match=r"`some\.key` = .* cannot be stored"):
        header_bytes({"some.key": value}, [])


names = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=20).filter(
    lambda name: not name.startswith(("general.", "split."))  # known ones must have their types
)
strings = st.text(max_size=10)
values = st.one_of(
    strings,
    st.booleans(),
    st.integers(0, 2**32 - 1),
    st.floats(width=32, allow_nan=False),
    st.lists(strings),
    st.lists(st.integers(-(2**31), 2**31 - 1)),
    st.lists(st.floats(width=32, allow_nan=False)),
    st.lists(st.booleans()),
)
headers = st.lists(
    st.tuples(names, st.sampled_from(sorted(KINDS)), st.lists(st.integers(1, 4), max_size=3)),
    max_size=5,
    unique_by=lambda x: x[0],
).map(lambda found: [(name, kind, (*shape, KINDS[kind].weights * 2)) for name, kind, shape in found])


@settings(deadline=None)
@given(metadata=st.dictionaries(names, values, max_size=6), tensors=headers, alignment=st.sampled_from([8, 32, 1024]))
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, metadata: Metadata, tensors: list[Any], alignment: int
) -> None:
    path, data = random_file(tmp_path_factory.getbasetemp(), metadata, tensors, alignment)
    ours = GGUFFile(path)
    assert ours.metadata == metadata | ({} if alignment == 32 else {"general.alignment": alignment})
    assert [(x.name, x.kind, x.shape) for x in ours.tensors.values()] == tensors
    for found in ours.tensors.values():
        stored = ours.read(found.name)
        assert tuple(stored.shape) == found.info.shape
        assert stored.reshape(-1).view(torch.uint8).numpy().tobytes() == data[found.offset :][: found.size_bytes]
        assert found.offset % alignment == 0


# What others write


def test_we_read_what_the_gguf_package_writes(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "qwen2")
    writer.add_uint8("u8", 255)
    writer.add_int8("i8", -128)
    writer.add_uint16("u16", 65535)
    writer.add_int16("i16", -32768)
    writer.add_int32("i32", -(2**31))
    writer.add_uint64("u64", 2**64 - 1)
    writer.add_int64("i64", -(2**63))
    writer.add_float32("f32", 0.25)
    writer.add_float64("f64", 0.1)
    writer.add_bool("yes", True)
    writer.add_array("scores", [0.5, -1.0])
    writer.add_array("tokens", ["a", "日本"])
    writer.add_key_value("bytes", [1, -2, 3], gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.INT8)
    writer.add_custom_alignment(64)
    values = torch.randn(6, 64)
    writer.add_tensor("w", values.numpy())
    writer.add_tensor("half", values.half().numpy())
    packed = gguf.quantize(values.numpy(), gguf.GGMLQuantizationType.Q4_0)
    writer.add_tensor("q", packed, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    bits = values.bfloat16().view(torch.uint8).numpy()
    writer.add_tensor("b", bits, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.add_tensor("ids", np.arange(4, dtype=np.int32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ours = GGUFFile(tmp_path / "model.gguf")
    assert ours.metadata == {
        "general.architecture": "qwen2", "u8": 255, "i8": -128, "u16": 65535, "i16": -32768, "i32": -(2**31),
        "u64": 2**64 - 1, "i64": -(2**63), "f32": 0.25, "f64": 0.1, "yes": True, "scores": [0.5, -1.0],
        "tokens": ["a", "日本"], "bytes": [1, -2, 3], "general.alignment": 64,
    }  # fmt: skip
    assert torch.equal(ours.read("w"), values)
    assert torch.equal(ours.read("half"), values.half())
    assert torch.equal(ours.read("b"), values.bfloat16())
    assert torch.equal(ours.read("q"), torch.from_numpy(packed))
    assert torch.equal(ours.read_rows("w", [4, 1]), values[[4, 1]])
    assert (ours.tensors["q"].kind, ours.tensors["q"].shape, ours.tensors["q"].info.dtype) == ("q4_0", (6, 64), "U8")
    assert ours.tensors["ids"].kind == "I32"
    with pytest.raises(QtoolError, match=r"`ids` in .* is I32, a type that is not read"):
        ours.read("ids")


@pytest.mark.parametrize("version", [2, 3])
def test_both_versions(tmp_path: Path, version: int) -> None:
    path = save(tmp_path, naive([u32("k", 5)], [tensor("w", (2, 4), 0, 0)], bytes(32), version))
    ours = GGUFFile(path)
    assert ours.metadata == {"k": 5}
    assert torch.equal(ours.read("w"), torch.zeros(2, 4))


def test_a_type_that_is_not_read_is_listed(tmp_path: Path) -> None:
    kind = gguf.GGMLQuantizationType.IQ2_XXS
    ours = GGUFFile(save(tmp_path, naive(tensors=[tensor("w", (3, 256), kind, 0)], data=bytes(3 * 66))))
    assert ours.tensors["w"].kind == "IQ2_XXS"
    assert (ours.tensors["w"].info.dtype, ours.tensors["w"].info.shape) == ("U8", (3, 66))
    with pytest.raises(QtoolError, match=r"`w` in .* is IQ2_XXS, a type that is not read"):
        ours.read_rows("w", [0])


def test_a_tensor_is_read_as_it_is_used(tmp_path: Path) -> None:
    """Of a gigabyte, and of a tensor as large, no more than the rows that were asked for; a file that shrank."""
    size = 1 << 30
    path = save(tmp_path, naive(tensors=[tensor("w", (1 << 14, 1 << 14), 0, 0)]))
    begin = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(begin + size)
        file.seek(begin + (5 << 16))
        file.write(number("f", 2.5))
    ours = GGUFFile(path)
    resident = Path("/proc/self/statm")
    before = int(resident.read_text().split()[1]) if resident.exists() else 0
    rows = ours.read_rows("w", torch.tensor([5, 0]))
    assert rows[0, 0] == 2.5
    assert rows.sum() == 2.5
    if resident.exists():
        assert int(resident.read_text().split()[1]) - before < 5000  # pages of 4096 bytes
    path.write_bytes(b"")
    with pytest.raises(ReadError, match="cannot read"):
        ours.read("w")


def test_large_vocabularies_are_read_at_once(tmp_path: Path) -> None:
    tokens = [f"token{i}é" for i in range(150_000)]
    merges = [f"to ken{i}" for i in range(150_000)]
    path = save(tmp_path, header_bytes({"t": tokens, "m": merges, "s": [0.5] * 150_000}, [])[0])
    started = time.process_time()
    ours = GGUFFile(path)
    assert time.process_time() - started < 1
    assert ours.metadata["t"] == tokens
    assert ours.metadata["m"] == merges


# Split files


def split(folder: Path, parts: int = 3, total: int | None = None, **changed: bytes) -> Path:
    """A model in parts, each with one tensor; `changed` are the bytes of a part, such as part2=b""."""
    for part in range(parts):
        keys = [text("split.no") + number("IH", 2, part), text("split.count") + number("IH", 2, parts)]
        keys.append(text("split.tensors.count") + number("Ii", 5, parts if total is None else total))
        keys += [u32("k", 5)] if part == 0 else []
        data = naive(keys, [tensor(f"t{part}", (4,), 0, 0)], number("4f", *[part] * 4))
        save(folder, changed.get(f"part{part + 1}", data), f"m-{part + 1:05}-of-{parts:05}.gguf")
    return folder / f"m-00001-of-{parts:05}.gguf"


def test_the_first_part_opens_all(tmp_path: Path) -> None:
    path = split(tmp_path)
    ours = GGUFFile(path)
    assert ours.files == [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    assert ours.metadata == {"k": 5}
    assert [x.file for x in ours.tensors.values()] == ours.files
    for part in range(3):
        assert ours.read(f"t{part}").tolist() == [part] * 4


def test_parts_that_the_gguf_package_splits(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama", split_max_tensors=2)
    values = {f"t{i}": torch.randn(3, 8) for i in range(5)}
    for name, value in values.items():
        writer.add_tensor(name, value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ours = GGUFFile(tmp_path / "model-00001-of-00003.gguf")
    assert len(ours.files) == 3
    assert all(torch.equal(ours.read(name), value) for name, value in values.items())


def test_damaged_sets_of_parts(tmp_path: Path) -> None:
    path = split(tmp_path)
    second = tmp_path / "m-00002-of-00003.gguf"
    assert "is not the first of its 3 parts" in failure(second, UsageError)
    whole = second.read_bytes()
    second.unlink()
    assert failure(path).endswith("3 parts, of which 1 are missing: m-00002-of-00003.gguf")
    second.write_bytes(whole[:-1])
    assert "m-00002-of-00003.gguf is damaged" in failure(path)
    second.write_bytes(path.read_bytes())
    assert "does not belong to m-00001-of-00003.gguf" in failure(path)
    second.write_bytes(whole.replace(b"t1", b"t0"))
    assert "tensor `t0` is both in m-00001-of-00003.gguf and" in failure(path)
    second.write_bytes(whole)
    path.rename(tmp_path / "other.gguf")
    assert "is one of '3' parts, but its name does not say so" in failure(tmp_path / "other.gguf")
    assert "hold 3 tensors, not 7" in failure(split(tmp_path, total=7))
    listed = naive([text("split.count") + number("IIQII", 9, 4, 2, 3, 3)])
    assert "is one of '[3, 3]' parts" in failure(save(tmp_path, listed, "m-00001-of-00003.gguf"))


# Damaged files

WEIGHT = tensor("w", (2, 4), 0, 0)
HUGE = 2**60
DAMAGED = {
    "magic": (b"GGML" + bytes(40), "is not a GGUF file: it begins with b'GGML'"),
    "empty": (b"", r"truncated or not a GGUF file \(0 bytes\)"),
    "version 1": (naive(version=1), "has version 1 of GGUF; 2 and 3 are read"),
    "version 4": (naive(version=4), "has version 4 of GGUF"),
    "big-endian": (naive(version=3 << 24), "is a big-endian GGUF file"),
    "2^60 tensors": (naive(counts=(HUGE, 0)), f"{HUGE} tensors at byte"),
    "2^60 keys": (naive(counts=(0, HUGE)), f"{HUGE} keys at byte"),
    "a missing key": (naive(counts=(0, 1)), "4 bytes to read and 0 left at byte 32"),
    "a missing tensor": (naive([u32("k", 1)], counts=(2, 1)), "bytes to read and"),
    "a long key": (naive([number("Q", 2**63)]), "a string of 9223372036854775808 bytes"),
    "a key of 256 bytes": (naive([u32("k" * (MAX_NAME_BYTES + 1), 1)]), "a string of 256 bytes"),
    "a long string": (naive([text("k") + number("IQ", 8, 2**63)]), "a string of 9223372036854775808 bytes"),
    "a string of 100": (naive([text("k") + number("IQ", 8, 100)]), "a string of 100 bytes"),
    "not UTF-8": (naive([text("k") + number("I", 8) + text(b"\xff")]), "not UTF-8"),
    "a key with a new line": (naive([u32("a\nb", 1)]), re.escape(r"the name 'a\nb'")),
    "a key twice": (naive([u32("k", 1)] * 2), "the name 'k' twice"),
    "type 99": (naive([text("k") + number("I", 99)]), "`k` of the unknown type 99"),
    "an array of type 99": (naive([text("k") + number("IIQ", 9, 99, 0)]), "`k`, an array of the unknown type 99"),
    "nested arrays": (naive([text("k") + number("IIQ", 9, 9, 1) * 500]), "`k`, an array of arrays"),
    "2^61 numbers": (naive([text("k") + number("IIQ", 9, 4, 2**61)]), f"`k` of {2**61} items"),
    "2^61 strings": (naive([text("k") + number("IIQ", 9, 8, 2**61)]), f"`k` of {2**61} items"),
    "2^24 numbers": (naive([text("k") + number("IIQ", 9, 12, 2**24)]), f"{2**27} bytes to read and"),
    "2^24 strings": (naive([text("k") + number("IIQ", 9, 8, 2**24)]), f"{2**27} bytes to read and"),
    "alignment 0": (naive([u32("general.alignment", 0)]), "the alignment '0'"),
    "alignment 3": (naive([u32("general.alignment", 3)]), "the alignment '3'"),
    "alignment 48": (naive([u32("general.alignment", 48)]), "the alignment '48'"),
    "alignment 2^31": (naive([u32("general.alignment", 2**31)]), "the alignment '2147483648'"),
    "alignment true": (naive([text("general.alignment") + number("I?", 7, True)]), "the alignment 'True'"),
    "alignment 32.0": (naive([text("general.alignment") + number("If", 6, 32)]), "the alignment '32.0'"),
    "dimensions of 2^40": (naive(tensors=[tensor("w", (2**40,) * 4, 0, 0)], data=bytes(64)), r"`w` of \d+ bytes"),
    "a product of 2^64": (naive(tensors=[tensor("w", (2**32,) * 2, 24, 0)], data=bytes(64)), "`w` of 1844"),
    "5 dimensions": (naive(tensors=[tensor("w", (1,) * 5, 0, 0)], data=bytes(64)), "`w` with 5 dimensions"),
    "2^32 dimensions": (naive(tensors=[text("w") + number("I", 2**32 - 1)]), "`w` with 4294967295 dimensions"),
    "a dimension of 0": (naive(tensors=[tensor("w", (0, 4), 0, 0)], data=bytes(64)), r"`w` of the shape \(0, 4\)"),
    "half a block": (naive(tensors=[tensor("w", (2, 48), 2, 0)], data=bytes(640)), "in blocks of 32 q4_0"),
    "a scalar in blocks": (naive(tensors=[tensor("w", (), 2, 0)], data=bytes(640)), "in blocks of 32 q4_0"),
    "an unread type": (naive(tensors=[tensor("w", (2, 128), 16, 0)], data=bytes(640)), "in blocks of 256 IQ2_XXS"),
    "tensor type 4": (naive(tensors=[tensor("w", (2, 32), 4, 0)], data=bytes(640)), "`w` of the unknown type 4"),
    "tensor type 2^31": (naive(tensors=[tensor("w", (1,), 2**31, 0)]), "`w` of the unknown type 2147483648"),
    "an offset beyond": (naive(tensors=[tensor("w", (2, 4), 0, 64)], data=bytes(64)), r"`w` of 32 bytes at 96 \+ 64"),
    "an offset of 2^64": (naive(tensors=[tensor("w", (2, 4), 0, 2**64 - 32)], data=bytes(64)), "`w` of 32 bytes at"),
    "an odd offset": (naive(tensors=[tensor("w", (2, 4), 0, 8)], data=bytes(64)), "aligned to 32"),
    "an overlap": (naive(tensors=[WEIGHT, tensor("v", (1,), 0, 0)], data=bytes(64)), "`v` in the place of another"),
    "an inner overlap": (
        naive(tensors=[tensor("w", (2, 16), 0, 0), tensor("v", (1,), 0, 64)], data=bytes(128)),
        "`v` in the place of another tensor",
    ),
    "a tensor twice": (naive(tensors=[WEIGHT, tensor("w", (2, 4), 0, 32)], data=bytes(64)), "the name 'w' twice"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damage_is_named(tmp_path: Path, case: str) -> None:
    data, message = DAMAGED[case]
    path = save(tmp_path, data)
    GGUFFile(save(tmp_path, naive(tensors=[WEIGHT], data=bytes(32)), "warm.gguf"))
    started = time.process_time()
    assert re.search(message, failure(path))
    assert time.process_time() - started < 0.5


def test_what_is_no_file(tmp_path: Path) -> None:
    for name in (".", "missing.gguf"):
        with pytest.raises(QtoolError, match="cannot read"):
            GGUFFile(tmp_path / name)


def whole_file(folder: Path) -> bytes:
    return random_file(folder, METADATA, TENSORS)[1]


def test_truncated_anywhere(tmp_path: Path) -> None:
    data = whole_file(tmp_path)
    last = max(x.offset + x.size_bytes for x in GGUFFile(tmp_path / "model.gguf").tensors.values())
    assert len(data) - last < 32
    for size in range(last):
        failure(save(tmp_path, data[:size]))
    GGUFFile(save(tmp_path, data[:last]))


edits = st.lists(
    st.tuples(
        st.sampled_from(["flip", "insert", "cut", "number"]),
        st.integers(0, 10_000),
        st.one_of(st.integers(0, 2**64 - 1), st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**60, 2**63, 2**64 - 1])),
    ),
    min_size=1,
    max_size=4,
)


def damaged(data: bytes, changes: list[tuple[str, int, int]], end: int) -> bytes:
    """The file with some edits before `end`."""
    result = bytearray(data)
    for what, place, value in changes:
        at = place % end
        if what == "flip":
            result[at : at + 1] = bytes([(result[at] if at < len(result) else 0) ^ (1 << value % 8)])
        elif what == "insert":
            result[at:at] = number("Q", value)[: 1 + value % 8]
        elif what == "cut":
            del result[at : at + 1 + value % 40]
        else:
            result[at : at + 8] = number("Q", value)
    return bytes(result)


def opened(path: Path, reader: Callable[[Path], Any]) -> Any:
    """What `reader` makes of the file in little memory, or None after an error of one line."""
    message = ""
    tracemalloc.start()
    try:
        return reader(path)
    except QtoolError as error:
        message = str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 50e6
        assert "\n" not in message


@settings(max_examples=400, deadline=5000)
@given(changes=edits)
def test_edited_headers_end_in_an_error_or_a_file(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[str, int, int]]
) -> None:
    folder = tmp_path_factory.getbasetemp()
    data = whole_file(folder)
    path = save(folder, damaged(data, changes, header_bytes(METADATA, TENSORS)[1]["norm"]))
    ours = opened(path, GGUFFile)
    for found in ours.tensors.values() if ours else ():
        assert found.offset + found.size_bytes <= path.stat().st_size
        if found.kind in KINDS:
            assert ours.read(found.name).reshape(-1).view(torch.uint8).numel() == found.size_bytes


# Models

SUPPORTED: dict[str, dict[str, Any]] = {  # what the tiny models must say for llama.cpp to have them
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {"use_sliding_window": False},
    "qwen3": {},
    "gemma2": {},
    "gemma3_text": {"num_hidden_layers": 6, "layer_types": [*["sliding_attention"] * 5, "full_attention"]},
    "phi3": {},
    "gpt_neox": {},
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def convert(source: Checkpoint, out: Path, kinds: dict[str, str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A GGUF folder with the tensors of a checkpoint, random blocks for those in `kinds`: values, and sha256 there."""
    model = GGUFModel.of_config(source.config)
    container = GGUFContainer(model, model.metadata(), kinds)
    infos = []
    for info in source.tensors.values():
        if info.name in kinds:
            block = KINDS[kinds[info.name]]
            row_bytes = info.shape[1] // block.weights * block.size_bytes
            infos.append(TensorInfo(info.name, "U8", (info.shape[0], row_bytes)))
        elif isinstance(stored := container.stored(info), TensorInfo):
            infos.append(stored)
    tensors = container.files(infos)
    staged = StagedOutput(out, tensors, {}, False, container)
    generator = torch.Generator().manual_seed(0)
    values = {
        name: torch.randint(256, info.shape, generator=generator, dtype=torch.uint8)
        if name in kinds
        else source.read(name)
        for name, info in tensors.items()
    }
    digests = {name: staged.write(name, value) for name, value in values.items()}
    staged.publish({})
    return values, digests


def matrices(checkpoint: Checkpoint) -> list[str]:
    return [name for name, info in checkpoint.tensors.items() if len(info.shape) == 2 and ".layers." in name]


@pytest.mark.parametrize("kind", SUPPORTED)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_model_comes_back_as_it_was(make_model: MakeModel, tmp_path: Path, kind: str, dtype: str) -> None:
    source = Checkpoint(make_model(kind, dtype=dtype, tied=kind != "gpt_neox", **SUPPORTED[kind]))
    blocks = sorted(kind for kind, block in KINDS.items() if block.weights == 32)
    kinds = dict(zip(matrices(source), blocks * 9, strict=False)) if dtype == "float16" else {}
    values, digests = convert(source, tmp_path / "out", kinds)
    seen = open_checkpoint(tmp_path / "out")
    assert isinstance(seen, GGUFCheckpoint)
    assert list(seen.tensors) == list(source.tensors) == list(values)
    assert seen.kinds == kinds
    assert seen.config["model_type"] == {"mistral": "llama"}.get(kind, source.config["model_type"])
    assert seen.config["quantization_config"] == {"quant_method": "gguf"}
    for name, tensor in seen.read_many(seen.tensors):
        info = seen.tensors[name]
        assert info.file == "model.gguf"
        assert (tuple(tensor.shape), tensor.dtype) == (info.shape, TYPES[info.dtype])
        expected = values[name]
        assert info.dtype == ("F32" if expected.dim() == 1 else "U8" if name in kinds else source.tensors[name].dtype)
        if "norm" in name and "gemma" in kind:
            assert torch.allclose(tensor, expected.float(), rtol=0, atol=2e-7)
        else:
            assert torch.equal(tensor, expected.to(tensor.dtype)), name
    for name, tensor in seen.borrow_stored(seen.tensors):
        assert hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy()).hexdigest() == digests[name]
    reader = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
    stored = {x.name: x for x in reader.tensors}
    assert all(len(x.shape) > 1 or x.tensor_type.name == "F32" for x in stored.values())
    assert {name.split(".")[0] for name in stored} <= {"token_embd", "output_norm", "output", "blk"}


def test_rows_lie_as_llama_cpp_has_them(make_model: MakeModel, tmp_path: Path) -> None:
    """Of queries and keys each pair of dimensions that is rotated together lies side by side; Gemma's norms are + 1."""
    source = Checkpoint(make_model("llama"))
    name = "model.layers.1.self_attn.k_proj.weight"
    values, _ = convert(source, tmp_path / "llama", {name: "q8_0"})
    file = GGUFFile(tmp_path / "llama" / "model.gguf")
    for theirs, ours, heads in (("attn_k", "k_proj", 2), ("attn_q", "q_proj", 4)):
        weight = values[f"model.layers.1.self_attn.{ours}.weight"]
        rows = weight.reshape(heads, 2, 8, -1).swapaxes(1, 2).reshape(len(weight), -1)
        assert torch.equal(file.read(f"blk.1.{theirs}.weight"), rows)
    assert torch.equal(file.read("blk.1.attn_v.weight"), values["model.layers.1.self_attn.v_proj.weight"])
    assert next(iter(GGUFCheckpoint(file.path).borrow([name])))[1].equal(values[name])
    source = Checkpoint(make_model("gemma2"))
    values, _ = convert(source, tmp_path / "gemma", {})
    file = GGUFFile(tmp_path / "gemma" / "model.gguf")
    assert torch.equal(file.read("output_norm.weight"), values["model.norm.weight"].float() + 1)


def test_factors_of_the_rotary_embedding_lie_first(make_model: MakeModel, tmp_path: Path) -> None:
    source = Checkpoint(make_model("llama", max_position_embeddings=512, rope_parameters=LLAMA3))
    values, _ = convert(source, tmp_path / "out", {})
    file = GGUFFile(tmp_path / "out" / "model.gguf")
    assert next(iter(file.tensors)) == "rope_freqs.weight"
    assert torch.equal(
        file.read("rope_freqs.weight"),
        torch.from_numpy(GGUFModel.of_config(source.config).extra()["rope_freqs.weight"]),
    )
    seen = GGUFCheckpoint(tmp_path / "out")
    assert list(seen.tensors) == list(values)
    assert all(torch.equal(seen.read(name), value.to(seen.read(name).dtype)) for name, value in values.items())
    assert seen.config["rope_parameters"]["factor"] == 8


def test_tensors_that_do_not_go_into_a_file(make_model: MakeModel) -> None:
    source = Checkpoint(make_model("llama"))
    model = GGUFModel.of_config(source.config)
    container = GGUFContainer(model, model.metadata(), {})
    inv_freq = TensorInfo("model.layers.0.self_attn.rotary_emb.inv_freq", "F32", (8,))
    assert container.stored(inv_freq) == "not in a GGUF file"
    with pytest.raises(UsageError, match=r"model\.layers\.0\.self_attn\.what\.weight"):
        container.stored(TensorInfo("model.layers.0.self_attn.what.weight", "BF16", (8, 8)))
    with pytest.raises(UsageError, match=r"`model\.norm\.weight` is I64: GGUF files hold F16, BF16, F32 and blocks"):
        container.stored(TensorInfo("model.norm.weight", "I64", (64,)))


def test_an_architecture_that_is_not_known(tmp_path: Path) -> None:
    kind = gguf.GGMLQuantizationType.IQ2_XXS
    tensors = [tensor("blk.0.x.weight", (2, 256), kind, 0), tensor("y", (2, 32), 2, 160), tensor("z", (2,), 0, 224)]
    for keys in ([text("general.architecture") + number("I", 8) + text("new")], [u32("general.architecture", 5)], []):
        seen = open_checkpoint(save(tmp_path, naive(keys, tensors, bytes(256))))
        assert isinstance(seen, GGUFCheckpoint)
        assert seen.config["quantization_config"] == {"quant_method": "gguf"}
        assert "model_type" not in seen.config
        assert seen.kinds == {"blk.0.x.weight": "IQ2_XXS", "y": "q4_0"}
        assert {name: (x.dtype, x.shape) for name, x in seen.tensors.items()} == {
            "blk.0.x.weight": ("U8", (2, 66)), "y": ("U8", (2, 18)), "z": ("F32", (2,)),
        }  # fmt: skip
        assert seen.read("z").tolist() == [0, 0]
        assert seen.read_small("z").tolist() == [0, 0]
        with pytest.raises(QtoolError, match=r"`blk\.0\.x\.weight` in .* is IQ2_XXS, a type that is not read"):
            seen.read("blk.0.x.weight")


def test_which_file_of_a_folder(make_model: MakeModel, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"holds no \*\.safetensors"):
        open_checkpoint(tmp_path)
    whole = naive(tensors=[WEIGHT], data=bytes(32))
    save(tmp_path, whole, "mmproj-model-f16.gguf")
    with pytest.raises(UsageError, match=r"holds no \*\.gguf with a model"):
        open_checkpoint(tmp_path)
    split(tmp_path)
    seen = open_checkpoint(tmp_path)
    assert isinstance(seen, GGUFCheckpoint)
    assert seen.files == [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    assert [file.name for file in seen.identity()] == seen.files
    assert seen.read("t2").tolist() == [2] * 4
    save(tmp_path, whole, "b.gguf")
    with pytest.raises(UsageError, match=r"holds 2 models as GGUF: b\.gguf, m-00001-of-00003\.gguf"):
        open_checkpoint(tmp_path)
    path = save(tmp_path, whole)
    for typed in (tmp_path, path):
        seen = open_checkpoint(typed)
        assert (seen.path, seen.root, seen.files, seen.size_bytes) == (typed, tmp_path, ["model.gguf"], 32)
        identity = seen.identity(others=["b.gguf"])
        assert [(x.name, x.sha256) for x in identity] == [
            (name, hashlib.sha256(whole).hexdigest()) for name in ("model.gguf", "b.gguf")
        ]
    assert type(open_checkpoint(make_model("llama"))) is Checkpoint
    (tmp_path / "model.safetensors").write_bytes((make_model("llama") / "model.safetensors").read_bytes())
    assert type(open_checkpoint(tmp_path)) is Checkpoint


@pytest.fixture(scope="session")
def model_files(make_model: MakeModel, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    paths = []
    for kind in SUPPORTED:
        out = tmp_path_factory.mktemp("models") / kind
        source = Checkpoint(make_model(kind, tied=kind != "gpt_neox", **SUPPORTED[kind]))
        convert(source, out, dict.fromkeys(matrices(source), "q8_0"))
        paths.append(out / "model.gguf")
    return paths


VALUES = [
    0,
    1,
    3,
    2**31,
    2**32 - 1,
    0.0,
    -1.0,
    1e30,
    float("nan"),
    True,
    "",
    "x\ny",
    [],
    [1, 2],
    [-1],
    ["a"],
    [0.5],
    None,
]


@settings(max_examples=150, deadline=5000)
@given(data=st.data())
def test_odd_metadata_end_in_an_error_or_a_model(
    model_files: list[Path], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """None stands for a key that is missing; tensors may also have other names or shapes."""
    file = GGUFFile(data.draw(st.sampled_from(model_files)))
    key = st.sampled_from(list(file.metadata))
    changes = data.draw(st.dictionaries(key, st.sampled_from(VALUES), min_size=1, max_size=3))
    metadata = {key: value for key, value in {**file.metadata, **changes}.items() if value is not None}
    path = rewritten(file, metadata, tmp_path_factory.getbasetemp())
    seen = opened(path, GGUFCheckpoint)
    if seen:
        opened(path, lambda _: [seen.read(name) for name in seen.tensors])


@settings(max_examples=100, deadline=5000)
@given(data=st.data())
def test_odd_tensors_end_in_an_error_or_a_model(
    model_files: list[Path], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    file = GGUFFile(data.draw(st.sampled_from(model_files)))
    tensors = [(x.name, x.kind, x.shape) for x in file.tensors.values()]
    place = data.draw(st.integers(0, len(tensors) - 1))
    name, kind, shape = tensors[place]
    other = data.draw(st.sampled_from(["blk.0.attn_q.bias", "blk.9.attn_q.weight", "rope_freqs.weight", "what"]))
    changed = data.draw(
        st.sampled_from([None, (other, kind, shape), (name, kind, (3, *shape)), (name, "f32", (1,)), (name, "f32", ())])
    )
    found = {x[0]: x for x in [*tensors[:place], changed, *tensors[place + 1 :]] if x}
    header, _, size = header_bytes(file.metadata, list(found.values()))
    path = save(tmp_path_factory.getbasetemp(), header + bytes(size - len(header)))
    seen = opened(path, GGUFCheckpoint)
    if seen:
        opened(path, lambda _: [seen.read(name) for name in seen.tensors])


def rewritten(file: GGUFFile, metadata: Metadata, folder: Path) -> Path:
    """The same file with other keys."""
    header, _, size = header_bytes(metadata, [(x.name, x.kind, x.shape) for x in file.tensors.values()])
    first = min(x.offset for x in file.tensors.values())
    body = file.path.read_bytes()[first:]
    assert len(header) + len(body) == size
    return save(folder, header + body)
