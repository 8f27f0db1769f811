"""Rotary position embeddings as config.json spells them, and as llama.cpp reads them: keys, and tensors of factors.

Scaling of Llama 3.1: a frequency f is divided by 1 / ((1 - s) / factor + s), where s rises from 0 to 1 while f's turns
in the original context rise from low_freq_factor to high_freq_factor (meta-llama/llama-models, apply_scaling).
LongRoPE: arXiv 2402.13753; llama.cpp takes the long factors when its context is longer than the original, transformers
when the row is. YaRN: arXiv 2309.00071. llama.cpp multiplies cosine and sine by attn_factor and, with YaRN, by
1 + 0.1 ln(factor) besides.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import log, pi, sqrt
from typing import TYPE_CHECKING, Any

from qtool.errors import QtoolError, UsageError
from qtool.gguf.architectures import Architecture
from qtool.gguf.hyperparameters import Keys, number

if TYPE_CHECKING:
    import numpy as np

LLAMA3, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
TENSORS = (LLAMA3, LONG, SHORT)
LISTS = {"long_factor": LONG, "short_factor": SHORT}  # of config.json
SPELLINGS = {"su": "longrope"}
YARN_FIXED = {"beta_fast": 32, "beta_slow": 1, "truncate": True}  # llama.cpp takes no others for these architectures
LLAMA3_TOLERANCE = 1e-5  # relative, of the factors that the parameters found give


def from_config(config: Mapping[str, Any], architecture: Architecture, head_dim: int) -> dict[str, Any]:
    """The rope_parameters of a config.json as transformers 5 spells them, and `local_theta` of blocks with a window.

    Older files have `rope_theta` and `rope_scaling`. Raises UsageError for scaling that llama.cpp does not have for
    this architecture, QtoolError for numbers that are none.
    """
    known = {**architecture.defaults, **config}
    given = _mapping(config.get("rope_scaling") or config.get("rope_parameters") or {})
    nested = "full_attention" in given or "sliding_attention" in given
    whole = _mapping(given.get("full_attention") or {}) if nested else given
    local = _mapping(given.get("sliding_attention") or {}) if nested else {}
    kind = whole.get("rope_type", whole.get("type")) or "default"
    kind = SPELLINGS.get(kind, kind) if isinstance(kind, str) else kind
    if kind not in architecture.ropes or local.get("rope_type", "default") != "default":
        raise UsageError(
            f"llama.cpp cannot scale the rotary embeddings of {architecture.name} as config.json asks: `{kind}`",
            f"it has {', '.join(architecture.ropes)}",
        )

    def positive(name: str, *others: object) -> float:
        value = next((v for v in (whole.get(name), *others) if v is not None), None)
        return float(number(value, f"`{name}` of the rope parameters in config.json", float))

    rope: dict[str, Any] = {"rope_type": kind}
    rope["rope_theta"] = positive("rope_theta", known.get("rope_theta"), known.get("rotary_emb_base"), 10000.0)
    share = positive("partial_rotary_factor", known.get("partial_rotary_factor"), known.get("rotary_pct"), 1.0)
    if architecture.partial_rotary:
        rope["partial_rotary_factor"] = share
    if share > 1 or int(head_dim * share) % 2 or (share != 1 and not architecture.partial_rotary):
        raise UsageError(f"llama.cpp cannot rotate {share} of {head_dim} dimensions in {architecture.name}")
    if "rope_local_base_freq" in architecture.defaults:
        usual = architecture.defaults["rope_local_base_freq"]
        theta = next(v for v in (local.get("rope_theta"), known.get("rope_local_base_freq"), usual) if v is not None)
        rope["local_theta"] = float(number(theta, "`rope_local_base_freq` of config.json", float))
    if kind in ("yarn", "longrope", "llama3"):
        context = known["max_position_embeddings"]
        original = next(
            v
            for v in (
                known.get("original_max_position_embeddings"),
                whole.get("original_max_position_embeddings"),
                context,
            )
            if v is not None
        )
        original = number(original, "`original_max_position_embeddings` of config.json")
        rope["original_max_position_embeddings"] = original
    if kind in ("linear", "llama3"):
        rope["factor"] = positive("factor")
    if kind == "llama3":
        rope |= {name: positive(name) for name in ("low_freq_factor", "high_freq_factor")}
        if not rope["low_freq_factor"] < rope["high_freq_factor"]:
            raise QtoolError("config.json has a low_freq_factor that is not below its high_freq_factor")
    if kind == "yarn":
        odd = {name: whole[name] for name, only in YARN_FIXED.items() if whole.get(name, only) not in (only, None)}
        if odd:
            raise UsageError(f"llama.cpp has YaRN for {architecture.name} only without {odd}")
        rope["factor"] = positive("factor", context / original)
        rope["attention_factor"] = positive("attention_factor", _yarn_attention(whole, rope["factor"]))
    if kind == "longrope":
        factor = positive("factor", context / original)
        usual = sqrt(1 + log(factor) / log(max(original, 2))) if factor > 1 else 1.0
        rope["attention_factor"] = positive("attention_factor", usual)
        for name in LISTS:
            values = whole.get(name)
            if not isinstance(values, list) or len(values) != int(head_dim * share) // 2:
                raise QtoolError(f"`{name}` of config.json is not a list of {int(head_dim * share) // 2} numbers")
            rope[name] = [float(number(v, f"`{name}` of config.json", float)) for v in values]
    return rope


def metadata(rope: Mapping[str, Any], head_dim: int) -> dict[str, Any]:
    """The keys of a file, without the name of the architecture before them."""
    keys: dict[str, Any] = {"rope.freq_base": rope["rope_theta"], "rope.dimension_count": dimensions(rope, head_dim)}
    if "local_theta" in rope:
        keys["rope.freq_base_swa"] = rope["local_theta"]
    if rope["rope_type"] in ("linear", "yarn", "longrope"):
        keys["rope.scaling.type"] = rope["rope_type"]
    if rope["rope_type"] in ("linear", "yarn"):
        keys["rope.scaling.factor"] = rope["factor"]
    if rope["rope_type"] in ("yarn", "longrope"):
        keys["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
        own = _yarn_attention({}, rope["factor"]) if rope["rope_type"] == "yarn" else 1.0
        keys["rope.scaling.attn_factor"] = rope["attention_factor"] / own
    return keys


def tensors(rope: Mapping[str, Any], head_dim: int) -> dict[str, np.ndarray]:
    """The float32 tensors of factors that a file has besides, by which llama.cpp divides the frequencies."""
    import numpy as np

    if rope["rope_type"] == "llama3":
        return {LLAMA3: llama3_factors(rope, dimensions(rope, head_dim)).astype(np.float32)}
    if rope["rope_type"] == "longrope":
        return {name: np.asarray(rope[key], np.float32) for key, name in LISTS.items()}
    return {}


def dimensions(rope: Mapping[str, Any], head_dim: int) -> int:
    """How many dimensions of a head are rotated."""
    return int(head_dim * rope.get("partial_rotary_factor", 1.0))


def from_keys(
    keys: Keys, architecture: Architecture, head_dim: int, context: int, extra: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """The inverse of `metadata` and `tensors`: as `from_config` gives it. Raises QtoolError naming key or tensor."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": keys.number("rope.freq_base", float, missing=10000.0)}
    rotated = keys.number("rope.dimension_count", most=head_dim, missing=head_dim)
    if rotated % 2 or (rotated != head_dim and not architecture.partial_rotary):
        raise QtoolError(f"the GGUF file rotates {rotated} of {head_dim} dimensions, which no {architecture.name} does")
    if architecture.partial_rotary:
        share = rotated / head_dim
        rope["partial_rotary_factor"] = share if int(head_dim * share) == rotated else (rotated + 0.5) / head_dim
    if "rope_local_base_freq" in architecture.defaults:
        rope["local_theta"] = keys.number("rope.freq_base_swa", float, missing=10000.0)
    factor = keys.number("rope.scaling.factor", float, missing=None)
    factor = factor or keys.number("rope.scale_linear", float, missing=None)
    attention = keys.number("rope.scaling.attn_factor", float, missing=1.0)
    original = keys.number("rope.scaling.original_context_length", missing=None) or context
    kind = keys.text("rope.scaling.type", "linear")
    if kind == "linear" and factor not in (None, 1.0):
        rope |= {"rope_type": "linear", "factor": factor}
    elif kind == "yarn":
        factor = factor or 1.0
        rope |= {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
        rope["attention_factor"] = attention * _yarn_attention({}, factor)
    elif kind not in ("none", "linear", "longrope"):
        raise QtoolError(f"the GGUF file scales rotary embeddings in an unknown way: `{kind}`")
    if kind == "longrope" or LONG in extra:
        rope |= {"rope_type": "longrope", "original_max_position_embeddings": original, "attention_factor": attention}
        rope |= {name: _factors(extra, tensor, rotated) for name, tensor in LISTS.items()}
    elif LLAMA3 in extra:
        if rope["rope_type"] != "default":
            raise QtoolError(f"the GGUF file has `{LLAMA3}` and `{kind}` scaling at once")
        rope |= llama3_parameters(_factors(extra, LLAMA3, rotated), rope["rope_theta"])
    if rope["rope_type"] not in architecture.ropes:
        raise QtoolError(
            f"transformers has no {rope['rope_type']} scaling of {architecture.name}, as the GGUF file asks"
        )
    return rope


def parameters(rope: Mapping[str, Any]) -> dict[str, Any]:
    """The rope_parameters of a config.json that say so to transformers 5."""
    whole = {name: value for name, value in rope.items() if name != "local_theta"}
    if "local_theta" not in rope:
        return whole
    return {
        "full_attention": whole,
        "sliding_attention": {"rope_type": "default", "rope_theta": rope["local_theta"]},
    }


def llama3_factors(rope: Mapping[str, Any], dims: int) -> np.ndarray:
    """What Llama 3.1 divides each frequency by, float64 [dims / 2]."""
    import numpy as np

    turns = rope["original_max_position_embeddings"] * _turns(rope["rope_theta"], dims)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return np.asarray(1 / ((1 - smooth) / rope["factor"] + smooth))


def llama3_parameters(factors: list[float], theta: float) -> dict[str, Any]:
    """The parameters whose `llama3_factors` are these: the inverse, to 1e-5.

    The factors fix `factor` and the line on which s rises with the turns per token; the original context only scales
    both of its ends, and is the one whose low_freq_factor is next to 1, as in every published model. Where fewer than
    two factors lie between the ends, any line through what is there will do. Raises QtoolError for other curves.
    """
    import numpy as np

    given = np.asarray(factors, np.float64)
    turns, factor = _turns(theta, 2 * len(factors)), float(given.max())
    if factor <= 1:
        return {}
    smooth = (1 / given - 1 / factor) / (1 - 1 / factor)
    inside = (smooth > 1e-6) & (smooth < 1 - 1e-6)
    bottom = turns[smooth <= 1e-6].max()
    top = turns[smooth >= 1 - 1e-6].min(initial=np.inf)
    x, y = turns[inside], smooth[inside]
    if len(x) > 1:
        away = x - x.mean()
        slope = (away @ y) / max(away @ away, 1e-30)  # least squares
    elif len(x) == 1:
        slope = max((1 - y[0]) / (top - x[0]), y[0] / max(x[0] - bottom, 1e-30))
    else:
        slope = 1 / max(top - bottom, 1e-30)
        x, y = bottom[None], np.zeros(1)
    slope, start = float(slope), float(y.mean() - slope * x.mean())
    if 1e-12 * slope < -start:
        original = max(1, round(-slope / start))
        low = -start / slope * original
        high = low + original / slope
        for digits, tolerance in ((3, LLAMA3_TOLERANCE / 10), (15, LLAMA3_TOLERANCE)):
            found: dict[str, Any] = {"rope_type": "llama3", "factor": factor}
            found |= {"low_freq_factor": round(low, digits), "high_freq_factor": round(high, digits)}
            found["original_max_position_embeddings"] = original
            if found["low_freq_factor"] < found["high_freq_factor"]:
                again = llama3_factors({**found, "rope_theta": theta}, 2 * len(factors))
                if np.allclose(again, given, rtol=tolerance, atol=0):
                    return found
    raise QtoolError(f"`{LLAMA3}` of the GGUF file is not the scaling of Llama 3.1, so transformers cannot compute it")


def _turns(theta: float, dims: int) -> np.ndarray:
    """Turns per token of each pair of dimensions, float64 [dims / 2]."""
    import numpy as np

    return np.asarray(theta ** (-np.arange(0, dims, 2) / dims) / (2 * pi))


def _yarn_attention(given: Mapping[str, Any], factor: float) -> float:
    """By what YaRN multiplies cosine and sine where nothing else is said."""

    def scale(weight: float) -> float:
        return 0.1 * weight * log(factor) + 1.0 if factor > 1 else 1.0

    both = [given.get(name) for name in ("mscale", "mscale_all_dim")]
    if not all(both):
        return scale(1.0)
    over, under = (float(number(value, "`mscale` of config.json", float)) for value in both)
    return scale(over) / scale(under)


def _factors(extra: Mapping[str, np.ndarray], name: str, dims: int) -> list[float]:
    """The factors of a tensor. Raises QtoolError where it is missing, has another length or impossible values."""
    import numpy as np

    if name not in extra:
        raise QtoolError(f"the GGUF file has no tensor `{name}`")
    values = np.asarray(extra[name])
    if values.shape != (dims // 2,) or not np.all(np.isfinite(values)) or not np.all(values > 0):
        raise QtoolError(f"`{name}` of the GGUF file is not {dims // 2} positive numbers")
    return [float(str(np.float32(value))) for value in values]


def _mapping(value: object) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise QtoolError(f"the rope parameters of config.json are {value!r:.60}: not an object")
    return value
