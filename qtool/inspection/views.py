"""What an inspection found, as pages of text."""

from __future__ import annotations

from math import ceil

from qtool.inspection.codes import CodeStats
from qtool.inspection.compare import Comparison
from qtool.inspection.memory import CARDS_GB, OWN, THIS, Memory
from qtool.inspection.overview import DIMENSIONS, Origin, Overview
from qtool.inspection.statistics import Statistics
from qtool.inspection.tensor import OUTLIER_SIGMAS, Channels, TensorStats
from qtool.recipe import NO_METHOD
from qtool.report.table import Table, View, count, size

BAR_WIDTH = 48
MOST_CODES = 16  # that are listed one by one
VISIBLE_BITS = 0.05  # per weight: less is not worth a word
EIGHTHS = " ▏▎▍▌▋▊▉█"

Row = tuple[str, ...]


def overview_view(found: Overview) -> View:
    """What it is, by component, by kind of layer, and why some kinds are not quantized."""
    facts = [fact for fact in _facts(found) if fact[1]]
    components = []
    for part in found.components:
        share = part.size_bytes / found.size_bytes if found.size_bytes else 0.0
        components.append((part.name, count(part.parameters), size(part.size_bytes), f"{share:.1%}"))
    kinds = []
    for kind in found.kinds:
        shape, bits = shape_text(kind.shape), f"{kind.bits_per_weight:.3f}"
        kinds.append((kind.pattern, kind.stored_as, str(kind.tensors), shape, bits, size(kind.size_bytes)))
    view: View = [
        found.model,
        Table(("", ""), facts),
        Table(("component", ">parameters", ">size", ">of the size"), components),
        Table(("kind of layer", "stored as", ">count", ">shape", ">bits", ">size"), kinds),
    ]
    left = [(kind.pattern, kind.why_not_quantized) for kind in found.kinds if kind.why_not_quantized]
    if left:
        view.append(Table(("not quantized", "why"), left))
    return view + _notes(found.notes)


def statistics_view(found: Statistics) -> View:
    """What was measured, on what, and what to type with it."""
    facts = [
        ("model", found.model or ""),
        ("architecture", found.architecture or ""),
        *(("data", data) for data in found.data),
        ("holds", found.holds),
        ("size", size(found.size_bytes)),
    ]
    rows = [(kind.pattern, str(kind.inputs), str(kind.columns)) for kind in found.inputs]
    return [
        f"{found.path}: no model, but {found.kind}",
        Table(("", ""), [fact for fact in facts if fact[1]]),
        Table(("inputs of", ">count", ">columns"), rows),
        found.use,
    ]


def memory_view(found: Memory) -> View:
    """The cache, then the weights under each scheme with each cache, then what fits where."""
    cache = found.kv_cache
    held = f"{cache.layers} layers, {cache.vectors} vectors of {cache.dim} per token and layer"
    tokens = found.context * found.batch
    names = {kv: f"own ({cache.own})" if kv == OWN else kv for kv in cache.size_bytes}
    caches = [(names[kv], size(total), size(total / tokens)) for kv, total in cache.size_bytes.items()]
    totals: list[Row] = []
    fits: list[Row] = []
    for option in found.options:
        totals.append((option.weights, size(option.weight_bytes), *(size(option.total_bytes[kv]) for kv in names)))
        fits.append((option.weights, *(names.get(option.fits[f"{card} GB"] or "", "-") for card in CARDS_GB)))
    return [
        f"{found.model}: {found.batch} x {found.context} tokens",
        Table(("values as", ">size", ">per token"), caches, f"KV cache: {held}"),
        Table(
            ("weights as", ">alone", *(f">+ {name} KV" for name in names.values())),
            totals,
            "weights and KV cache together",
        ),
        Table(("weights as", *(f"{card} GB" for card in CARDS_GB)), fits, "the largest KV cache that fits on a card"),
        *([f"own: this checkpoint has fixed scales for {cache.own}; `{THIS}` is served with it"] if cache.own else []),
        "int8 and int4 caches have one 16-bit scale per token and head, for keys and for values",
        f"a card counts as full at {found.usable:.0%}, for activations and the runtime; 1 GB is 10^9 bytes",
        "another scheme changes the linear layers in the blocks; all else stays as it is",
        *_notes(found.notes),
    ]


def comparison_view(found: Comparison, top: int) -> View:
    """The `top` worst tensors, then what was not compared."""
    view: View = [f"{found.model} against {found.base}"]
    compared, differing = len(found.different) + len(found.identical), len(found.different)
    if found.different:
        rows: list[Row] = []
        for d in found.different:
            errors = (optional(d.relative, ".3%"), f"{d.mean_absolute:.3g}", f"{d.max_absolute:.3g}")
            rows.append((d.name, d.stored_as, d.base_stored_as, optional(d.sqnr_db, ".2f"), *errors))
        title = f"{differing} of {plural(compared, 'tensor')} differ{'s' * (differing == 1)}, worst first"
        columns = ("tensor", "stored as", "base", ">SQNR dB", ">relative", ">mean error", ">max error")
        view.append(Table(columns, _first(rows, top), title))
        overall = f"SQNR {optional(found.sqnr_db, '.2f')} dB, relative error {optional(found.relative, '.3%')}"
        view.append(f"all compared tensors together: {overall}")
    view.append(f"identical: {len(found.identical)} of {compared}")
    if found.reshaped:
        title = f"not compared: {plural(len(found.reshaped), 'tensor')} of another shape"
        shapes: list[Row] = [(t.name, shape_text(t.shape), shape_text(t.base_shape)) for t in found.reshaped]
        view.append(Table(("tensor", ">shape", ">base"), _first(shapes, top), title))
    if found.unread:
        title = f"not compared: {plural(len(found.unread), 'tensor')} in blocks that are not read"
        view.append(Table(("",), _first([(name,) for name in found.unread], top), title))
    for where, names in ((found.model, found.only_model), (found.base, found.only_base)):
        if names:
            title = f"only in {where}: {plural(len(names), 'tensor')}"
            view.append(Table(("",), _first([(name,) for name in names], top), title))
    return view + _notes(found.notes)


def tensor_view(found: TensorStats) -> View:
    """Moments and quantiles, the histogram, what outliers cost, the channels."""
    layout = ", stored [in, out]" if found.transposed else ""
    facts = [
        ("shape", shape_text(found.shape) + layout),
        ("stored as", f"{found.stored_as}, {found.bits_per_weight:.3f} bits per weight"),
        ("range", f"{found.minimum:.5g} to {found.maximum:.5g}"),
        ("mean", f"{found.mean:.5g}"),
        ("std", f"{found.std:.5g}"),
        ("outliers", f"{found.outlier_ratio:.4%} are more than {OUTLIER_SIGMAS} std from the mean"),
        ("zeros", f"{found.zero_ratio:.4%}"),
    ]
    if found.codes:
        facts += _code_facts(found.codes)
    quantiles = [(name, f"{value:.4g}") for name, value in found.quantiles.items()]
    view: View = [
        f"{found.model}: {found.name}",
        Table(("", ""), facts),
        Table((">quantile", ">value"), quantiles),
        _histogram(found),
    ]
    if found.codes and len(found.codes.counts) <= MOST_CODES:
        view.append(_codes(found.codes))
    if found.effective_bits:
        rows = [(str(e.bits), f"{e.tensor:.2f}", optional(e.group, ".2f")) for e in found.effective_bits]
        columns = (">bits", ">one scale per tensor", f">per group of {found.group_size}")
        view.append(Table(columns, rows, "effective bits"))
        view.append("effective: bits - 1 + log2(99th percentile of |w| / max|w|); of groups, the median")
    return view + [_channels(f"{which} channels", channels) for which, channels in found.channels.items()]


def plural(number: int, noun: str) -> str:
    """1 tensor, 2 tensors."""
    return f"{number} {noun}{'s' * (number != 1)}"


def shape_text(shape: tuple[int, ...]) -> str:
    """4096 x 1024; a single value is `scalar`."""
    return " x ".join(map(str, shape)) or "scalar"


def bar(share: float, width: int = BAR_WIDTH) -> str:
    """A bar of `share` (0..1) of `width` columns, in eighths of a column; what is not zero is visible."""
    eighths = ceil(share * width * 8)
    return EIGHTHS[8] * (eighths // 8) + EIGHTHS[eighths % 8].strip()


def optional(value: float | None, spec: str) -> str:
    """A number in the format `spec`, or a dash."""
    return "-" if value is None else format(value, spec)


def _facts(found: Overview) -> list[tuple[str, str]]:
    facts = [
        ("architecture", f"{found.architecture} ({found.model_type})" if found.model_type else found.architecture),
        ("dimensions", ", ".join(f"{DIMENSIONS[key]} {value}" for key, value in found.dimensions.items())),
        ("parameters", f"{count(found.parameters)} ({found.parameters:,})"),
        ("size", f"{size(found.size_bytes)}, {plural(found.tensors, 'tensor')} in {plural(found.files, 'file')}"),
        ("types", ", ".join(f"{dtype} {size(size_bytes)}" for dtype, size_bytes in found.dtypes.items())),
        ("bits", f"{found.bits_per_parameter:.2f} per parameter, over the whole model"),
    ]
    if found.bits_per_weight is None:
        facts.append(("quantized", "nothing"))
    else:
        share = found.quantized_parameters / found.parameters
        facts.append(("quantized", f"{share:.1%} of the parameters, at {found.bits_per_weight:.3f} bits per weight"))
    if found.format:
        facts.append(("format", found.format + (f", file type {found.file_type}" if found.file_type else "")))
    if found.readers and not found.schemes:
        facts.append(("read by", found.readers))
    facts += _scheme_facts(found)
    return facts + (_origin_facts(found.origin) if found.origin else [])


def _scheme_facts(found: Overview) -> list[tuple[str, str]]:
    facts = []
    for use in found.schemes:
        layers = plural(use.layers, "layer")
        differs = use.bits_on_disk - use.bits_per_weight >= VISIBLE_BITS
        bits = f", {use.bits_per_weight:.3f} bits per weight, {use.bits_on_disk:.3f} on disk" if differs else ""
        facts.append(("scheme", f"{use.scheme}, {layers}{bits}, read by {use.readers}"))
        if use.inputs:
            facts.append(("inputs", f"{use.inputs}, {layers}"))
        if use.outliers:
            share = use.outliers / use.parameters
            facts.append(("outliers", f"{share:.3%} of the weights are in 16 bits ({use.outliers:,}), {layers}"))
    if len({use.readers for use in found.schemes}) > 1:
        facts.append(("read by", f"{found.readers}, as a whole"))
    if found.kv_cache:
        layers = plural(found.kv_cache.layers, "layer")
        facts.append(("KV cache", f"{found.kv_cache.stored_as}, with fixed scales for keys and values of {layers}"))
    return facts


def _origin_facts(origin: Origin) -> list[tuple[str, str]]:
    layers = "".join(f", {pattern}={scheme}" for pattern, scheme in origin.layers.items())
    how = f"{origin.method}, {origin.scheme}{layers}" if origin.method != NO_METHOD else "laid out anew"
    facts = [("made by", f"qtool {origin.qtool}: {how}, from {origin.source}")]
    for gate in origin.gates:
        verdict = "passed" if gate["passed"] else "FAILED"
        facts.append(("gate", f"{verdict}: {gate['gate']} {gate['asked']}, measured {gate['measured']:.4g}"))
    return facts


def _histogram(found: TensorStats) -> Table:
    """One row per bin; the tails beyond the bins are rows of their own."""
    histogram = found.histogram
    bins = list(zip(histogram.edges[:-1], histogram.edges[1:], histogram.counts, strict=True))
    if histogram.below:
        bins.insert(0, (found.minimum, histogram.edges[0], histogram.below))
    if histogram.above:
        bins.append((histogram.edges[-1], found.maximum, histogram.above))
    values, tallest = sum(n for _, _, n in bins), max(n for _, _, n in bins)
    rows = [(f"{low:.4g}", f"{high:.4g}", f"{n / values:.2%}", bar(n / tallest)) for low, high, n in bins]
    return Table((">from", ">to", ">share", ""), rows, "histogram, its first and last rows the tails")


def _code_facts(found: CodeStats) -> list[tuple[str, str]]:
    low, middle, high = (f"{value:.4g}" for value in (found.scale_minimum, found.scale_median, found.scale_maximum))
    facts = [
        ("scales", f"{found.scales:,}: {found.scale_kind}"),
        ("", f"min {low}, median {middle}, max {high} in magnitude"),
        (
            "codes",
            f"{found.codes_used} of {found.codes_available} values used, {found.entropy_bits:.2f} bits of entropy",
        ),
        ("saturated", f"{found.saturated_ratio:.4%} lie at an end of the range"),
    ]
    if found.negative_scales:
        facts.insert(2, ("", f"{found.negative_scales / found.scales:.1%} of them are negative"))
    if found.zero_point_minimum is not None:
        facts.append(("zero points", f"{found.zero_point_minimum:g} to {found.zero_point_maximum:g}"))
    if found.minimum_lowest is not None:
        facts.append(
            ("minima", f"{found.minimum_lowest:.4g} to {found.minimum_highest:.4g}: what the code 0 stands for")
        )
    if found.outliers:
        kept = f"{found.outliers:,} weights ({found.outlier_share:.3%}) are in 16 bits beside the codes"
        facts.append(("kept", f"{kept}, the largest {found.outlier_maximum:.4g}"))
    if found.input_scale is not None:
        facts.append(("input scale", f"{found.input_scale:.5g}, fixed"))
    return facts


def _codes(found: CodeStats) -> Table:
    values, tallest = sum(n for _, n in found.counts), max(n for _, n in found.counts)
    rows = [(f"{value:.4g}", f"{n / values:.2%}", bar(n / tallest)) for value, n in found.counts]
    return Table((">code", ">share", ""), rows, "codes, as multiples of the scale")


def _channels(title: str, channels: Channels) -> Table:
    spread = f"min {channels.minimum:.4g}, median {channels.median:.4g}, max {channels.maximum:.4g}"
    longest = channels.maximum or 1.0
    rows = [(str(index), f"{reach:.4g}", bar(reach / longest)) for index, reach in channels.extremes]
    return Table((">channel", ">max|w|", ""), rows, f"{channels.count} {title}, by max|w|: {spread}")


def _first(rows: list[Row], top: int) -> list[Row]:
    """The first rows, and how many there are beside."""
    if len(rows) <= top:
        return rows
    return [*rows[:top], (f"... and {len(rows) - top} more", *[""] * (len(rows[0]) - 1))]


def _notes(notes: list[str]) -> View:
    return [f"note: {note}" for note in notes]
