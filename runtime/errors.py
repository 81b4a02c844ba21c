"""The errors of a running program. Each names the cause, the place (collective, axis, rank, node) and the way out."""

from __future__ import annotations

import linecache
from types import TracebackType

ABORT_KEY = "shardwright/abort"
"""The key of the process group's store under which a rank that fails leaves one line saying why, for its peers to read."""

AFTER_A_LOSS = "The rank that failed first says why in its own log; the job has to be started again, from its last checkpoint."
"""How every PeerLostError ends."""

GRAPH_MARK = "SHARDWRIGHT_GRAPH"
"""The global by which code emitted from a graph is known: its value is the graph's name."""


class ShardwrightError(RuntimeError):
    """Anything that a program refuses or that stops it. `at` adds where it happened, innermost first."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.places: list[str] = []

    def at(self, place: str) -> ShardwrightError:
        if place:
            self.places.append(place)
        return self

    def __str__(self) -> str:
        return "\n  at ".join([super().__str__(), *self.places])


class PeerLostError(ShardwrightError):
    """A rank died, left, or did not answer within the process group's timeout."""


class MismatchError(ShardwrightError):
    """Ranks, or a program and what it was given, do not agree: on a collective, a shape, a dtype, an input."""


class DeadlockError(ShardwrightError):
    """A collective or transfer that can never complete: every rank that is left waits for another."""


def add_place(error: BaseException, place: str) -> None:
    """Say in `error` where it happened, whatever its type."""
    if isinstance(error, ShardwrightError):
        error.at(place)
    elif place:
        error.add_note(f"  at {place}")


def graph_line(filename: str, line: int) -> str:
    """The emitted line and, where a comment above it says so, the user's source line it came from."""
    text = linecache.getline(filename, line).strip()
    for above in range(line - 1, 0, -1):
        comment = linecache.getline(filename, above).strip()
        if comment.startswith("def "):
            break
        if comment.startswith("# ") and ":" in comment:
            return f"{text}   (from {comment[2:]})"
    return text


def graph_place(traceback: TracebackType | None) -> str:
    """The graph and node in which an exception arose, "" if in none."""
    place = ""
    while traceback is not None:
        frame = traceback.tb_frame
        name = frame.f_globals.get(GRAPH_MARK)
        if name:
            place = f"graph {name}: {graph_line(frame.f_code.co_filename, traceback.tb_lineno)}"
        traceback = traceback.tb_next
    return place
