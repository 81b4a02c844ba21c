"""Indexing, bags of embeddings, spectra, and counts in normal form: the same values and gradients, by ops that may be sharded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_normalize import normal, ops, randn
from torch import Tensor, nn

from shardwright.compiler.torch_compat import chunked_cross_entropy

# --- indexing


def _ints(high: int, *shape: int, low: int = 0) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(3))


LOOKUPS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "the last token of each": lambda x, i, j: x[torch.arange(3), i],
    "several of each": lambda x, i, j: x[torch.arange(3)[:, None], j],
    "one of each, counted from the end": lambda x, i, j: x[torch.arange(len(x)), -1 - i],
    "two dims of each": lambda x, i, j: x[torch.arange(3), i, i],
    "in another order": lambda x, i, j: x.transpose(0, 1)[i, torch.arange(3)],
    "between two ranges": lambda x, i, j: x[torch.arange(3)[:, None], i[:, None], torch.arange(5)],
    "ranges the other way": lambda x, i, j: x[torch.arange(3), j.reshape(-1)[:5, None], torch.arange(5)[:, None]],
    "ranges alone": lambda x, i, j: x[torch.arange(3)[:, None], torch.arange(4)],
}


@pytest.mark.parametrize("case", LOOKUPS)
def test_a_range_among_the_indices_stays_a_dim(case: str) -> None:
    found = ops(normal(LOOKUPS[case], randn(3, 4, 5), _ints(4, 3), _ints(4, 3, 2)))
    assert "index.Tensor" not in found and found["gather"] + found["shardwright.pick"] == (case != "ranges alone")


WRITES: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "one of each": lambda x, i, j, v: x.index_put((torch.arange(3), i), v[:, 0]),
    "several of each": lambda x, i, j, v: x.index_put((torch.arange(3)[:, None], j), v),
    "the same for all": lambda x, i, j, v: x.index_put((torch.arange(3)[:, None], j), v[0, 0]),
    "added": lambda x, i, j, v: x.index_put((torch.arange(3)[:, None], i[:, None] + 0 * j), v, accumulate=True),
    "counted from the end": lambda x, i, j, v: x.index_put((torch.arange(3), i - 4), v[:, 1]),
}


@pytest.mark.parametrize("case", WRITES)
def test_a_range_among_the_places_that_are_written_stays_a_dim(case: str) -> None:
    distinct = torch.tensor([[0, 2], [3, 1], [2, 3]])
    found = ops(normal(WRITES[case], randn(3, 4, 5), _ints(4, 3), distinct, randn(3, 2, 5)))
    assert "index_put" not in found and found["scatter_add"] + found["scatter.src"] == 1


def test_indices_without_a_range_stay() -> None:
    def body(x: Tensor, i: Tensor) -> tuple[Tensor, ...]:
        return x[i], x[i, torch.arange(3)], x[torch.arange(2), i[:2]], x[torch.arange(1, 3), i[:2]], x[:, i]

    assert ops(normal(body, randn(3, 4, 5), _ints(3, 3)))["index.Tensor"] == 5


def _set(x: Tensor, *given: Any) -> Tensor:
    y = x.clone()
    *where, value = given
    y[tuple(where)] = value
    return y


MASKED: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "a number": lambda x, m, v: _set(x, m, 2.5),
    "a row": lambda x, m, v: _set(x, m, v),
    "a row, with its dim": lambda x, m, v: _set(x, m, v[None]),
    "elements": lambda x, m, v: _set(x, x > 0, v.sum()),
    "of a later dim": lambda x, m, v: _set(x, slice(None), m[0], 1.5),
    "of a later dim, each its own": lambda x, m, v: _set(x, slice(None), m[0], v[:3, None, None]),
    "added": lambda x, m, v: x.index_put((m,), v, accumulate=True),
}


@pytest.mark.parametrize("case", MASKED)
def test_what_a_mask_sets_to_one_value_is_chosen(case: str) -> None:
    found = ops(normal(MASKED[case], randn(3, 4, 5), torch.rand(3, 4) < 0.5, randn(5)))
    assert "index_put" not in found and found["where.self"] == 1


def test_a_mask_with_a_value_for_each_element_stays() -> None:
    graph = normal(lambda x, v: _set(x, torch.tensor([True, False, True]), v), randn(3, 4), randn(2, 4))
    assert ops(graph)["index_put"] == 1


def test_flat_indices_are_those_of_a_row() -> None:
    def body(x: Tensor, i: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return x.take(i), x.put(i, v), x.put(i, v, accumulate=True)

    found = ops(normal(body, randn(3, 4), torch.tensor([[1, -2], [5, 0]]), randn(2, 2)))
    assert not {"take", "put"} & set(found) and found["index_put"] == 2


def test_repeats_by_a_tensor_are_lookups() -> None:
    def body(x: Tensor, n: Tensor) -> tuple[Tensor, ...]:
        return x.repeat_interleave(n, 1, output_size=7), torch.repeat_interleave(n, output_size=7).to(torch.float64) * x[0, 0]

    for dtype in (torch.int64, torch.int32):
        assert "repeat_interleave.Tensor" not in ops(normal(body, randn(7, 4, 7), torch.tensor([2, 0, 4, 1], dtype=dtype)))


# --- bags


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("padding", [None, 2, -1])
@pytest.mark.parametrize("regular", [True, False])
def test_bags_are_lookups_that_are_summed(mode: str, padding: int | None, regular: bool) -> None:
    ids, offsets = (_ints(7, 4, 3), None) if regular else (_ints(7, 11), torch.tensor([0, 3, 3, 4, 11]))
    ids[0] = 2 if regular else ids[0]

    def body(weight: Tensor, ids: Tensor, offsets: Tensor | None, weights: Tensor | None) -> Tensor:
        options: dict[str, Any] = {"mode": mode, "padding_idx": padding, "include_last_offset": not regular}
        return F.embedding_bag(ids, weight, offsets, per_sample_weights=weights, **options)

    weights = randn(*ids.shape) if mode == "sum" else None
    found = ops(normal(body, randn(7, 5), ids, offsets, weights))
    whole = mode == "max" and not regular
    assert (found["embedding"], found["_embedding_bag"]) == (not whole, whole)


def test_bags_by_frequency_stay() -> None:
    def body(weight: Tensor, ids: Tensor) -> Tensor:
        return F.embedding_bag(ids, weight, scale_grad_by_freq=True)

    assert ops(normal(body, randn(7, 5), _ints(7, 4, 3)))["_embedding_bag"] == 1


@pytest.mark.parametrize("padding", [-1, 2])
def test_bags_called_by_their_inner_name(padding: int) -> None:
    def body(weight: Tensor, ids: Tensor, offsets: Tensor) -> tuple[Tensor, ...]:
        aten = torch.ops.aten
        own = aten._embedding_bag(weight, ids, offsets, False, 1, False, None, False, padding)[0]
        return own, aten._embedding_bag_forward_only(weight.detach(), ids, offsets, False, 0, False, None, False, padding)[0]

    ids = torch.tensor([2, 6, 6, 2, 2, 0, 6])
    found = ops(normal(body, randn(7, 5), ids, torch.tensor([0, 3, 5])))
    assert found["embedding"] == 2


# --- spectra


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize(("width", "normalized", "onesided"), [(None, False, True), (6, True, False), (5, False, None)])
def test_spectra_are_transforms_of_frames(center: bool, width: int | None, normalized: bool, onesided: bool | None) -> None:
    def body(x: Tensor, window: Tensor | None) -> tuple[Tensor, ...]:
        found = torch.stft(x, 8, 3, width, window, center, normalized=normalized, onesided=onesided, return_complex=True)
        bare = torch.stft(x[0], 8, center=center, return_complex=True)
        return found.real, found.imag, bare.real * bare.imag

    found = ops(normal(body, randn(3, 29), None if width is None else randn(width)))
    assert "stft" not in found and found["_fft_r2c"] == 2


# --- counts, diagonals and products


def test_counts_are_sums() -> None:
    def body(x: Tensor, m: Tensor) -> tuple[Tensor, ...]:
        counted = m.any(), m.all(), m.any(1), m.all(0, keepdim=True), torch.any(m, (0, 1)), torch.all(m, (1,), True)
        given = x.any(), x.all(-1), x.count_nonzero(), x.count_nonzero(1), x.count_nonzero((0, 1)), m.count_nonzero()
        return *counted, *given, m[0, 0].any(), torch.any(m, []), torch.all(x, [])

    found = ops(normal(body, randn(3, 4), torch.tensor([[True, False, True], [False] * 3])))
    assert not [name for name in found if name.startswith(("any", "all", "count_nonzero"))]


def test_sums_of_numbers_alone() -> None:
    def body(x: Tensor) -> tuple[Tensor, ...]:
        x = torch.where(x > 1, torch.nan, x)
        return x.nansum(), x.nansum(1), x.nansum((0, 2), keepdim=True), x.nanmean(-1)

    assert not [name for name in ops(normal(body, randn(3, 4, 5))) if name.startswith("nan")]


def test_diagonals_and_turns() -> None:
    def body(x: Tensor) -> tuple[Tensor, ...]:
        turned = [torch.rot90(x, k, (0, -1)) for k in range(-1, 4)]
        return x[0].trace(), x[0].t().trace(), x[0] * torch.eye(4, 5), x[0] @ torch.eye(5).double(), *turned

    assert not {"trace", "eye", "rot90"} & set(ops(normal(body, randn(3, 4, 5))))


def test_sums_with_products_stand_apart() -> None:
    def body(x: Tensor, y: Tensor, v: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        return (
            torch.addmv(w, x[0], v, beta=2, alpha=3),
            torch.addr(x[0], w, v, alpha=0.5),
            torch.addbmm(y[0][:4], x, y, beta=0.5),
            torch.addbmm(y[0][:4], x, y, beta=0),
            torch.rsub(x, x[0], alpha=2),
        )

    found = ops(normal(body, randn(2, 4, 5), randn(2, 5, 5), randn(5), randn(4)))
    assert not {"addmv", "addr", "addbmm", "rsub.Tensor"} & set(found)


def test_copies_are_views() -> None:
    def body(x: Tensor) -> tuple[Tensor, ...]:
        aten = torch.ops.aten
        copies = (
            aten.unsqueeze_copy(x, -1),
            aten.permute_copy(x, [1, 0]),
            aten.expand_copy(x[:1], [3, -1]),
            aten.slice_copy(x, 1, 1, -1),
            aten.narrow_copy(x.detach(), 1, 1, 2),  # before torch 2.13 it has no derivative
            aten.diagonal_copy(x),
            aten.squeeze_copy(x[:1], 0),
            aten.view_copy(x, [-1]),
            *aten.unsafe_split(x, 2, 1),
            *aten.split_with_sizes_copy(x, [1, 3], 1),
            aten.zero(x) + aten.alias_copy(x),
        )
        return tuple((y.reshape(-1) * torch.arange(y.numel())).sum() for y in copies)

    assert not [name for name in ops(normal(body, randn(3, 4))) if "copy" in name or "unsafe" in name]


# --- log-probabilities


@pytest.mark.parametrize("of", [None, torch.float64])
def test_what_is_picked_of_log_probabilities_is_picked_of_logits(of: torch.dtype | None) -> None:
    def body(x: Tensor, i: Tensor) -> tuple[Tensor, ...]:
        scores = x.log_softmax(-1, dtype=of)
        one = scores.gather(-1, i[..., None]), x.gather(2, i[..., None])[..., 0] - x.logsumexp(-1)
        return (
            *one,
            F.nll_loss(scores.flatten(0, 1), i.flatten()),
            scores.flatten(0, 1)[torch.arange(12), i.flatten()],
            x.logsumexp(2, keepdim=True),
        )

    found = ops(normal(body, randn(3, 4, 7), _ints(7, 3, 4)))
    assert found["shardwright.pick"] == 4 and not {"gather", "logsumexp", "log_softmax.int"} & set(found)


def test_other_gathers_and_sums_stay() -> None:
    def body(x: Tensor, i: Tensor) -> tuple[Tensor, ...]:
        return x.gather(-1, i), x.gather(1, i[:, :1]), x.gather(-1, i[:, :2, :1]), x.logsumexp((0, 2)), x.logsumexp(1)

    found = ops(normal(body, randn(3, 4, 7), _ints(4, 3, 4, 7)))
    assert found["gather"] == 3 and found["logsumexp"] == 2


def test_a_position_outside_of_a_row_is_nan() -> None:
    graph = normal(lambda x, i: x.gather(-1, i), randn(4, 3), torch.tensor([[0], [1], [2], [2]]))
    found = graph(torch.zeros(4, 3).double(), torch.tensor([[0], [-1], [3], [2]]))[0]
    assert found.isnan().tolist() == [[False], [True], [True], [False]]


@pytest.mark.skipif(not chunked_cross_entropy(), reason="torch has no linear_cross_entropy")
@pytest.mark.parametrize("weighted", [True, False])
def test_a_mean_of_losses_in_chunks_is_their_sum(weighted: bool) -> None:
    def body(x: Tensor, weight: Tensor, target: Tensor, classes: Tensor | None) -> tuple[Tensor, ...]:
        options = nn.LinearCrossEntropyOptions(allow_retain_graph=True)
        given: dict[str, Any] = {"weight": classes, "ignore_index": 2, "options": options}
        return tuple(F.linear_cross_entropy(x, weight, target, reduction=r, **given) for r in ("mean", "sum", "none"))

    normal(body, randn(6, 4), randn(5, 4), torch.tensor([0, 2, 4, 2, 1, 3]), torch.rand(5).double() if weighted else None)
