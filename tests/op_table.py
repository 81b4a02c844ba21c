"""What `make test-ops` says at its end: factors offered, by family of rules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

EXAMINED = "examined"
"""The property in which a test of tests/passes/test_opinfo.py reports what an entry's ops were offered: an `opinfo.Examined` as a
dict."""


def summary(entries: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Lines of text."""
    offered: dict[str, dict[str, set[str]]] = {}
    whole: dict[str, set[str]] = {}
    for entry in entries:
        for family, op, label in entry["offered"]:
            offered.setdefault(family, {}).setdefault(op, set()).add(label)
        for family, op in entry["whole"]:
            whole.setdefault(family, set()).add(op)
    for family in sorted({*offered, *whole}):
        ops = offered.get(family, {})
        left = sorted(op.removeprefix("aten.") for op in whole.get(family, set()) - set(ops))
        yield f"{family}: {len(ops)} ops with a real sharding, {len(left)} without"
        counts = Counter(label for labels in ops.values() for label in labels)
        if counts:
            yield "    factors, and how many ops offer each: " + ", ".join(f"{label} {n}" for label, n in counts.most_common())
        if left:
            yield "    always whole: " + ", ".join(left)
    yield (
        f"{sum(bool(e['offered']) for e in entries)} of {len(entries)} entries with a real sharding, "
        f"{sum(bool(e['refused']) for e in entries)} not captured, {sum(e['tried'] for e in entries)} strategies run, "
        f"{sum(len(e['wrong']) for e in entries)} wrong"
    )
