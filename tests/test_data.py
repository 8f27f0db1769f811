"""`qtool.calibration`: texts from files, tables, folders and built-in data; texts to rows of tokens."""

import csv
import json
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtool.calibration.texts import BUILT_IN, local_files, read_texts
from qtool.calibration.tokens import (
    Tokenizer,
    TokenRows,
    batches,
    calibration_rows,
    make_rows,
    row_length,
    too_little_data,
)
from qtool.errors import QtoolError, UsageError
from qtool.recipe import DataSpec

MESSAGES = [{"role": "user", "content": "How many bits?"}, {"role": "assistant", "content": "Four."}]
TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"


def no_messages(messages):
    raise AssertionError(f"these are no chat messages: {messages}")


def joined(messages):
    return "|".join(f"{m['role']}: {m['content']}" for m in messages)


def texts(path, column=None, split="train", render=no_messages):
    return list(read_texts(DataSpec(source=str(path), column=column), split, render))


def put(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def put_lines(path, *records):
    return put(path, "".join(json.dumps(record) + "\n" for record in records))


def refused(kind, action, *arguments, **options):
    with pytest.raises(QtoolError) as raised:
        action(*arguments, **options)
    assert type(raised.value) is kind
    assert "\n" not in raised.value.message
    return raised.value


# ---- files


@pytest.mark.parametrize("suffix", [".txt", ".md"])
def test_a_text_file_is_one_text(tmp_path, suffix):
    assert texts(put(tmp_path / f"a{suffix}", "one\ntwo\n\nthrée\n")) == ["one\ntwo\n\nthrée\n"]


def test_json_lines(tmp_path):
    file = put(tmp_path / "a.jsonl", '{"text": "one"}\n\n{"text": "tw\\u00f6", "id": 3}\n{"text": null}\n{"text": ""}')
    assert texts(file) == ["one", "twö", ""]  # an empty line and a null are nothing


def test_a_named_column(tmp_path):
    file = put_lines(tmp_path / "a.jsonl", {"text": "no", "content": "yes"}, {"content": "too"})
    assert texts(file, column="content") == ["yes", "too"]


def test_text_goes_before_messages(tmp_path):
    file = put_lines(tmp_path / "a.jsonl", {"messages": MESSAGES, "text": "plain"})
    assert texts(file) == ["plain"]
    assert texts(file, column="messages", render=joined) == ["user: How many bits?|assistant: Four."]


@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_messages_are_rendered(tmp_path, column):
    file = put_lines(tmp_path / "a.jsonl", {"id": 1, column: MESSAGES})
    assert texts(file, render=joined) == ["user: How many bits?|assistant: Four."]


def test_a_column_that_is_not_there_is_an_error_that_names_those_that_are(tmp_path):
    file = put_lines(tmp_path / "a.jsonl", {"id": 1, "content": "x"})
    error = refused(UsageError, texts, file)
    assert error.message == f"{file} has no column `text`; it has id, content"
    assert error.hint == "name the column: `--column` of eval-ppl, `--set data.column=...` of quantize"
    error = refused(UsageError, texts, file, column="body")
    assert error.message == f"{file} has no column `body`; it has id, content"


def test_a_column_of_numbers_is_an_error(tmp_path):
    file = put_lines(tmp_path / "a.jsonl", {"text": 3})
    assert refused(QtoolError, texts, file).message == f"{file}: column `text` holds int, not text"


def test_a_record_that_is_no_object_is_an_error(tmp_path):
    file = put_lines(tmp_path / "a.jsonl", ["text"])
    assert refused(UsageError, texts, file).message == f"{file}: a record is not an object with columns, but list"


def test_bad_json_is_an_error_with_its_place(tmp_path):
    file = put(tmp_path / "a.jsonl", '{"text": "fine"}\n{"text": oops}\n')
    error = refused(UsageError, texts, file)
    assert error.message.startswith(f"{file}: line 2 is not JSON: Expecting value")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_bad_utf8_is_an_error(tmp_path, name):
    file = tmp_path / name
    file.write_bytes(b'{"text": "caf\xe9"}\n')
    error = refused(UsageError, texts, file)
    assert error.message == (
        f"{file} cannot be read as UTF-8 {file.suffix[1:]}: "
        "'utf-8' codec can't decode byte 0xe9 in position 13: invalid continuation byte"
    )


def test_an_unknown_suffix_is_an_error(tmp_path):
    error = refused(UsageError, texts, put(tmp_path / "a.pdf", "x"))
    assert error.message == f"{tmp_path / 'a.pdf'} is of no known type"
    assert error.hint == "known: .txt, .md, .jsonl, .json, .csv, .parquet"


@pytest.mark.parametrize("name", ["./nope.txt", "nope.jsonl", "/nope", "~/nope", "a/b/c", "sub/nope.parquet"])
def test_a_missing_file_is_not_looked_for_elsewhere(name):
    assert refused(UsageError, texts, name).message == f"no such file or folder: {name}"


def test_a_folder_is_its_files_in_order(tmp_path):
    put(tmp_path / "b.txt", "second")
    put_lines(tmp_path / "a.jsonl", {"text": "first"})
    put(tmp_path / "c.md", "third")
    put(tmp_path / "picture.png", "not this")
    assert texts(tmp_path) == ["first", "second", "third"]
    assert local_files(DataSpec(source=str(tmp_path))) == [tmp_path / n for n in ("a.jsonl", "b.txt", "c.md")]


def test_a_folder_without_texts_is_an_error(tmp_path):
    put(tmp_path / "picture.png", "x")
    assert refused(UsageError, texts, tmp_path).message == (
        f"folder {tmp_path} holds no .txt, .md, .jsonl, .json, .csv, .parquet"
    )


def test_a_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    put(tmp_path / "a.txt", "at home")
    assert texts("~/a.txt") == ["at home"]
    assert local_files(DataSpec(source="~/a.txt")) == [tmp_path / "a.txt"]


def test_nothing_is_read_before_it_is_wanted(tmp_path):
    file = put(tmp_path / "a.jsonl", '{"text": "one"}\n{"text": "two"}\nthis is no JSON\n')
    lazily = read_texts(DataSpec(source=str(file)), "train", no_messages)
    assert [next(lazily), next(lazily)] == ["one", "two"]
    with pytest.raises(UsageError):
        next(lazily)


# ---- tables and data sets, through `datasets`


@pytest.mark.slow
def test_tables(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    from datasets import Dataset

    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["id", "text"], ["1", "öne, two"], ["2", "three\nfour"]])
    assert texts(tmp_path / "a.csv") == ["öne, two", "three\nfour"]
    assert refused(UsageError, texts, tmp_path / "a.csv", column="body").message == (
        f"{tmp_path / 'a.csv'} has no column `body`; it has id, text"
    )
    put(tmp_path / "a.json", json.dumps([{"text": "in"}, {"text": "a list"}]))
    assert texts(tmp_path / "a.json") == ["in", "a list"]
    Dataset.from_dict({"content": ["x", "y"], "messages": [MESSAGES, MESSAGES[:1]]}).to_parquet(tmp_path / "a.parquet")
    assert texts(tmp_path / "a.parquet", column="content") == ["x", "y"]
    rendered = texts(tmp_path / "a.parquet", render=joined)
    assert rendered == ["user: How many bits?|assistant: Four.", "user: How many bits?"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "content"), [("a.parquet", b"PAR1 but no more"), ("a.json", b"{oops"), ("a.csv", b"")]
)
def test_a_damaged_table_is_an_error_of_one_line(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(QtoolError) as raised:
        texts(tmp_path / name)
    assert str(tmp_path / name) in raised.value.message
    assert "\n" not in raised.value.message


@pytest.mark.slow
@pytest.mark.parametrize("name", ["org/no-such-data", "org/no-such-data:config", "nope"])
def test_a_data_set_that_cannot_be_had_offline_is_an_error_of_one_line(name):
    error = refused(UsageError, texts, name)
    assert error.message.startswith(
        f"`{name}` is no file, no built-in data set (python-docs), and cannot be loaded: Couldn't "
    )
    assert error.hint == (
        "give a .txt, .jsonl, .csv or .parquet file, or a data set id as `org/name` or `org/name:config`"
    )


# ---- python-docs


@pytest.fixture(scope="module")
def python_docs():
    return {split: texts("python-docs", split=split) for split in ("train", "test")}


@pytest.mark.slow
def test_python_docs_are_there_and_disjoint(python_docs):
    train, test = python_docs["train"], python_docs["test"]
    assert BUILT_IN == ("python-docs",)
    assert not set(train) & set(test)
    assert sum(map(len, train)) > 2_000_000
    assert sum(map(len, test)) > 200_000
    assert 4 < len(train) / len(test) < 12  # one document in eight is held out
    assert min(map(len, [*train, *test])) >= 200


@pytest.mark.slow
def test_python_docs_are_the_same_every_time(python_docs):
    from qtool.calibration import python_docs as source

    source._documents.cache_clear()
    assert texts("python-docs", split="test") == python_docs["test"]


@pytest.mark.slow
def test_a_split_that_is_asked_for_goes_before_the_default(python_docs):
    spec = DataSpec(split="test")
    assert list(read_texts(spec, "train", no_messages)) == python_docs["test"]


def test_an_unknown_split_is_an_error():
    error = refused(UsageError, lambda: list(read_texts(DataSpec(split="tset"), "train", no_messages)))
    assert error.message == "unknown split of python-docs `tset`"
    assert error.hint == "did you mean `test`?"


def test_built_in_data_and_data_sets_have_no_local_files():
    assert local_files(DataSpec()) == []
    assert local_files(DataSpec(source="org/name")) == []


# ---- the tokenizer


@pytest.fixture(scope="module")
def tokenizer(make_model):
    return Tokenizer(make_model(), 320)


def altered(make_model, folder, **changes):
    """A copy of a model whose tokenizer.json is changed at the top level."""
    shutil.copytree(make_model(), folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    put(folder / "tokenizer.json", json.dumps({**tokenizer, **changes}))
    return folder


def test_a_text_begins_with_bos_where_the_tokenizer_says_so(tokenizer):
    ids = tokenizer.encode("round the grid")
    assert tokenizer.adds_bos
    assert tokenizer.bos == [0]
    assert ids == tokenizer.inner("round the grid")["input_ids"]
    assert ids[0] == 0
    assert 0 not in ids[1:]
    assert tokenizer.decode(ids) == "round the grid"
    assert tokenizer.encode("") == [0]


def test_a_text_begins_without_bos_where_the_tokenizer_adds_none(make_model, tmp_path, tokenizer):
    without = Tokenizer(altered(make_model, tmp_path / "m", post_processor=None), 320)
    assert not without.adds_bos
    assert without.bos == []
    assert without.encode("round the grid") == tokenizer.encode("round the grid")[1:]


def test_no_text_ends_with_eos_whatever_the_tokenizer_does(make_model, tmp_path, tokenizer):
    template = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
                   {"SpecialToken": {"id": "</s>", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]},
                           "</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}},
    }  # fmt: skip
    with_eos = Tokenizer(altered(make_model, tmp_path / "m", post_processor=template), 320)
    assert with_eos.inner("grid")["input_ids"][-1] == 1
    assert with_eos.encode("round the grid") == tokenizer.encode("round the grid")


def test_the_hash_tells_vocabularies_apart(make_model, tmp_path, tokenizer):
    assert Tokenizer(make_model(dtype="float32"), 320).sha256 == tokenizer.sha256
    folder = altered(make_model, tmp_path / "m")
    changed = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = changed["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    put(folder / "tokenizer.json", json.dumps(changed))
    assert Tokenizer(folder, 320).sha256 != tokenizer.sha256


def test_a_tokenizer_of_more_tokens_than_the_model_is_refused(make_model):
    model = make_model()
    assert Tokenizer(model, 300).name == "TokenizersBackend (300 tokens)"
    error = refused(QtoolError, Tokenizer, model, 299)
    assert error.message == f"the tokenizer in {model} has 300 tokens, but the model's embedding 299 rows"
    assert error.hint == "copy the tokenizer files that came with the model"


def test_a_missing_tokenizer_is_an_error_of_one_line(make_model, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(make_model(), folder)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    error = refused(QtoolError, Tokenizer, folder, 320)
    assert error.message.startswith(f"{folder} has no tokenizer that transformers can load: ")
    assert error.hint == "copy the model's tokenizer files beside its weights"


def test_a_damaged_tokenizer_is_an_error_of_one_line(make_model, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(make_model(), folder)
    put(folder / "tokenizer.json", '{"version": "1.0", "model"')
    error = refused(QtoolError, Tokenizer, folder, 320)
    assert error.message.startswith(f"{folder} has no tokenizer that transformers can load: ")


def test_messages_without_a_chat_template_are_refused(tokenizer):
    error = refused(UsageError, tokenizer.render, MESSAGES)
    assert error.message == "the data holds chat messages, but the model's tokenizer has no chat template"
    assert error.hint == "name a text column"


@pytest.fixture(scope="module")
def chatty(make_model, tmp_path_factory):
    """The tiny model with a chat template."""
    folder = tmp_path_factory.mktemp("chat") / "m"
    shutil.copytree(make_model(), folder)
    put(folder / "chat_template.jinja", TEMPLATE)
    return Tokenizer(folder, 320)


def test_messages_are_written_by_the_chat_template(chatty, tmp_path):
    assert chatty.render(MESSAGES) == "[user] How many bits?\n[assistant] Four.\n"
    file = put_lines(tmp_path / "a.jsonl", {"messages": MESSAGES})
    made = calibration_rows(DataSpec(source=str(file), pack=False), chatty, 128)
    assert [chatty.decode(row.tolist()) for row in made.rows] == ["[user] How many bits?\n[assistant] Four.\n"]


def test_messages_that_the_template_does_not_take_are_refused(make_model, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(make_model(), folder)
    put(folder / "chat_template.jinja", "{{ raise_exception('roles must alternate') }}")
    error = refused(UsageError, Tokenizer(folder, 320).render, MESSAGES)
    assert error.message == "the model's chat template does not take these messages: roles must alternate"


# ---- rows


def rows_of(tokenizer, source, context=128, **options):
    return calibration_rows(DataSpec(source=str(source), **options), tokenizer, context)


def test_packed_rows_are_windows_of_one_stream(tokenizer, tmp_path):
    some = ["round the grid", "every weight", "block of one column", "x"]
    file = put_lines(tmp_path / "a.jsonl", *({"text": text} for text in some))
    stream = [token for text in some for token in tokenizer.inner(text)["input_ids"]]  # BOS before each text
    made = rows_of(tokenizer, file, seqlen=5)
    expected = [stream[i : i + 5] for i in range(0, len(stream) - len(stream) % 5, 5)]
    assert len(stream) % 5 != 0  # the remainder is dropped
    assert [row.tolist() for row in made.rows] == expected
    assert stream.count(0) == 4
    assert (made.source, made.tokens) == (str(file), 5 * len(expected))
    assert all(row.dtype == torch.long for row in made.rows)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.lists(st.integers(0, 99), max_size=20), max_size=12), st.integers(2, 16))
def test_packing_keeps_every_token_but_the_remainder(token_lists, seqlen):
    from qtool.calibration.tokens import _packed

    rows = list(_packed(token_lists, seqlen))
    stream = [token for tokens in token_lists for token in tokens]
    assert [token for row in rows for token in row] == stream[: len(stream) // seqlen * seqlen]
    assert {len(row) for row in rows} <= {seqlen}


def test_unpacked_rows_are_the_beginnings_of_texts(tokenizer, tmp_path):
    some = ["round the grid and round the block again", "", "x"]
    file = put_lines(tmp_path / "a.jsonl", *({"text": text} for text in some))
    made = rows_of(tokenizer, file, seqlen=6, pack=False)
    first, last = (tokenizer.inner(text)["input_ids"] for text in (some[0], some[2]))
    assert [row.tolist() for row in made.rows] == [first[:6], last]  # a row of BOS alone is none


def test_the_seed_chooses_the_rows(tokenizer, calibration_text):
    def chosen(**options):
        return [row.tolist() for row in rows_of(tokenizer, calibration_text, seqlen=16, **options).rows]

    everything = chosen(rows=100_000)
    zero, one = chosen(rows=10), chosen(rows=10, seed=1)
    assert len(everything) > 120
    assert chosen(rows=10) == zero
    assert len(zero) == len(one) == 10
    assert zero != one
    for some in (zero, one):
        places = [everything.index(row) for row in some]
        assert places == sorted(places)
        assert places[-1] > 20  # from all over the text, not its beginning
    assert len(chosen()) == 128  # by default


def test_the_hash_is_of_the_ids(tokenizer, calibration_text):
    a, b = (rows_of(tokenizer, calibration_text, seqlen=16, rows=10, seed=seed) for seed in (0, 1))
    again = rows_of(tokenizer, calibration_text, seqlen=16, rows=10)
    assert a.sha256 == again.sha256 != b.sha256
    assert make_rows([[1, 2], [3]], "x").sha256 != make_rows([[1], [2, 3]], "x").sha256


def test_the_length_of_rows():
    assert row_length(DataSpec(), 512) == 512
    assert row_length(DataSpec(), 131072) == 2048
    assert row_length(DataSpec(seqlen=4096), 131072) == 4096
    assert row_length(DataSpec(seqlen=2), 128) == 2
    error = refused(UsageError, row_length, DataSpec(seqlen=129), 128)
    assert error.message == "rows of 129 tokens do not fit the model: its context is 128"


@pytest.mark.parametrize("key", ["rows", "seqlen"])
@pytest.mark.parametrize("number", [0, -3])
def test_numbers_of_rows_and_tokens_are_positive(key, number):
    least = {"rows": 1, "seqlen": 2}[key]
    error = refused(UsageError, lambda: DataSpec(**{key: number}))
    assert error.message == f"{key} is {number}, but must be a number of at least {least}"


def test_rows_longer_than_the_context_are_refused(tokenizer, calibration_text):
    error = refused(UsageError, rows_of, tokenizer, calibration_text, seqlen=129)
    assert error.message == "rows of 129 tokens do not fit the model: its context is 128"


@pytest.mark.parametrize("content", ["", "round the grid"])
def test_too_short_for_a_row(tokenizer, tmp_path, content):
    file = put(tmp_path / "a.txt", content)
    error = refused(QtoolError, rows_of, tokenizer, file, seqlen=64)
    assert error.message == f"`{file}` gives no row of 64 tokens: it is empty or too short"
    assert error.hint == "give more text, shorter rows (`--seqlen 16`), or one row per text (`--no-pack`)"


def test_an_empty_file_of_json_lines(tokenizer, tmp_path):
    error = refused(QtoolError, rows_of, tokenizer, put(tmp_path / "a.jsonl", "\n"), pack=False)
    assert error.message == f"`{tmp_path / 'a.jsonl'}` gives no row of 128 tokens: it is empty or too short"


def test_too_little_data_says_how_much_would_do():
    assert too_little_data(256, 64, 32) is None
    assert too_little_data(255, 64, 32) == (
        "255 calibration tokens are few for layers of 64 inputs: 256 would do (`--rows 8` of 32 tokens)"
    )
    assert too_little_data(10, 100, 32) == (
        "10 calibration tokens are few for layers of 100 inputs: 400 would do (`--rows 13` of 32 tokens)"
    )


@pytest.mark.parametrize(("inputs", "seqlen"), [(64, 32), (100, 32), (4096, 2048), (7, 1000)])
def test_as_many_rows_as_are_advised_are_enough(inputs, seqlen):
    message = too_little_data(0, inputs, seqlen)
    advised = int(message.split("`--rows ")[1].split("`")[0])
    assert too_little_data(advised * seqlen, inputs, seqlen) is None
    assert too_little_data((advised - 1) * seqlen, inputs, seqlen) is not None


@settings(deadline=None)
@given(st.lists(st.integers(1, 9), max_size=20), st.integers(1, 30))
def test_batches_hold_each_row_once_and_rows_of_one_length(lengths, batch_tokens):
    rows = [torch.full((length,), index) for index, length in enumerate(lengths)]
    seen = []
    for batch_BT, indexes in batches(rows, batch_tokens):
        assert batch_BT.shape == (len(indexes), len(rows[indexes[0]]))
        assert batch_BT.numel() <= batch_tokens or len(indexes) == 1
        for row_T, index in zip(batch_BT, indexes, strict=True):
            assert torch.equal(row_T, rows[index])
        seen += indexes
    assert sorted(seen) == list(range(len(rows)))


def test_tokens_are_counted():
    assert TokenRows([torch.arange(3), torch.arange(5)], "x", "y").tokens == 8
