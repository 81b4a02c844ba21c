"""What planning leaves behind."""

from __future__ import annotations

import gc
import linecache
import weakref

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


class Cycle:
    def __init__(self) -> None:
        self.me = self


def test_what_planning_made_is_old() -> None:
    """The next collection of what is young does not go through it; a full one finds what of it is not used."""
    gc.collect()
    with collector.without_collection():
        made = [Cycle() for _ in range(1000)]
    assert not {id(each) for each in made} & {id(each) for each in gc.get_objects(generation=0)}
    seen = weakref.ref(made[0])
    del made
    gc.collect()
    assert seen() is None


def test_what_is_frozen_stays_so() -> None:
    mine = Cycle()
    gc.freeze()
    try:
        with collector.without_collection():
            pass
        assert not any(each is mine for each in gc.get_objects())
    finally:
        gc.unfreeze()
