"""Merges of BPE and the scores that llama.cpp has in their place (llm_tokenizer_spm in its src/llama-vocab.cpp).

With scores, of all neighbours whose join is a token, listed as a merge or not, those with the highest score are joined
first, and the leftmost of them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator
from itertools import islice
from typing import Any

from qtool.errors import QtoolError

LONGEST_TOKEN = 256  # characters: all ways to cut a token in two are tried
MOST_CHARACTERS = 1 << 22  # of all tokens; Gemma's 262144 have 2 million
MOST_MERGES = 1 << 20  # Gemma's tokens can be made in 580 thousand ways

Merge = tuple[str, str]


def merges_of(model: dict[str, Any]) -> list[Merge]:
    """The pairs of a tokenizer.json's `model`, in order."""
    return [(left, right) for left, right in model["merges"]]


def ranks_of(merges: list[Merge]) -> dict[str, int]:
    """For each token that a merge makes, the place of the first one that does."""
    return {left + right: rank for rank, (left, right) in reversed(list(enumerate(merges)))}


def scores_of(merges: list[Merge], tokens: list[str]) -> list[float]:
    """A score for each of `tokens` under which joining comes in the order of the merges."""
    ranks = ranks_of(merges)
    return [-float(ranks.get(token, len(merges))) for token in tokens]


def merges_of_scores(scores: dict[str, float]) -> list[Merge]:
    """Every way to make a token out of two, the token with the highest score first.

    Raises QtoolError for tokens that are too long or can be made in too many ways, and for scores that have no order.
    """
    if not all(map(math.isfinite, scores.values())):
        raise QtoolError("`tokenizer.ggml.scores` has scores that are not finite")
    joins = list(islice(_joins(scores, scores), MOST_MERGES))
    if len(joins) == MOST_MERGES:
        raise QtoolError(f"the {len(scores)} tokens can be made of each other in {MOST_MERGES} ways or more: not read")
    return sorted(joins, key=lambda join: (-scores[join[0] + join[1]], -len(join[0]), join))


def joined_otherwise(model: dict[str, Any], special: Collection[str]) -> set[str]:
    """Tokens of a tokenizer.json's `model` that llama.cpp would join out of scores where the merges do not.

    Of what is no merge but makes a token nothing comes where merges are in the order in which they were learnt and
    lead to every such token: neighbours that they leave over never join then (save in runs of one character), because
    the first merge across their border would have come before. `special` are tokens that no text is joined to.
    """
    merges = merges_of(model)
    parts = {token for token in model["vocab"] if token not in special}
    listed = set(merges)
    found = {left + right for left, right in _joins(parts, parts.union(*parts)) if (left, right) not in listed}
    ranks = ranks_of(merges)
    ordered = all(max(ranks.get(part, -1) for part in merge) < rank for rank, merge in enumerate(merges))
    return set() if ordered and merges_reach(model, found) else found


def merges_reach(model: dict[str, Any], tokens: Collection[str]) -> bool:
    """Whether the merges alone make every one of `tokens` out of its characters."""
    from tokenizers import Tokenizer

    steps = ["truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"]
    nothing: dict[str, Any] = dict.fromkeys(steps) | {"version": "1.0", "added_tokens": []}
    alone = Tokenizer.from_str(json.dumps(nothing | {"model": {**model, "ignore_merges": False}}))
    texts = list(tokens)
    found = alone.encode_batch(texts)
    return all(one.ids == [model["vocab"][token]] for token, one in zip(texts, found, strict=True))


def _joins(tokens: Collection[str], parts: Collection[str]) -> Iterator[Merge]:
    """Every way to make one of `tokens` out of two of `parts`. Raises QtoolError for tokens that are too long."""
    longest, together = max(map(len, tokens), default=0), sum(map(len, tokens))
    if longest > LONGEST_TOKEN or together > MOST_CHARACTERS:
        raise QtoolError(
            f"the tokenizer has a token of {longest} characters, and {together} in all; its merges are looked for up to"
            f" {LONGEST_TOKEN}, and {MOST_CHARACTERS} in all"
        )
    for token in tokens:
        for i in range(1, len(token)):
            if token[:i] in parts and token[i:] in parts:
                yield token[:i], token[i:]
