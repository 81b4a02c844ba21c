"""What planning leaves behind."""

from __future__ import annotations

import linecache

from shardwright.compiler import collector


def test_sources_of_graphs_stay_known() -> None:
    """Tracebacks show their lines; of files, the lines are read again when they are wanted."""
    graph = "<shardwright forward 0>"
    linecache.cache[graph] = (4, None, ["x = 1\n"], graph)
    linecache.cache["<eval of a user>"] = (lambda: "y = 2\n",)  # read when it is wanted, as torch.fx keeps its code
    assert linecache.getline(__file__, 1).startswith('"""What')
    collector.give_back()
    assert linecache.getline(graph, 1) == "x = 1\n" and __file__ not in linecache.cache
    assert linecache.getline(__file__, 1).startswith('"""What')
    assert linecache.cache.pop("<eval of a user>")[0]() == "y = 2\n"
    del linecache.cache[graph]
