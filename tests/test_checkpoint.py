"""Reading checkpoints that may be broken, and writing ones that are whole or absent."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from qtool.checkpoint import reader
from qtool.checkpoint.hub import local_path, locate, open_headers
from qtool.checkpoint.reader import INDEX, Checkpoint, FileIdentity, sha256_file
from qtool.checkpoint.writer import JOURNAL, StagedOutput, partial_path
from qtool.errors import QtoolError, UsageError
from qtool.headers import TensorInfo
from qtool.job import prepare
from qtool.methods import METHODS
from qtool.pipeline import RunOptions, quantize
from qtool.recipe import build

MakeModel = Callable[..., Path]


def quiet(stage: str, done: int, total: int, detail: str) -> None:
    """A progress callback that tells nobody."""


def failure(path: Path, kind: type[QtoolError] = QtoolError) -> QtoolError:
    with pytest.raises(kind) as caught:
        Checkpoint(path)
    return caught.value


@pytest.fixture
def sharded(make_model: MakeModel, tmp_path: Path) -> Path:
    """A copy of a sharded model that a test may damage."""
    return Path(shutil.copytree(make_model(shards=True), tmp_path / "model"))


# Reading


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_headers_and_values(make_model: MakeModel, shards: bool, dtype: str) -> None:
    path = make_model(dtype=dtype, shards=shards)
    checkpoint = Checkpoint(path)
    assert (len(checkpoint.files) > 1) == shards
    assert checkpoint.config["model_type"] == "llama"
    expected: dict[str, Tensor] = {}
    for file in checkpoint.files:
        expected.update(load_file(path / file))
    assert set(checkpoint.tensors) == set(expected)
    for name, tensor in checkpoint.read_many(reversed(list(expected))):
        assert torch.equal(tensor, expected[name]), name
        info = checkpoint.tensors[name]
        assert (info.name, info.shape) == (name, tuple(tensor.shape))
        assert info.dtype == {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[dtype]
        assert name in load_file(path / info.file)
    assert checkpoint.size_bytes == sum(t.nbytes for t in expected.values())
    name = next(iter(expected))
    assert torch.equal(checkpoint.read(name), expected[name])


def test_a_tensor_that_was_read_outlives_its_file(tmp_path: Path) -> None:
    save_file({"a": torch.arange(4.0)}, tmp_path / "model.safetensors")
    tensor = Checkpoint(tmp_path).read("a")
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert tensor.tolist() == [0, 1, 2, 3]


def test_one_file_alone(make_model: MakeModel) -> None:
    checkpoint = Checkpoint(make_model() / "model.safetensors")
    assert checkpoint.config == {}, "the config of a folder does not belong to one file of it"
    assert checkpoint.tensors == Checkpoint(make_model()).tensors


def test_headers_alone(make_model: MakeModel) -> None:
    whole = Checkpoint(make_model(shards=True))
    headers = Checkpoint.from_headers(Path("org/name"), whole.config, whole.tensors.values())
    assert headers.tensors == whole.tensors
    assert headers.files == whole.files
    assert headers.size_bytes == whole.size_bytes
    with pytest.raises(QtoolError, match="`x` in org/name has the unknown type F7"):
        Checkpoint.from_headers(Path("org/name"), {}, [TensorInfo("x", "F7", (1,))])


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1])
def test_a_truncated_shard(sharded: Path, keep: int) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:keep])
    error = failure(sharded)
    assert f"{shard} is truncated or not a safetensors file ({shard.stat().st_size} bytes)" in error.message
    assert error.hint == "download the file again"


@pytest.mark.parametrize(
    "content", [b"garbage" * 100, b"\xff" * 64, (2).to_bytes(8, "little") + b"[]", b"<html>not found</html>"]
)
def test_garbage_for_a_shard(sharded: Path, content: bytes) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[0]
    shard.write_bytes(content)
    assert f"{shard} is truncated or not a safetensors file" in failure(sharded).message


def test_a_shard_cut_after_its_header_was_read(sharded: Path) -> None:
    checkpoint = Checkpoint(sharded)
    shard = sharded / checkpoint.files[0]
    name = next(n for n, info in checkpoint.tensors.items() if info.file == shard.name)
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(QtoolError, match=f"cannot read {shard}"):
        checkpoint.read(name)


def edit_index(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


def test_an_index_that_names_missing_files(sharded: Path) -> None:
    files = sorted(sharded.glob("*.safetensors"))
    files[1].unlink()
    files[2].unlink()
    error = failure(sharded)
    assert f"names 2 of {len(files)} files that are missing: {files[1].name}, {files[2].name}" in error.message
    assert error.hint == "download the checkpoint again"


@pytest.mark.parametrize(
    "file", ["../x.safetensors", "/x.safetensors", "a/x.safetensors", "..", "", "x.bin", "a\\..\\..\\x"]
)
def test_an_index_that_points_elsewhere(sharded: Path, file: str) -> None:
    save_file({"x": torch.ones(1)}, sharded.parent / "x.safetensors")
    edit_index(sharded, lambda index: index["weight_map"].update({"x": file}))
    error = failure(sharded)
    assert f"names `{file}`, which is not a safetensors file of this folder" in error.message


def test_a_tensor_in_another_shard_than_the_index_says(sharded: Path) -> None:
    checkpoint = Checkpoint(sharded)
    name = "model.norm.weight"
    other = next(f for f in checkpoint.files if f != checkpoint.tensors[name].file)
    edit_index(sharded, lambda index: index["weight_map"].update({name: other}))
    error = failure(sharded)
    assert f"says that `{name}` is in {other}, but it is not there" in error.message
    edit_index(
        sharded, lambda index: index["weight_map"].update({name: checkpoint.tensors[name].file, "absent": other})
    )
    assert f"says that `absent` is in {other}, but it is not there" in failure(sharded).message


def test_a_tensor_in_two_shards(sharded: Path) -> None:
    files = sorted(sharded.glob("*.safetensors"))
    twice = load_file(files[0])
    save_file({**load_file(files[1]), **twice}, files[1])
    error = failure(sharded)
    assert f"is both in {files[0].name} and in {files[1].name}" in error.message
    assert any(f"`{name}`" in error.message for name in twice)


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": []}', '{"weight_map": {"a": 3}}', "{}"])
def test_an_index_that_is_none(sharded: Path, content: str) -> None:
    (sharded / INDEX).write_text(content)
    assert str(sharded / INDEX) in failure(sharded).message


@pytest.mark.parametrize("content", ["{", "[]", "3", "\x00"])
def test_a_config_that_is_none(sharded: Path, content: str) -> None:
    (sharded / "config.json").write_text(content)
    assert str(sharded / "config.json") in failure(sharded).message


def test_only_pickles(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02")
    error = failure(tmp_path, UsageError)
    assert "has no safetensors, only pytorch_model.bin: pickle files can run code and are not read" in error.message
    assert "save_pretrained" in (error.hint or "")


def test_an_empty_folder(tmp_path: Path) -> None:
    assert failure(tmp_path, UsageError).message == f"{tmp_path} holds no *.safetensors"


@pytest.mark.parametrize("model", ["./absent", "/absent/model", "a b", "x/y/z", "absent"])
def test_a_path_that_is_not_there(model: str) -> None:
    with pytest.raises(UsageError) as caught:
        locate(model)
    assert caught.value.message == f"no such file or folder: {model}"
    assert "org/name" in (caught.value.hint or "")


def test_a_file_of_another_type(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(b"")
    with pytest.raises(UsageError, match=r"model\.bin is neither a \.safetensors nor a \.gguf file"):
        locate(str(path))


def test_where_a_name_leads(tmp_path: Path) -> None:
    assert local_path(str(tmp_path)) == tmp_path
    assert local_path("org/name") is None
    assert local_path("org/name@v1.0") is None


def test_a_hub_id_without_a_network() -> None:
    with pytest.raises(QtoolError) as caught:
        locate("no-such-org-of-qtool/no-such-model")
    assert "`no-such-org-of-qtool/no-such-model` is no local folder" in caught.value.message
    assert caught.value.hint


@pytest.fixture
def gguf_hub(make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """A repository `org/gguf` as they are on the hub; what was fetched from it, with the revision."""
    import huggingface_hub
    from huggingface_hub.errors import NotASafetensorsRepoError, RemoteEntryNotFoundError

    folder, fetched = tmp_path / "hub", []
    run(make_model(), tmp_path / "made", {"scheme": "f16"})
    (folder / "BF16").mkdir(parents=True)
    shutil.copyfile(tmp_path / "made" / "model.gguf", folder / "tiny-F16.gguf")
    parts = [f"BF16/tiny-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    files = ["README.md", *parts, "imatrix.gguf", "mmproj.gguf", *(f"tiny-Q{i}.gguf" for i in range(2, 7))]
    for name in files:
        (folder / name).write_bytes(b"")
    files.append("tiny-F16.gguf")

    def hf_hub_download(repo: str, file: str, revision: str | None) -> str:
        assert repo == "org/gguf"
        if file not in files:
            response = httpx.Response(404, request=httpx.Request("GET", "https://hub"))
            raise RemoteEntryNotFoundError("404", response=response)
        fetched.append((file, revision))
        return str(folder / file)

    def get_safetensors_metadata(repo: str, revision: str | None) -> None:
        raise NotASafetensorsRepoError(repo)

    def snapshot_download(repo: str, allow_patterns: list[str], **_: Any) -> str:
        assert not any(Path("a.gguf").match(pattern) for pattern in allow_patterns)
        return str(tmp_path / "made-without-weights")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", get_safetensors_metadata)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda repo, revision: files)
    return fetched


def test_one_gguf_file_of_the_hub(gguf_hub: list[Any], tmp_path: Path) -> None:
    assert locate("org/gguf/tiny-F16.gguf") == tmp_path / "hub" / "tiny-F16.gguf"
    checkpoint = open_headers("org/gguf@v1.0/tiny-F16.gguf")
    assert checkpoint.config["model_type"] == "llama"
    assert gguf_hub == [("tiny-F16.gguf", None), ("tiny-F16.gguf", "v1.0")]


@pytest.mark.parametrize("part", [1, 2])
def test_a_split_gguf_file_of_the_hub(gguf_hub: list[Any], tmp_path: Path, part: int) -> None:
    parts = [f"BF16/tiny-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    assert locate(f"org/gguf@refs/pr/7/{parts[part - 1]}") == tmp_path / "hub" / parts[0]
    assert gguf_hub == [(name, "refs/pr/7") for name in parts]


@pytest.mark.parametrize("command", [locate, open_headers])
def test_a_gguf_repository_is_not_downloaded_whole(gguf_hub: list[Any], command: Callable[[str], Any]) -> None:
    first = "BF16/tiny-00001-of-00003.gguf"
    listed = f"{first}, tiny-F16.gguf, tiny-Q2.gguf, tiny-Q3.gguf, tiny-Q4.gguf, tiny-Q5.gguf, ..."
    with pytest.raises(UsageError) as caught:
        command("org/gguf@v1")
    assert caught.value.message == f"`org/gguf@v1` on the hub is a repository of GGUF files: {listed}"
    assert caught.value.hint == f"give one of them: `org/gguf@v1/{first}`"
    with pytest.raises(UsageError) as caught:
        command("org/gguf/tiny-Q9.gguf")
    assert caught.value.message == f"`org/gguf` on the hub has no `tiny-Q9.gguf`: its GGUF files are {listed}"
    assert gguf_hub == []


def test_a_gguf_file_of_the_hub_without_a_network() -> None:
    with pytest.raises(QtoolError, match="is no local folder and is not in the cache") as caught:
        locate("no-such-org-of-qtool/no-such-model/x.gguf")
    assert not isinstance(caught.value, UsageError)


def test_a_gguf_file_that_is_not_beside_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "llama").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"no such file or folder: models/llama/absent\.gguf"):
        locate("models/llama/absent.gguf")


def test_a_tensor_of_an_unknown_type(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    save_file({"a": torch.ones(2, dtype=torch.int16)}, tmp_path / "model.safetensors")
    monkeypatch.delitem(reader.DTYPE_BITS, "I16")
    assert "`a` in " in failure(tmp_path).message
    assert "has the unknown type I16" in failure(tmp_path).message


def test_identity_hashes_only_what_changed(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []
    lock = threading.Lock()

    def counting(path: Path) -> str:
        with lock:
            hashed.append(path.name)
        return sha256_file(path)

    monkeypatch.setattr(reader, "sha256_file", counting)
    checkpoint = Checkpoint(sharded)
    first = checkpoint.identity()
    assert [f.name for f in first] == [*checkpoint.files, "config.json"]
    assert sorted(hashed) == sorted(f.name for f in first)
    for found in first:
        content = (sharded / found.name).read_bytes()
        assert (found.size_bytes, found.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    hashed.clear()
    assert checkpoint.identity(first) == first
    assert hashed == []
    changed = sharded / checkpoint.files[0]
    stat = changed.stat()
    os.utime(changed, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    again = checkpoint.identity(first)
    assert hashed == [changed.name], "another time: hashed again"
    assert [f.sha256 for f in again] == [f.sha256 for f in first]
    hashed.clear()
    changed.write_bytes(changed.read_bytes()[:-1] + b"!")
    last = checkpoint.identity(again)
    assert changed.name in hashed
    assert last[0].sha256 != first[0].sha256
    assert last[1:] == first[1:]
    forged = FileIdentity(checkpoint.files[1], 1, 2, "0")
    assert checkpoint.identity([forged])[1].sha256 == first[1].sha256, "another size or time is no match"


# Writing

TENSORS = {
    "a.words": torch.arange(-6, 6, dtype=torch.int32).reshape(3, 4),
    "a.scale": torch.linspace(-1, 1, 3, dtype=torch.bfloat16)[:, None],
    "a.shape": torch.tensor([3, 32]),
    "b.half": torch.linspace(-2, 2, 5, dtype=torch.float16),
    "b.scalar": torch.tensor(2.5),
    "b.bytes": torch.arange(7, dtype=torch.uint8),
    "c.empty": torch.zeros(0, 3),
    "c.turned": torch.arange(12.0).reshape(3, 4).T,
}
TYPES = {
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.uint8: "U8",
}
UNITS = {"a": ["a.words", "a.scale", "a.shape"], "b": ["b.half", "b.scalar", "b.bytes"], "c": ["c.empty", "c.turned"]}
IDENTITY = {"recipe": {"scheme": "int4"}, "source": {"model.safetensors": "00"}}


def infos(two_files: bool = False) -> dict[str, TensorInfo]:
    """Headers in an order that keeps every tensor aligned, as a plan gives them."""
    order = sorted(TENSORS, key=lambda n: (two_files and n.startswith("c"), -TENSORS[n].element_size(), n))
    file = lambda n: "two.safetensors" if two_files and n.startswith("c") else "one.safetensors"  # noqa: E731
    return {n: TensorInfo(n, TYPES[TENSORS[n].dtype], tuple(TENSORS[n].shape), file(n)) for n in order}


def fill(staged: StagedOutput, units: list[str] | None = None) -> None:
    for unit in UNITS if units is None else units:
        if unit not in staged.done:
            digests = {name: staged.write(name, TENSORS[name]) for name in UNITS[unit]}
            staged.finish_unit(unit, {"tensors": digests})


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def make_output(out: Path, two_files: bool = False, force: bool = False) -> None:
    staged = StagedOutput(out, infos(two_files), IDENTITY, force)
    fill(staged)
    staged.write_index()
    staged.publish({"identity": IDENTITY})


@pytest.mark.parametrize("two_files", [False, True])
def test_the_library_reads_what_is_written(tmp_path: Path, two_files: bool) -> None:
    out = tmp_path / "deep" / "out"
    make_output(out, two_files)
    assert not partial_path(out).exists()
    found: dict[str, Tensor] = {}
    for file in sorted(out.glob("*.safetensors")):
        found.update(load_file(file))
        with safe_open(file, framework="pt") as handle:
            assert handle.metadata() == {"format": "pt"}
        assert int.from_bytes(file.read_bytes()[:8], "little") % 8 == 0, "the header ends on a multiple of 8"
    assert set(found) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
    assert (out / INDEX).exists() == two_files
    assert Checkpoint(out).tensors.keys() == TENSORS.keys()
    assert json.loads((out / "manifest.json").read_text()) == {"identity": IDENTITY}
    assert not (out / JOURNAL).exists()
    if two_files:
        index = json.loads((out / INDEX).read_text())
        assert index["weight_map"] == {n: i.file for n, i in infos(True).items()}
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in TENSORS.values())


def test_write_gives_the_digest_of_the_bytes(tmp_path: Path) -> None:
    staged = StagedOutput(tmp_path / "out", infos(), IDENTITY, False)
    tensor = TENSORS["a.words"]
    assert staged.write("a.words", tensor) == hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
    with pytest.raises(AssertionError):
        staged.write("a.words", tensor[:2])
    with pytest.raises(AssertionError):
        staged.write("a.words", tensor.to(torch.int64))


def test_two_runs_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        make_output(tmp_path / name, two_files=True)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.parametrize("finished", [0, 1, 2, 3])
@pytest.mark.parametrize("torn", [None, 1, 20, -1], ids=["whole", "one byte", "20 bytes", "no line end"])
def test_resuming_at_every_unit(tmp_path: Path, finished: int, torn: int | None) -> None:
    make_output(tmp_path / "whole")
    out = tmp_path / "out"
    interrupted = StagedOutput(out, infos(), IDENTITY, False)
    fill(interrupted, list(UNITS)[:finished])
    journal = partial_path(out) / JOURNAL
    if torn is not None:  # the next unit's line was being written when the power failed, and its data before
        for name in UNITS[list(UNITS)[min(finished, 2)]]:
            interrupted.write(name, TENSORS[name])
        line = json.dumps({"unit": list(UNITS)[min(finished, 2)], "record": {"tensors": {}}})
        if torn > 0:
            journal.write_text(journal.read_text() + line[:torn])
        else:
            journal.write_text(journal.read_text()[:-1])  # whole lines, but the last one's end is missing
    assert not out.exists(), "nothing appears before the end"
    resumed = StagedOutput(out, infos(), IDENTITY, False)
    assert list(resumed.done) == list(UNITS)[:finished]
    assert all(resumed.done[unit] == interrupted.done[unit] for unit in resumed.done)
    fill(resumed)
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    assert [line.get("unit") for line in lines] == [None, *UNITS], "the journal is whole again"
    resumed.write_index()
    resumed.publish({"identity": IDENTITY})
    assert contents(out) == contents(tmp_path / "whole")


def test_a_folder_without_a_journal_is_started_again(tmp_path: Path) -> None:
    partial = partial_path(tmp_path / "out")
    partial.mkdir()
    (partial / "one.safetensors").write_bytes(b"?")
    (partial / JOURNAL).write_text('{"ident')
    staged = StagedOutput(tmp_path / "out", infos(), IDENTITY, False)
    assert staged.done == {}
    fill(staged)
    staged.publish({})
    assert torch.equal(load_file(tmp_path / "out" / "one.safetensors")["a.words"], TENSORS["a.words"])


def test_a_run_of_another_recipe_is_not_resumed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    fill(StagedOutput(out, infos(), IDENTITY, False), ["a"])
    before = contents(partial_path(out))
    other = {**IDENTITY, "recipe": {"scheme": "int3"}}
    with pytest.raises(QtoolError) as caught:
        StagedOutput(out, infos(), other, False)
    assert "holds an interrupted run of another recipe or source (1 unit done)" in caught.value.message
    assert "--force" in (caught.value.hint or "")
    assert contents(partial_path(out)) == before, "it is left as it was"
    assert StagedOutput(out, infos(), other, True).done == {}
    assert StagedOutput(out, infos(), IDENTITY, True).done == {}


@pytest.mark.parametrize("how", ["too little before", "none while writing"])
def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    out = tmp_path / "out"
    make_output(out)
    before = contents(tmp_path)
    if how == "too little before":
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10))
    else:

        def full(descriptor: int, offset: int, length: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(QtoolError) as caught:
        StagedOutput(out, infos(), IDENTITY, True)
    assert f"no space for {out}" in caught.value.message
    assert "nothing was written" in (caught.value.hint or "")
    assert not partial_path(out).exists()
    assert contents(tmp_path) == before


def test_the_whole_size_is_taken_at_once(tmp_path: Path) -> None:
    StagedOutput(tmp_path / "out", infos(True), IDENTITY, False)
    make_output(tmp_path / "whole", two_files=True)
    for file in (tmp_path / "whole").glob("*.safetensors"):
        assert (partial_path(tmp_path / "out") / file.name).stat().st_size == file.stat().st_size


def test_publishing_replaces_an_old_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old.txt").write_text("old")
    staged = StagedOutput(out, infos(), IDENTITY, True)
    fill(staged)
    assert contents(out) == {"old.txt": b"old"}, "the old one stands until the new one is whole"
    renames: list[tuple[str, str]] = []
    rename = Path.rename

    def watched(self: Path, target: Path) -> Path:
        renames.append((self.name, Path(target).name))
        if self.name == "out.partial":
            assert (self / "manifest.json").exists(), "the manifest is in it before it appears"
            assert (tmp_path / "out.replaced" / "old.txt").exists(), "the old one is still there"
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", watched)
    staged.publish({"identity": IDENTITY})
    assert renames == [("out", "out.replaced"), ("out.partial", "out")]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    assert set(contents(out)) == {"manifest.json", "one.safetensors"}


def test_a_crash_while_publishing_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever rename fails, the same command again ends with the whole output and repeats no unit."""
    make_output(tmp_path / "whole")
    rename = Path.rename
    for crash_at in (0, 1):
        out = tmp_path / f"out{crash_at}"
        out.mkdir()
        (out / "old.txt").write_text("old")
        staged = StagedOutput(out, infos(), IDENTITY, True)
        fill(staged)
        calls: list[Path] = []

        def crashing(self: Path, target: Path, calls: list[Path] = calls, crash_at: int = crash_at) -> Path:
            calls.append(self)
            if len(calls) - 1 == crash_at:
                raise KeyboardInterrupt
            return rename(self, target)

        monkeypatch.setattr(Path, "rename", crashing)
        with pytest.raises(KeyboardInterrupt):
            staged.publish({"identity": IDENTITY})
        monkeypatch.setattr(Path, "rename", rename)
        old = [p for p in tmp_path.rglob("old.txt") if p.read_text() == "old"]
        assert old, "the old output is still somewhere"
        resumed = StagedOutput(out, infos(), IDENTITY, True)
        assert list(resumed.done) == list(UNITS), f"crash at rename {crash_at}: {len(resumed.done)} of 3 units are left"
        resumed.publish({"identity": IDENTITY})
        assert contents(out) == contents(tmp_path / "whole")
        assert not (tmp_path / f"out{crash_at}.replaced").exists()


# The whole pipeline


def run(model: Path, out: Path, recipe: dict[str, Any], progress: Callable[..., None] = quiet, **options: Any) -> Any:
    job = prepare(str(model), build(recipe, METHODS))
    return quantize(job, out, RunOptions(device="cpu", **options), progress)


RECIPES = {
    "rtn": {"method": "rtn", "scheme": "int4-g32-sym"},
    "gptq": {"method": "gptq", "scheme": "int3-g32-asym"},
}


def with_data(recipe: dict[str, Any], calibration_text: Path) -> dict[str, Any]:
    return {**recipe, "data": {"source": str(calibration_text), "rows": 12, "seqlen": 32}}


def without_manifest(folder: Path) -> dict[str, bytes]:
    """All bytes but those of the manifest, which tells times."""
    return {name: data for name, data in contents(folder).items() if name != "manifest.json"}


@pytest.mark.parametrize("method", RECIPES)
def test_an_interrupted_run_ends_with_the_same_bytes(
    make_model: MakeModel, calibration_text: Path, tmp_path: Path, method: str
) -> None:
    recipe, model = with_data(RECIPES[method], calibration_text), make_model(shards=True)
    source = contents(model)
    run(model, tmp_path / "whole", recipe)
    run(model, tmp_path / "again", recipe)
    expected = without_manifest(tmp_path / "whole")
    assert without_manifest(tmp_path / "again") == expected
    units = 3  # what is outside the blocks, and two blocks
    for boundary in range(1, units + 1):
        out = tmp_path / f"out{boundary}"
        seen: list[str] = []

        def interrupt(
            stage: str, done: int, total: int, detail: str, seen: list[str] = seen, boundary: int = boundary
        ) -> None:
            if stage == "quantize":
                seen.append(detail)
                if len(seen) == boundary:
                    raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run(model, out, recipe, interrupt)
        assert not out.exists()
        with (partial_path(out) / JOURNAL).open("a") as journal:
            journal.write('{"unit": "model.lay')
        report, up_to_date = run(model, out, recipe)
        assert not up_to_date
        assert report.resumed_units == boundary
        ours = without_manifest(out)
        assert ours.keys() == expected.keys()
        for name in expected:
            assert ours[name] == expected[name], f"{name} differs after an interruption at unit {boundary}"
        assert not partial_path(out).exists()
    assert contents(model) == source, "the source is untouched"


def test_the_same_run_again_is_up_to_date(make_model: MakeModel, tmp_path: Path) -> None:
    out, model = tmp_path / "out", make_model()
    assert run(model, out, RECIPES["rtn"])[1] is False
    before = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    report, up_to_date = run(model, out, RECIPES["rtn"])
    assert up_to_date
    assert len(report.layers) == 14
    assert {p.name: p.stat().st_mtime_ns for p in out.iterdir()} == before
    with pytest.raises(UsageError) as caught:
        run(model, out, {**RECIPES["rtn"], "scheme": "int8-channel-sym"})
    assert "was made otherwise" in caught.value.message
    assert "int8-channel-sym" in caught.value.message
    assert "--force" in (caught.value.hint or "")
    run(model, out, {**RECIPES["rtn"], "scheme": "int8-channel-sym"}, force=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_an_output_that_is_not_ours_is_refused(make_model: MakeModel, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match=re.escape(str(out))):
        run(make_model(), out, RECIPES["rtn"])
    assert contents(out) == {"thesis.txt": b"years of work"}


def test_a_full_disk_touches_neither_source_nor_old_output(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, model = tmp_path / "out", make_model()
    run(model, out, RECIPES["rtn"])
    before, source = contents(tmp_path), contents(model)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(QtoolError, match="no space for"):
        run(model, out, {**RECIPES["rtn"], "scheme": "int8-channel-sym"}, force=True)
    assert contents(tmp_path) == before
    assert contents(model) == source


def test_a_damaged_output_is_noticed(make_model: MakeModel, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(make_model(), out, RECIPES["rtn"])
    path = out / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UsageError, match=r"is damaged: model\.safetensors is missing or has changed"):
        run(make_model(), out, RECIPES["rtn"])
