"""`qtool.evaluation`: which tokens are scored, the figures with their errors, the whole against a naive computation."""

import dataclasses
import json
import math
import random
import shutil
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from qtool.calibration.tokens import Tokenizer
from qtool.checkpoint.reader import Checkpoint
from qtool.errors import QtoolError, UsageError
from qtool.evaluation import losses, statistics
from qtool.evaluation.describe import describe
from qtool.evaluation.evaluate import evaluate
from qtool.evaluation.gates import check_gates, check_spec, parse_increase
from qtool.evaluation.protocols import eval_rows, hidden_positions, scored_bytes, targets
from qtool.formats.weights import Weights
from qtool.job import prepare
from qtool.methods import METHODS
from qtool.models.blockwise import BlockModel
from qtool.pipeline import RunOptions, quantize
from qtool.recipe import DataSpec, EvalSpec, build

BOS = 1


class Letters:
    """A tokenizer of one token per letter, its code point; `bos` as the real one has it."""

    def __init__(self, bos=(BOS,)):
        self.bos = list(bos)

    def encode(self, text):
        return [*self.bos, *map(ord, text)]

    def decode(self, ids):
        return "".join(chr(i) for i in ids if i != BOS)

    def render(self, messages):
        raise AssertionError("no messages here")


def silent(*_):
    pass


def rows_of(tmp_path, text, context, bos=(BOS,), **options):
    """The rows of a text under a protocol, as strings in which "^" is BOS, and the strings that are scored."""
    file = tmp_path / ("data.jsonl" if isinstance(text, list) else "data.txt")
    if isinstance(text, list):
        file.write_text("".join(json.dumps({"text": t}) + "\n" for t in text), encoding="utf-8")
    else:
        file.write_text(text, encoding="utf-8")
    spec = EvalSpec(DataSpec(str(file), rows=options.pop("rows", None)), **options)
    made = eval_rows(spec, Letters(bos), context)
    strings = ["".join("^" if i == BOS else chr(i) for i in row.tolist()) for row in made.rows]
    scored = [s[first:] for s, first in zip(strings, made.first_scored, strict=True)]
    assert made.tokens == sum(map(len, scored))
    assert made.context == context
    return strings, scored


# ---- protocols


def test_windows_do_not_overlap_and_leave_out_each_first_token(tmp_path):
    strings, scored = rows_of(tmp_path, "abcdefghij", 4)
    assert strings == ["^abc", "defg", "hij"]
    assert scored == ["abc", "efg", "ij"]


def test_a_last_window_of_one_token_is_left_out(tmp_path):
    strings, scored = rows_of(tmp_path, "abcdefgh", 4)  # 9 tokens with BOS
    assert strings == ["^abc", "defg"]
    assert scored == ["abc", "efg"]


def test_windows_with_a_stride_score_every_token_where_it_has_most_context(tmp_path):
    strings, scored = rows_of(tmp_path, "abcdefghij", 4, stride=2)
    assert strings == ["^abc", "bcde", "defg", "fghi", "hij"]
    assert scored == ["abc", "de", "fg", "hi", "j"]


def test_windows_with_a_stride_of_one(tmp_path):
    strings, scored = rows_of(tmp_path, "abcde", 3, stride=1)
    assert strings == ["^ab", "abc", "bcd", "cde"]
    assert scored == ["ab", "c", "d", "e"]


def test_a_stride_of_the_whole_context_is_no_stride(tmp_path):
    assert rows_of(tmp_path, "abcdefghijk", 4, stride=4) == rows_of(tmp_path, "abcdefghijk", 4)


def test_windows_join_the_texts_with_an_empty_line(tmp_path):
    strings, scored = rows_of(tmp_path, ["ab", "cd", "ef"], 6)
    assert strings == ["^ab\n\nc", "d\n\nef"]
    assert scored == ["ab\n\nc", "\n\nef"]


def test_windows_without_bos_do_not_score_the_very_first_token(tmp_path):
    strings, scored = rows_of(tmp_path, "abcdefg", 4, bos=(), stride=2)
    assert strings == ["abcd", "cdef", "efg"]
    assert scored == ["bcd", "ef", "g"]


def test_a_text_shorter_than_the_context_is_one_window(tmp_path):
    assert rows_of(tmp_path, "abc", 16) == (["^abc"], ["abc"])
    assert rows_of(tmp_path, "abc", 16, stride=3) == (["^abc"], ["abc"])


@settings(deadline=None, max_examples=150)
@given(length=st.integers(0, 60), context=st.integers(2, 17), data=st.data())
def test_windows_score_each_token_once_in_the_first_window_that_holds_it(tmp_path_factory, length, context, data):
    stride = data.draw(st.integers(1, context))
    text = "".join(chr(0x4E00 + i) for i in range(length))  # each token tells its place
    tmp_path = tmp_path_factory.mktemp("windows", numbered=True)
    if length == 0:
        with pytest.raises(QtoolError, match="gives nothing to score"):
            rows_of(tmp_path, text, context, stride=stride)
        return
    strings, scored = rows_of(tmp_path, text, context, stride=stride)
    stream = "^" + text
    expected = {}
    for token in range(1, len(stream)):
        window = 0
        while window * stride + context <= token:
            window += 1
        if token > window * stride:  # otherwise nothing stands before it: only without overlap
            expected.setdefault(window, []).append(token)
    assert stride == context or sum(map(len, expected.values())) == length
    assert scored == ["".join(stream[t] for t in tokens) for tokens in expected.values()]
    assert strings == [stream[w * stride : w * stride + context] for w in expected]


def test_rows_stand_by_themselves_and_are_cut_at_the_context(tmp_path):
    strings, scored = rows_of(tmp_path, ["abcdefgh", "", "x", "yz"], 4, protocol="rows")
    assert strings == ["^abc", "^x", "^yz"]
    assert scored == ["abc", "x", "yz"]


def test_rows_of_a_single_token_have_nothing_to_score(tmp_path):
    strings, scored = rows_of(tmp_path, ["a", "bc", ""], 4, bos=(), protocol="rows")
    assert (strings, scored) == (["bc"], ["c"])


def test_llama_cpp_scores_the_second_half_of_windows_that_begin_with_bos(tmp_path):
    strings, scored = rows_of(tmp_path, "abcdefghijklmnopqr\n", 8, protocol="llama.cpp")  # 19 tokens, two windows
    assert strings == ["^abcdefg", "^ijklmno"]  # the token under BOS, `h`, is not fed
    assert scored == ["efg", "mno"]  # perplexity.cpp: logits n_ctx/2 .. n_ctx - 2, the tokens after them


def test_llama_cpp_with_an_odd_context_and_without_bos(tmp_path):
    strings, scored = rows_of(tmp_path, "abcdefghijk", 5, bos=(), protocol="llama.cpp")
    assert strings == ["abcde", "fghij"]
    assert scored == ["de", "ij"]


def test_llama_cpp_takes_off_one_newline_at_the_end(tmp_path):
    with pytest.raises(QtoolError, match="gives nothing to score in windows of 4 tokens"):
        rows_of(tmp_path, "abc\n", 4, bos=(), protocol="llama.cpp")
    strings, scored = rows_of(tmp_path, "abc\n\n", 4, bos=(), protocol="llama.cpp")
    assert (strings, scored) == (["abc\n"], ["\n"])


@pytest.mark.parametrize("protocol", ["windows", "rows", "llama.cpp"])
def test_at_most_so_many_rows(tmp_path, protocol):
    texts = ["abcdefgh", "ijklmnop", "qrstuvwx"]
    strings, scored = rows_of(tmp_path, texts, 4, protocol=protocol)
    some = rows_of(tmp_path, texts, 4, protocol=protocol, rows=2)
    assert len(strings) > 2
    assert some == (strings[:2], scored[:2])


def test_hidden_states_stand_one_before_the_targets():
    row = torch.tensor([10, 11, 12, 13, 14])
    assert torch.arange(5)[hidden_positions(row, 2)].tolist() == [1, 2, 3]
    assert targets(row, 2).tolist() == [12, 13, 14]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stride": 5}, "a stride of 5 tokens is not between 1 and the context, 4"),
        ({"stride": 0}, "stride is 0, but must be a number of at least 1"),
        ({"stride": 2, "protocol": "rows"}, "--stride belongs to the protocol windows, not rows"),
        ({"stride": 2, "protocol": "llama.cpp"}, "--stride belongs to the protocol windows, not llama.cpp"),
    ],
)
def test_impossible_strides_are_refused(tmp_path, options, message):
    with pytest.raises(UsageError) as raised:
        rows_of(tmp_path, "abcdefgh", 4, **options)
    assert raised.value.message == message


@pytest.mark.parametrize("protocol", ["windows", "rows", "llama.cpp"])
def test_nothing_to_score_says_so(tmp_path, protocol):
    with pytest.raises(QtoolError) as raised:
        rows_of(tmp_path, "", 64, protocol=protocol)
    assert raised.value.message == (
        f"`{tmp_path / 'data.txt'}` gives nothing to score in windows of 64 tokens: it is empty or too short"
    )
    assert raised.value.hint == "give more text or shorter rows (`--seqlen 16`)"
    assert raised.value.exit_code == 1


def test_the_hash_is_of_the_rows(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("abcdefgh", encoding="utf-8")
    copy = tmp_path / "b.txt"
    copy.write_text("abcdefgh", encoding="utf-8")

    def sha(path, **options):
        return eval_rows(EvalSpec(DataSpec(str(path)), **options), Letters(), 4).sha256

    assert sha(file) == sha(copy) != sha(file, protocol="llama.cpp")
    assert len(sha(file)) == 64


def test_scored_bytes_are_those_of_the_scored_text():
    row = torch.tensor([BOS, *map(ord, "aä€b")])
    assert scored_bytes(row, 1, Letters()) == 1 + 2 + 3 + 1
    assert scored_bytes(row, 3, Letters()) == 3 + 1


# ---- statistics


def clustered(seed=0, rows=200, spread=0.3):
    """Values whose rows have a common part, with rows of several lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(5, 15, (rows,), generator=generator)
    row_N = torch.repeat_interleave(torch.arange(rows), lengths)
    common_R = spread * torch.randn(rows, generator=generator, dtype=torch.float64)
    noise_N = 0.4 * torch.randn(len(row_N), generator=generator, dtype=torch.float64)
    return (2.5 + common_R[row_N] + noise_N), row_N


def naive_error(influences, rows):
    """The square root of R/(R-1) times the sum of squares of each row's total, number by number."""
    totals = {}
    for value, row in zip(influences, rows, strict=True):
        totals[row] = totals.get(row, 0.0) + value
    count = len(totals)
    return math.sqrt(sum(total**2 for total in totals.values()) * count / (count - 1))


def bootstrap(figure, columns, row_N, draws=1500):
    """Standard deviation of a figure when rows are drawn with replacement."""
    generator = torch.Generator().manual_seed(1)
    rows = int(row_N.max()) + 1
    counts = torch.bincount(row_N, minlength=rows).double()
    sums = [torch.zeros(rows, dtype=torch.float64).index_add_(0, row_N, c) for c in columns]
    values = []
    for _ in range(draws):
        chosen = torch.randint(rows, (rows,), generator=generator)
        tokens = float(counts[chosen].sum())
        values.append(figure(*(float(s[chosen].sum()) / tokens for s in sums)))
    return float(torch.tensor(values, dtype=torch.float64).std())


def naive_figures(loss, base):
    """Each figure, and the influence of each token by the delta method, with plain floats."""
    count, a, b = len(loss), sum(loss) / len(loss), sum(base) / len(base)
    pairs = list(zip(loss, base, strict=True))
    return {
        "mean": (a, [(x - a) / count for x in loss]),
        "perplexity": (math.exp(a), [math.exp(a) * (x - a) / count for x in loss]),
        "delta": (
            math.exp(a) - math.exp(b),
            [(math.exp(a) * (x - a) - math.exp(b) * (y - b)) / count for x, y in pairs],
        ),
        "ratio": (math.exp(a - b) - 1, [math.exp(a - b) * (x - y - a + b) / count for x, y in pairs]),
    }


def figures(loss_N, base_N, row_N):
    return {
        "mean": statistics.mean(loss_N, row_N),
        "perplexity": statistics.perplexity(loss_N, row_N),
        "delta": statistics.perplexity_delta(loss_N, base_N, row_N),
        "ratio": statistics.perplexity_ratio(loss_N, base_N, row_N),
    }


def test_figures_and_errors_equal_a_naive_loop():
    loss_N, row_N = clustered()
    base_N = loss_N - 0.05 + 0.1 * torch.randn(len(loss_N), generator=torch.Generator().manual_seed(3)).double()
    naive = naive_figures(loss_N.tolist(), base_N.tolist())
    for name, estimate in figures(loss_N, base_N, row_N).items():
        value, influences = naive[name]
        error = naive_error(influences, row_N.tolist())
        assert estimate.value == pytest.approx(value, rel=1e-10), name
        assert estimate.standard_error == pytest.approx(error, rel=1e-9), name
        assert estimate.low == pytest.approx(value - 1.959964 * error, abs=1e-5), name
        assert estimate.high == pytest.approx(value + 1.959964 * error, abs=1e-5), name


def test_errors_are_close_to_a_bootstrap_over_rows():
    loss_N, row_N = clustered(rows=300)
    base_N = loss_N - 0.05 + 0.1 * torch.randn(len(loss_N), generator=torch.Generator().manual_seed(3)).double()
    found = figures(loss_N, base_N, row_N)
    expected = {
        "mean": bootstrap(lambda a, b: a, [loss_N, base_N], row_N),
        "perplexity": bootstrap(lambda a, b: math.exp(a), [loss_N, base_N], row_N),
        "delta": bootstrap(lambda a, b: math.exp(a) - math.exp(b), [loss_N, base_N], row_N),
        "ratio": bootstrap(lambda a, b: math.exp(a - b), [loss_N, base_N], row_N),
    }
    for name, error in expected.items():
        assert found[name].standard_error == pytest.approx(error, rel=0.1), name


def test_tokens_of_a_row_are_not_taken_for_independent():
    loss_N, row_N = clustered(spread=1.0)
    as_if_independent = float(loss_N.std()) / math.sqrt(len(loss_N))
    assert statistics.mean(loss_N, row_N).standard_error > 2 * as_if_independent


def test_a_paired_delta_has_a_much_smaller_error_than_an_unpaired_one():
    base_N, row_N = clustered()
    loss_N = base_N + 0.02 + 0.01 * torch.randn(len(base_N), generator=torch.Generator().manual_seed(5)).double()
    paired = statistics.perplexity_delta(loss_N, base_N, row_N).standard_error
    alone = [statistics.perplexity(x, row_N).standard_error for x in (loss_N, base_N)]
    assert paired < math.hypot(*alone) / 10


def test_a_delta_is_the_ratio_times_the_baseline():
    loss_N, row_N = clustered()
    base_N, _ = clustered(seed=0, spread=0.2)
    ppl, base = (statistics.perplexity(x, row_N).value for x in (loss_N, base_N))
    assert statistics.perplexity_delta(loss_N, base_N, row_N).value == pytest.approx(ppl - base)
    assert statistics.perplexity_ratio(loss_N, base_N, row_N).value == pytest.approx(ppl / base - 1)


def test_identical_losses_have_no_delta_and_no_error():
    loss_N, row_N = clustered()
    for estimate in (
        statistics.perplexity_delta(loss_N, loss_N, row_N),
        statistics.perplexity_ratio(loss_N, loss_N, row_N),
    ):
        assert (estimate.value, estimate.standard_error) == (0.0, 0.0)


def test_one_row_gives_no_error():
    loss_N = torch.tensor([1.0, 2.0], dtype=torch.float64)
    row_N = torch.zeros(2, dtype=torch.long)
    estimate = statistics.perplexity(loss_N, row_N)
    assert estimate == statistics.Estimate(pytest.approx(math.exp(1.5)), None, None, None)
    assert statistics.perplexity_delta(loss_N, loss_N, row_N).standard_error is None


@settings(deadline=None)
@given(st.lists(st.floats(0, 100, width=32), min_size=1, max_size=60))
def test_percentiles_equal_torch_quantile(values):
    values_N = torch.tensor(values, dtype=torch.float64)
    found = statistics.percentiles(values_N)
    assert list(found) == ["median", "p90", "p99", "p99_9", "max"]
    for name, share in (("median", 0.5), ("p90", 0.9), ("p99", 0.99), ("p99_9", 0.999), ("max", 1.0)):
        assert found[name] == pytest.approx(float(values_N.quantile(share)), rel=1e-9, abs=1e-9), name


@pytest.mark.parametrize("nats", [300.0, 400.0, 800.0])
def test_a_hopeless_loss_still_gives_figures_that_json_can_hold(nats):
    generator = torch.Generator().manual_seed(0)
    loss_N = nats + torch.randn(40, generator=generator, dtype=torch.float64)
    base_N = 3 + torch.randn(40, generator=generator, dtype=torch.float64)
    row_N = torch.arange(4).repeat_interleave(10)
    for name, estimate in figures(loss_N, base_N, row_N).items():
        for key, value in vars(estimate).items():
            assert value is None or math.isfinite(value), f"{name}.{key} is {value}"


# ---- the whole


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    """About 2000 tokens of the tiny tokenizer, in texts of several lengths, all ASCII."""
    chance = random.Random(7)
    words = ["weight", "scale", "group", "block", "column", "error", "tensor", "token", "round", "zebra", "quick"]
    path = tmp_path_factory.mktemp("eval") / "eval.jsonl"
    texts = [" ".join(chance.choices(words, k=chance.randint(4, 30))) for _ in range(40)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def pair(make_model, tmp_path_factory):
    """`pair(kind) -> (model, baseline)`: the baseline in float32, and a copy with noise on its matrices."""
    made = {}

    def make(kind="llama"):
        if kind not in made:
            base = make_model(kind, dtype="float32")
            noisy = tmp_path_factory.mktemp(f"noisy-{kind}") / "model"
            shutil.copytree(base, noisy)
            generator = torch.Generator().manual_seed(0)
            tensors = load_file(noisy / "model.safetensors")
            for name, value in tensors.items():
                if value.dim() == 2:
                    tensors[name] = value + 0.02 * torch.randn(value.shape, generator=generator)
            save_file(tensors, noisy / "model.safetensors", {"format": "pt"})
            made[kind] = noisy, base
        return made[kind]

    return make


def spec_of(text_file, **options):
    data = {"seqlen": 32, **{k: options.pop(k) for k in ("rows", "seqlen") if k in options}}
    return EvalSpec(DataSpec(str(text_file), **data), **options)


def naive(path, base_path, rows, firsts):
    """Everything that is measured, from the whole models in float32, row by row and token by token."""
    from transformers import AutoModelForCausalLM

    model, base = (
        AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32, attn_implementation="eager").eval()
        for p in (path, base_path)
    )
    columns = {name: [] for name in ("loss", "base", "kl", "agree", "delta_p", "row", "position")}
    for index, (row, first) in enumerate(zip(rows, firsts, strict=True)):
        with torch.no_grad():
            p, q = (m(input_ids=row[None]).logits[0].double().softmax(-1) for m in (model, base))
        for at in range(first, len(row)):
            here_V, there_V, token = p[at - 1], q[at - 1], int(row[at])
            columns["loss"].append(-math.log(float(here_V[token])))
            columns["base"].append(-math.log(float(there_V[token])))
            columns["kl"].append(float((there_V * (there_V / here_V).log()).sum()))
            columns["agree"].append(float(here_V.argmax() == there_V.argmax()))
            columns["delta_p"].append(float(here_V[token] - there_V[token]))
            columns["row"].append(index)
            columns["position"].append(at)
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in columns.items()}


CASES = [
    ("llama", {}),
    ("llama", {"stride": 20}),
    ("llama", {"protocol": "rows"}),
    ("llama", {"protocol": "llama.cpp"}),
    ("gemma2", {}),  # soft caps and sliding windows
    ("mistral", {"rows": 5}),
]


@pytest.mark.parametrize(("kind", "options"), CASES)
def test_an_evaluation_equals_a_naive_one(pair, text_file, kind, options):
    path, base_path = pair(kind)
    spec = spec_of(text_file, **options)
    found = evaluate(path, base_path, spec, "cpu", silent)
    tokenizer = Tokenizer(path, 320)
    rows = eval_rows(spec, tokenizer, 128)
    expected = naive(path, base_path, rows.rows, rows.first_scored)
    names, row_ids = naive_figures(expected["loss"].tolist(), expected["base"].tolist()), expected["row"].tolist()

    close = {"rel": 1e-4, "abs": 1e-5}
    assert found.tokens == len(expected["loss"]) == rows.tokens
    assert found.rows == len(rows.rows)
    assert found.data_sha256 == rows.sha256
    assert found.perplexity.value == pytest.approx(names["perplexity"][0], rel=1e-5)
    assert found.perplexity.standard_error == pytest.approx(naive_error(names["perplexity"][1], row_ids), **close)
    comparison = found.comparison
    assert comparison.perplexity.value == pytest.approx(math.exp(float(expected["base"].mean())), rel=1e-5)
    assert comparison.delta.value == pytest.approx(names["delta"][0], rel=1e-3)
    assert comparison.delta.standard_error == pytest.approx(naive_error(names["delta"][1], row_ids), rel=1e-3)
    assert comparison.relative_increase.value == pytest.approx(names["ratio"][0], rel=1e-3)
    assert comparison.delta_nats.value == pytest.approx(float((expected["loss"] - expected["base"]).mean()), rel=1e-3)
    assert comparison.kl.value == pytest.approx(float(expected["kl"].mean()), rel=1e-3)
    assert comparison.kl.value > 1e-3  # the noise is felt
    for name, share in (("median", 0.5), ("p90", 0.9), ("p99", 0.99), ("p99_9", 0.999), ("max", 1.0)):
        assert comparison.kl_percentiles[name] == pytest.approx(float(expected["kl"].quantile(share)), rel=1e-2)
    assert comparison.top1_agreement.value == pytest.approx(float(expected["agree"].mean()), abs=2 / found.tokens)
    assert comparison.top1_agreement.value < 1
    assert comparison.rms_delta_p == pytest.approx(float(expected["delta_p"].square().mean().sqrt()), rel=1e-3)
    largest = expected["kl"].topk(10)
    assert [w.kl for w in comparison.worst] == pytest.approx(largest.values.tolist(), rel=1e-2)
    first, at = comparison.worst[0], int(largest.indices[0])
    assert (first.row, first.position) == (int(expected["row"][at]), int(expected["position"][at]))
    ids = rows.rows[first.row].tolist()
    assert first.token == tokenizer.decode([ids[first.position]])
    assert first.context == tokenizer.decode(ids[max(0, first.position - 12) : first.position])


@pytest.mark.parametrize("options", [{}, {"stride": 20}, {"protocol": "rows"}, {"protocol": "llama.cpp"}])
def test_bits_per_byte(pair, text_file, options):
    """A token of a byte-level tokenizer is spelled with one letter per byte."""
    path, _ = pair()
    spec = spec_of(text_file, **options)
    found = evaluate(path, None, spec, "cpu", silent)
    tokenizer = Tokenizer(path, 320)
    rows = eval_rows(spec, tokenizer, 128)
    scored = [i for row, first in zip(rows.rows, rows.first_scored, strict=True) for i in row.tolist()[first:]]
    size_bytes = sum(len(token) for token in tokenizer.inner.convert_ids_to_tokens(scored))
    nats = math.log(found.perplexity.value) * found.tokens
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / size_bytes, rel=1e-9)


def test_a_model_alone_has_no_comparison(pair, text_file):
    path, base = pair()
    alone = evaluate(path, None, spec_of(text_file), "cpu", silent)
    beside = evaluate(path, base, spec_of(text_file), "cpu", silent)
    assert alone.comparison is None
    assert alone.perplexity == beside.perplexity
    json.dumps(alone.to_tree(), allow_nan=False)
    json.dumps(beside.to_tree(), allow_nan=False)


def test_identical_models_do_not_differ(pair, text_file, tmp_path):
    path, _ = pair()
    copy = tmp_path / "copy"
    shutil.copytree(path, copy)
    comparison = evaluate(path, copy, spec_of(text_file), "cpu", silent).comparison
    assert (comparison.delta.value, comparison.delta.standard_error) == (0.0, 0.0)
    assert (comparison.relative_increase.value, comparison.delta_nats.value) == (0.0, 0.0)
    assert comparison.kl.value == 0.0
    assert comparison.kl_percentiles == {"median": 0.0, "p90": 0.0, "p99": 0.0, "p99_9": 0.0, "max": 0.0}
    assert comparison.top1_agreement.value == 1.0
    assert comparison.rms_delta_p == 0.0


@pytest.mark.parametrize(("batch_tokens", "slice_logits"), [(1, 1 << 22), (4096, 1), (100, 320 * 7), (64, 320 * 31)])
@pytest.mark.parametrize("protocol", ["windows", "rows"])
def test_batches_and_slices_are_speed_only(pair, text_file, monkeypatch, batch_tokens, slice_logits, protocol):
    path, base = pair()
    spec = spec_of(text_file, protocol=protocol, rows=12)
    usual = evaluate(path, base, spec, "cpu", silent)
    monkeypatch.setattr(losses, "BATCH_TOKENS", batch_tokens)
    monkeypatch.setattr(losses, "SLICE_LOGITS", slice_logits)
    other = evaluate(path, base, spec, "cpu", silent)
    for name in ("perplexity", "bits_per_byte", "tokens", "rows", "data_sha256"):
        a, b = getattr(usual, name), getattr(other, name)
        a, b = (x.value if isinstance(x, statistics.Estimate) else x for x in (a, b))
        assert b == (a if isinstance(a, str) else pytest.approx(a, rel=1e-5)), name
    for name in ("perplexity", "delta", "kl", "top1_agreement"):
        a, b = getattr(usual.comparison, name), getattr(other.comparison, name)
        # a delta is the difference of two perplexities, each rounded on its own
        smallest = 1e-6 * usual.perplexity.value if name == "delta" else 0.0
        assert b.value == pytest.approx(a.value, rel=1e-5, abs=smallest), name
    places = [[(w.row, w.position, w.token) for w in x.comparison.worst] for x in (usual, other)]
    assert places[0] == places[1]


@pytest.mark.parametrize("rows_at_once", [1, 3])
@pytest.mark.parametrize("protocol", ["windows", "rows"])
def test_portions_are_memory_only(pair, text_file, monkeypatch, rows_at_once, protocol):
    path, base = pair()
    tokenizer = Tokenizer(path, 320)
    rows = eval_rows(spec_of(text_file, protocol=protocol, rows=12), tokenizer, 128)
    monkeypatch.setattr(losses, "BATCH_TOKENS", 64)

    def measure():
        models = [BlockModel(folder, Weights(Checkpoint(folder)), torch.device("cpu")) for folder in (path, base)]
        steps = []
        found = losses.token_losses(*models, rows, lambda *step: steps.append(step))
        return found, [step[1:3] for step in steps if step[0] == "evaluate model"]

    usual, steps = measure()
    assert steps == [(1, 2), (2, 2)]
    width = models_width(path)
    monkeypatch.setattr(losses, "CPU_BYTES", rows_at_once * 32 * 2 * 4 * width)
    other, steps = measure()
    assert len(steps) >= 2 * (4 if rows_at_once == 3 else 6)
    assert steps == [(i + 1, len(steps)) for i in range(len(steps))]
    for field in dataclasses.fields(usual):
        if field.name not in ("model_s", "base_s"):
            assert torch.equal(getattr(usual, field.name), getattr(other, field.name)), field.name


def models_width(path):
    return json.loads((path / "config.json").read_text(encoding="utf-8"))["hidden_size"]


@pytest.mark.parametrize("scheme", ["int4-g32-sym", "int3-g16-asym", "int8-channel-sym"])
def test_a_packed_checkpoint_evaluates_as_its_dequantized_copy(make_model, text_file, tmp_path, scheme):
    source, packed, dense = make_model(), tmp_path / "packed", tmp_path / "dense"
    job = prepare(str(source), build({"scheme": scheme, "method": "rtn"}, METHODS))
    quantize(job, packed, RunOptions(device="cpu"), silent)
    shutil.copytree(source, dense)
    weights = Weights(Checkpoint(packed))
    tensors = weights.read(weights.shapes)
    assert set(tensors) == set(load_file(source / "model.safetensors"))
    save_file({n: t.contiguous() for n, t in tensors.items()}, dense / "model.safetensors", {"format": "pt"})
    found = evaluate(packed, dense, spec_of(text_file), "cpu", silent)
    assert found.perplexity.value == found.comparison.perplexity.value
    assert found.comparison.kl.value == 0.0
    assert found.comparison.top1_agreement.value == 1.0
    against_source = evaluate(packed, source, spec_of(text_file), "cpu", silent)
    assert against_source.comparison.kl.value > 0


def test_progress_names_each_block_of_both_models(pair, text_file):
    path, base = pair()
    seen = []
    evaluate(path, base, spec_of(text_file, rows=3), "cpu", lambda *step: seen.append(step))
    assert seen == [
        ("evaluate model", 1, 2, "model.layers.0"),
        ("evaluate model", 2, 2, "model.layers.1"),
        ("evaluate baseline", 1, 2, "model.layers.0"),
        ("evaluate baseline", 2, 2, "model.layers.1"),
    ]


def test_different_tokenizers_are_refused(pair, text_file, tmp_path):
    path, base = pair()
    other = tmp_path / "other"
    shutil.copytree(base, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    with pytest.raises(UsageError) as raised:
        evaluate(path, other, spec_of(text_file), "cpu", silent)
    assert raised.value.message == (f"{path} and {other} have different tokenizers: their tokens cannot be compared")


@pytest.fixture
def with_a_token_more(make_model, tmp_path):
    """As Gemma 3 1B is: its tokenizer has one added token past the last row of the embedding."""
    from transformers import AutoTokenizer

    folder = shutil.copytree(make_model("gemma3_text", dtype="float32", vocab_size=300), tmp_path / "more")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.add_tokens(["<image>"]) == 1
    assert tokenizer.convert_tokens_to_ids("<image>") == 300
    tokenizer.save_pretrained(folder)
    return folder


def test_a_token_past_the_embedding_does_not_make_another_tokenizer(with_a_token_more, text_file, tmp_path):
    data = {"source": str(text_file), "rows": 3, "seqlen": 32}
    tree = {"scheme": "q4_k_m", "method": "rtn", "eval": {"data": data}}
    job = prepare(str(with_a_token_more), build(tree, METHODS))
    report, _ = quantize(job, tmp_path / "out", RunOptions("cpu"), silent)
    assert report.evaluation["comparison"]["kl"]["value"] > 0
    beside = evaluate(tmp_path / "out" / "model.gguf", with_a_token_more, spec_of(text_file, rows=3), "cpu", silent)
    assert beside.comparison.kl.value == report.evaluation["comparison"]["kl"]["value"]


# ---- evaluation at the end of a run


def job_with(model, text_file, **data):
    tree = {"scheme": "q4_k_m", "method": "rtn", "eval": {"data": {"source": str(text_file), "rows": 3, **data}}}
    return prepare(str(model), build(tree, METHODS))


def test_what_an_evaluation_refuses_is_known_before_any_work(make_model, text_file, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("", encoding="utf-8")
    out, model = tmp_path / "out", make_model()
    for job, message in [
        (job_with(model, text_file, seqlen=4096), "rows of 4096 tokens do not fit the model"),
        (job_with(model, short), "empty"),
    ]:
        with pytest.raises(QtoolError, match=message):
            quantize(job, out, RunOptions("cpu"), silent)
        assert not list(tmp_path.glob("out*"))
    job = job_with(model, text_file, seqlen=32)
    tokens = job.container.metadata["tokenizer.ggml.tokens"]
    tokens[260], tokens[261] = tokens[261], tokens[260]
    with pytest.raises(UsageError, match="becomes another one in a GGUF file"):
        quantize(job, out, RunOptions("cpu"), silent)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("failure", [QtoolError("no luck", "try a shorter text"), KeyboardInterrupt(), MemoryError()])
def test_when_an_evaluation_fails_the_output_is_there(make_model, text_file, tmp_path, monkeypatch, failure):
    from qtool.evaluation import evaluate as module

    def fails(*_):
        raise failure

    def solves(*_):
        raise AssertionError("nothing is left to solve")

    out, job = tmp_path / "out", job_with(make_model(), text_file, seqlen=32)
    with monkeypatch.context() as patch:
        patch.setattr(module, "evaluate", fails)
        with pytest.raises(type(failure)) as raised:
            quantize(job, out, RunOptions("cpu"), silent)
    if isinstance(failure, QtoolError):
        assert raised.value.message == f"{out} is whole, but could not be evaluated: no luck"
        assert raised.value.hint == "try a shorter text"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    monkeypatch.setattr("qtool.solving.solver.Solver.run", solves)
    plain = dataclasses.replace(job, recipe=dataclasses.replace(job.recipe, eval=None))
    report, up_to_date = quantize(plain, out, RunOptions("cpu"), silent)
    assert up_to_date
    assert report.evaluation is None
    report, up_to_date = quantize(job, out, RunOptions("cpu"), silent)
    assert up_to_date
    assert report.evaluation["comparison"]["kl"]["value"] > 0
    assert json.loads((out / "manifest.json").read_text())["report"] == json.loads(json.dumps(report.to_tree()))
    assert "evaluate" in report.stages_s


def test_a_gguf_header_is_parsed_once(make_model, text_file, tmp_path, monkeypatch):
    from qtool.gguf import file
    from qtool.models.loading import config_tree, load_config, load_tokenizer

    model = make_model("llama", tie_word_embeddings=False)
    quantize(prepare(str(model), build({"scheme": "f16"}, METHODS)), tmp_path / "out", RunOptions("cpu"), silent)
    path, read, parsed = tmp_path / "out" / "model.gguf", file._read_header, []
    monkeypatch.setattr(file, "_read_header", lambda path: parsed.append(path) or read(path))
    assert config_tree(path)["vocab_size"] == load_config(path).vocab_size == 320
    assert len(load_tokenizer(path)) == 320
    assert parsed == [path]
    path.write_bytes(path.read_bytes() + b" ")
    config_tree(path)
    assert parsed == [path, path], "another file: read again"


def test_different_vocabularies_are_refused(pair, make_model, text_file):
    path, _ = pair()
    wider = make_model(dtype="float32", vocab_size=384)
    with pytest.raises(UsageError) as raised:
        evaluate(path, wider, spec_of(text_file), "cpu", silent)
    assert raised.value.message == f"{path} predicts 320 tokens, {wider} 384"


def test_the_context_is_that_of_the_shorter_model(pair, make_model, text_file):
    path, _ = pair()
    shorter = make_model(dtype="float32", max_position_embeddings=48)
    spec = EvalSpec(DataSpec(str(text_file)))
    assert evaluate(path, None, spec, "cpu", silent).context == 128
    assert evaluate(path, shorter, spec, "cpu", silent).context == 48
    with pytest.raises(UsageError, match="rows of 64 tokens do not fit the model: its context is 48"):
        evaluate(path, shorter, spec_of(text_file, seqlen=64), "cpu", silent)


@pytest.fixture
def broken(pair, tmp_path):
    """A model whose weights are finite and whose logits are not."""
    folder = tmp_path / "broken"
    shutil.copytree(pair()[1], folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"].fill_(3e38)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_a_loss_that_is_not_finite_is_an_error(broken, text_file):
    with pytest.raises(QtoolError) as raised:
        evaluate(broken, None, spec_of(text_file, rows=2), "cpu", silent)
    assert raised.value.message == ("the model's loss is not finite for 62 of 62 tokens, first in row 0 at token 1")


def test_a_baseline_whose_loss_is_not_finite_is_an_error_too(pair, broken, text_file):
    with pytest.raises(QtoolError, match="baseline's loss is not finite for 62 of 62 tokens"):
        evaluate(pair()[0], broken, spec_of(text_file, rows=2), "cpu", silent)


def test_a_weight_that_is_not_finite_is_named(pair, text_file, tmp_path):
    folder = tmp_path / "nan"
    shutil.copytree(pair()[1], folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        QtoolError, match=r"`model\.layers\.1\.mlp\.up_proj\.weight` has 1 NaN or infinite values of 8192"
    ):
        evaluate(folder, None, spec_of(text_file, rows=2), "cpu", silent)


def test_a_checkpoint_without_a_config_cannot_be_run(pair, text_file, tmp_path):
    shutil.copytree(pair()[1], tmp_path / "bare")
    (tmp_path / "bare" / "config.json").unlink()
    with pytest.raises(UsageError, match=r"has no config\.json, so the model cannot be run"):
        evaluate(tmp_path / "bare", None, spec_of(text_file), "cpu", silent)


def test_describe_reads_headers_only(make_model, text_file):
    path = make_model()
    assert describe(path, path, spec_of(text_file, protocol="llama.cpp")) == {
        "model": f"{path} (llama, dense)",
        "baseline": f"{path} (llama, dense)",
        "data": str(text_file),
        "protocol": "llama.cpp",
        "context": 32,
    }


# ---- gates


@pytest.mark.parametrize(
    ("text", "limit", "relative"),
    [("1%", 0.01, True), (" 2.5 % ", 0.025, True), ("0.2", 0.2, False), ("0", 0.0, False), ("1e-3", 0.001, False)],
)
def test_gate_limits(text, limit, relative):
    assert parse_increase(text) == (pytest.approx(limit), relative)


@pytest.mark.parametrize("text", ["", "%", "one", "1%%", "1 2", "%1", "0,2"])
def test_bad_gate_limits(text):
    with pytest.raises(UsageError) as raised:
        parse_increase(text)
    assert raised.value.message == (
        f"--max-ppl-increase `{text}` is neither a share such as `1%` nor a number such as `0.2`"
    )


@pytest.mark.parametrize("text", ["nan", "nan%", "inf", "-inf%"])
def test_a_limit_that_is_no_number_is_refused(text):
    with pytest.raises(UsageError):
        check_spec(EvalSpec(max_ppl_increase=text), has_baseline=True)


def test_a_limit_on_kl_that_is_no_number_is_refused():
    with pytest.raises(UsageError):
        check_spec(EvalSpec(max_kl=float("nan")), has_baseline=True)


@pytest.mark.parametrize("spec", [EvalSpec(max_ppl_increase="1%"), EvalSpec(max_kl=0.1)])
def test_a_gate_needs_a_baseline(spec):
    with pytest.raises(UsageError) as raised:
        check_spec(spec, has_baseline=False)
    assert raised.value.message == "a gate compares two models, but there is no baseline"
    assert raised.value.hint == "give one with --baseline MODEL"
    check_spec(spec, has_baseline=True)


def test_no_gate_needs_no_baseline():
    check_spec(EvalSpec(), has_baseline=False)


def measured(delta=0.0, ratio=0.0, kl=0.0):
    def figure(value):
        return SimpleNamespace(value=value)

    return SimpleNamespace(
        comparison=SimpleNamespace(delta=figure(delta), relative_increase=figure(ratio), kl=figure(kl))
    )


@pytest.mark.parametrize(
    ("spec", "result", "expected"),
    [
        (
            EvalSpec(max_ppl_increase="1%"),
            measured(ratio=0.009, delta=5),
            ("max_ppl_increase", "1%", 0.01, 0.009, True),
        ),
        (EvalSpec(max_ppl_increase="1%"), measured(ratio=0.011), ("max_ppl_increase", "1%", 0.01, 0.011, False)),
        (EvalSpec(max_ppl_increase="0.2"), measured(delta=0.19, ratio=5), ("max_ppl_increase", "0.2", 0.2, 0.19, True)),
        (EvalSpec(max_ppl_increase="0.2"), measured(delta=0.21), ("max_ppl_increase", "0.2", 0.2, 0.21, False)),
        (EvalSpec(max_ppl_increase="0"), measured(delta=0.0), ("max_ppl_increase", "0", 0.0, 0.0, True)),
        (EvalSpec(max_ppl_increase="0"), measured(delta=-1.0), ("max_ppl_increase", "0", 0.0, -1.0, True)),
        (EvalSpec(max_kl=0.05), measured(kl=0.05), ("max_kl", "0.05", 0.05, 0.05, True)),
        (EvalSpec(max_kl=0.05), measured(kl=0.0501), ("max_kl", "0.05", 0.05, 0.0501, False)),
        (EvalSpec(max_kl=0.05), measured(kl=float("nan")), None),
    ],
)
def test_gates(spec, result, expected):
    (gate,) = check_gates(result, spec)
    if expected is None:
        assert gate["passed"] is False
    else:
        assert gate == dict(zip(("gate", "asked", "limit", "measured", "passed"), expected, strict=True))


def test_several_gates_and_none():
    both = check_gates(measured(ratio=0.5, kl=0.01), EvalSpec(max_ppl_increase="1%", max_kl=0.05))
    assert [(g["gate"], g["passed"]) for g in both] == [("max_ppl_increase", False), ("max_kl", True)]
    assert check_gates(measured(), EvalSpec()) == []
    assert check_gates(SimpleNamespace(comparison=None), EvalSpec(max_kl=0.1)) == []


def test_a_model_may_be_given_as_its_only_file(pair, text_file):
    path, base = pair()
    file = evaluate(path / "model.safetensors", base / "model.safetensors", spec_of(text_file, rows=3), "cpu", silent)
    folder = evaluate(path, base, spec_of(text_file, rows=3), "cpu", silent)
    assert file.model == str(path / "model.safetensors")
    assert file.comparison.baseline == str(base / "model.safetensors")
    assert (file.perplexity, file.comparison.kl) == (folder.perplexity, folder.comparison.kl)


def test_bits_per_byte_of_text_whose_letters_are_several_tokens(pair, tmp_path):
    """Rows end within letters of two to four bytes, which do not decode; what that costs is bounded per row."""
    path, _ = pair()
    file = tmp_path / "letters.txt"
    file.write_text("".join(chr(0x4E00 + 7 * i) + "äé🙂"[i % 3] for i in range(300)), encoding="utf-8")
    spec = spec_of(file, seqlen=32)
    found = evaluate(path, None, spec, "cpu", silent)
    tokenizer = Tokenizer(path, 320)
    rows = eval_rows(spec, tokenizer, 128)
    scored = [i for row, first in zip(rows.rows, rows.first_scored, strict=True) for i in row.tolist()[first:]]
    size_bytes = sum(len(token) for token in tokenizer.inner.convert_ids_to_tokens(scored))
    nats = math.log(found.perplexity.value) * found.tokens
    counted_bytes = nats / math.log(2) / found.bits_per_byte
    assert found.rows > 40
    assert counted_bytes == pytest.approx(size_bytes, abs=2 * found.rows)  # at most a cut letter at each end of a row
