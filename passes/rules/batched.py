"""Ops that treat each matrix, sample or channel of a batch alone: the leading dims map, the others stay whole."""

from __future__ import annotations

import itertools

import torch

from ..types import Varying
from .base import Axis, Factor, LocalCall, OpCall, Rule, Slot, Strategy, everywhere, localizer, rule_for
from .notation import factors

aten = torch.ops.aten

CORE_DIMS = {
    # op: trailing dims of each tensor operand that belong together; what is before them is the batch.
    aten.cholesky_inverse.default: (2,),
    aten.cholesky_solve.default: (2, 2),
    aten.linalg_cholesky_ex.default: (2,),
    aten.linalg_eig.default: (2,),
    aten._linalg_eigh.default: (2,),
    aten._linalg_det.default: (2,),
    aten._linalg_slogdet.default: (2,),
    aten._linalg_solve_ex.default: (2, 2),
    aten._linalg_svd.default: (2,),
    aten.linalg_householder_product.default: (2, 1),
    aten.linalg_inv_ex.default: (2,),
    aten.linalg_ldl_factor_ex.default: (2,),
    aten.geqrf.default: (2,),
    aten.ormqr.default: (2, 1, 2),
    aten.lu_unpack.default: (2, 1),
    aten.linalg_ldl_solve.default: (2, 1, 2),
    aten.linalg_lu.default: (2,),
    aten.linalg_lu_factor_ex.default: (2,),
    aten.linalg_lu_solve.default: (2, 1, 2),
    aten.linalg_matrix_exp.default: (2,),
    aten.linalg_pinv.atol_rtol_tensor: (2,),
    aten.linalg_qr.default: (2,),
    aten.linalg_solve_triangular.default: (2, 2),
    aten.triangular_solve.default: (2, 2),
    aten.adaptive_max_pool2d.default: (2,),
    aten.adaptive_max_pool3d.default: (3,),
    aten._adaptive_avg_pool3d.default: (3,),
    aten.avg_pool3d.default: (3,),
    aten.max_pool3d_with_indices.default: (3,),
    aten.max_unpool2d.default: (2, 2),
    aten.max_unpool3d.default: (3, 3),
    aten.fractional_max_pool2d.default: (2, 1),
    aten.fractional_max_pool3d.default: (3, 1),
    aten.grid_sampler_2d.default: (3, 3),
    aten.grid_sampler_3d.default: (4, 4),
    aten.pixel_shuffle.default: (3,),
    aten.pixel_unshuffle.default: (3,),
    aten.channel_shuffle.default: (3,),
    aten.diag_embed.default: (1,),
    aten.affine_grid_generator.default: (2,),
}
if hasattr(aten, "cholesky"):  # torch 2.14 has linalg_cholesky_ex alone
    CORE_DIMS[aten.cholesky.default] = (2,)


@rule_for(*CORE_DIMS)
def batched(call: OpCall, axis: Axis) -> Rule | None:
    """Every tensor has the batch's dims in front, or none at all. No shards where one broadcasts, or puts other dims there."""
    first, cores = call.operands[0].shape, CORE_DIMS[call.target]
    count = len(first) - cores[0]
    batch = first[: max(count, 0)]
    if call.target is aten.diag_embed.default and (call.arg(2, "dim1", -2), call.arg(3, "dim2", -1)) != (-2, -1):
        return Rule(())
    scalar = [not o.shape for o in call.operands]
    for o, s, core in itertools.zip_longest(call.operands, scalar, cores):
        if o is not None and not s and (core is None or o.shape[:count] != batch or len(o.shape) != count + core):
            return Rule(())
    if any(r.shape[:count] != batch for r in call.results):
        return Rule(())
    return Rule(
        tuple(
            Factor(f"d{d}", size, tuple(None if s else Slot(d) for s in scalar), tuple(Slot(d) for _ in call.results))
            for d, size in enumerate(batch)
            if size > 1
        )
    )


@localizer(aten.affine_grid_generator.default)
def local_grid(call: OpCall, strategy: Strategy, index: int) -> LocalCall:
    """The size that it is given has the samples of the rank."""
    rows, *rest = call.args[1]
    (made,) = strategy.outs
    size = made.local_size(index) if isinstance(made, Varying) else rows
    return call.target, (call.args[0], [size, *rest], *call.args[2:]), dict(call.kwargs)


@rule_for(aten.linalg_cross.default)
def cross(call: OpCall, axis: Axis) -> Rule:
    """Dims other than the vectors' own map, broadcast ones included."""
    shape = call.results[0].shape
    dim = call.arg(2, "dim", -1) % len(shape)

    def slot(own: tuple[int, ...], d: int) -> Slot | None:
        return Slot(d) if own[d] == shape[d] else None

    if any(len(o.shape) != len(shape) for o in call.operands):
        return Rule()
    return Rule(
        tuple(
            Factor(f"d{d}", size, tuple(slot(o.shape, d) for o in call.operands), (Slot(d),))
            for d, size in enumerate(shape)
            if d != dim and size > 1
        )
    )


@rule_for(aten.renorm.default)
def renorm(call: OpCall, axis: Axis) -> Rule:
    """Each slice along `dim` is scaled alone: that dim maps."""
    shape = call.operands[0].shape
    dim = call.arg(2, "dim") % len(shape)
    return Rule((Factor("d", shape[dim], (Slot(dim),), (Slot(dim),)),) if shape[dim] > 1 else ())


@rule_for(aten.multi_margin_loss.default, aten.multilabel_margin_loss_forward.default)
def margin_loss(call: OpCall, axis: Axis) -> Rule:
    """Samples map, where each keeps its own loss."""
    position = 5 if call.target is aten.multi_margin_loss.default else 2
    x = call.operands[0].shape
    if call.arg(position, "reduction", 1) != 0 or len(x) != 2 or x[0] < 2:
        return Rule()
    common = (None,) * (len(call.operands) - 2)
    return Rule((Factor("n", x[0], (Slot(0), Slot(0), *common), (Slot(0),) * len(call.results)),))


@rule_for(aten._cdist_forward.default, aten._euclidean_dist.default)
def distances(call: OpCall, axis: Axis) -> Rule:
    """x[..., n, k], y[..., m, k] -> [..., n, m]: all but the width map."""
    found = factors("... n k, ... m k -> ... n m; block: k", call)
    return Rule(found, swap={f.name: everywhere for f in found})
