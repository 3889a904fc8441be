"""Size limits for the parts of a configuration, checked before anything is built from it.

A model without weights costs time and memory too: a Python object a layer, a table of positions, a dictionary of
labels. Settings are known by what their names have in common, so that an architecture with names of its own is bounded
as well.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

MOST_LAYERS = 2_000
MOST_LABELS = 100_000
_MOST_EXPERTS = 1_000_000
_MOST_LISTED = 10_000
_MOST_ANYTHING = 2**31

_LAYERS = re.compile(r"(^|_)(n_|num_)?\w*(layer|layers|blocks|block_repeats|depth|depths|stages|groups)$")
_EXPERTS = re.compile(r"experts$")
_RULES: tuple[tuple[re.Pattern[str], int], ...] = (
    # Indices of layers, and intervals between layers, are numbers of layers too.
    (_LAYERS, MOST_LAYERS),
    (_EXPERTS, 20_000),
    (re.compile(r"head(s|_groups)?$"), 16_384),
    (re.compile(r"labels|classes"), MOST_LABELS),
    (re.compile(r"position|seq_len|n_ctx|window|max_length"), 2**30),
    (re.compile(r"vocab"), 10**8),
    (re.compile(r"(size|dim|width|rank|embd|embed|inner|d_model|d_ff|d_kv|channels)s?$"), 2**22),
)

_EXPERTS_OF_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k")
_EXPERTS_OF_LAYER = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


class TooLarge(NamedTuple):
    """A setting over its bound."""

    name: str
    value: int
    most: int

    @property
    def message(self) -> str:
        """The bound that is exceeded, in words."""
        shown = f"{self.value:,}" if self.value < 10**18 else f"a number of {len(str(self.value))} digits"
        return f"{self.name} is {shown}; at most {self.most:,} is built here"


def too_large(values: Mapping[str, Any]) -> TooLarge | None:
    """The first setting over its bound, of a configuration and the configurations in it."""
    for name, value in _numbers(values, ""):
        if value > (most := _bound(name.rpartition(".")[2])):
            return TooLarge(name, value, most)
    layers = max((value for name, value in _numbers(values, "") if _LAYERS.search(name)), default=1)
    experts = max((value for name, value in _numbers(values, "") if _EXPERTS.search(name)), default=1)
    if layers * experts > _MOST_EXPERTS:
        return TooLarge("layers times experts", layers * experts, _MOST_EXPERTS)
    return None


def experts_complaint(settings: Mapping[str, Any]) -> tuple[str, str] | None:
    """A setting with more experts per token than there are, and its message; else only a forward pass would fail."""
    of_token = next((name for name in _EXPERTS_OF_TOKEN if _is_count(settings.get(name))), "")
    number = next((name for name in _EXPERTS_OF_LAYER if _is_count(settings.get(name))), "")
    if not of_token or not number or 1 <= settings[of_token] <= settings[number] or not settings[number]:
        return None
    return of_token, (
        f"{settings[of_token]:,} experts a token, but there are {settings[number]:,} ({number}); give 1 to "
        f"{settings[number]:,}"
    )


def _bound(name: str) -> int:
    return next((most for pattern, most in _RULES if pattern.search(name)), _MOST_ANYTHING)


def _numbers(values: Mapping[str, Any], place: str) -> Iterator[tuple[str, int]]:
    for name, value in values.items():
        path = f"{place}.{name}" if place else str(name)
        if isinstance(value, dict):
            yield from _numbers(value, path)
        elif isinstance(value, list):
            # A list of what each layer is, say: it has an entry for each.
            if len(value) > _MOST_LISTED:
                yield f"{path}.layers", len(value)
            yield from ((path, each) for each in value[:_MOST_LISTED] if _is_count(each))
        elif _is_count(value):
            yield path, value


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
