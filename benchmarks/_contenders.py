"""One class for each way to train in parallel, shardwright among them. All have the optimizer step in their step."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import Schedule1F1B, SplitPoint, pipeline
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, loss_parallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from shardwright import Strategy, auto_parallelize

from ._models import PlainLlama, PlainLlamaLoss, Sizes, hf_llama, next_token_loss

LossPlace = Literal["mean", "last", "all"]


@dataclass(frozen=True)
class Job:
    """What all contenders share. tokens: the global batch, int64 [batch, length], equal on all ranks."""

    sizes: Sizes
    tokens: Tensor
    device: torch.device
    dtype: torch.dtype

    @property
    def share(self) -> Tensor:
        """This rank's samples where all ranks are data ranks."""
        return self.tokens.chunk(dist.get_world_size())[dist.get_rank()]


class Contender(Protocol):
    """loss_place: where a step's loss is: the mean over ranks, on the last rank, or on all alike."""

    loss_place: LossPlace

    def __init__(self, job: Job) -> None: ...
    def step(self) -> Tensor | None: ...


def make_optimizer(module: nn.Module) -> torch.optim.Optimizer:
    """The same for all: torch's own defaults."""
    return torch.optim.AdamW(module.parameters(), lr=1e-4)


class Local:
    """A rank's share of the batch with no communication at all: what no data parallelism can be faster than."""

    loss_place: LossPlace = "mean"

    def __init__(self, job: Job) -> None:
        self.batch = {"input_ids": job.share, "labels": job.share.clone()}
        self.model = self.wrap(hf_llama(job.sizes).to(job.device, job.dtype), job)
        self.optimizer = make_optimizer(self.model)

    def wrap(self, model: nn.Module, job: Job) -> nn.Module:
        return model

    def step(self) -> Tensor | None:
        loss = self.model(**self.batch).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


class Ddp(Local):
    def wrap(self, model: nn.Module, job: Job) -> nn.Module:
        return DistributedDataParallel(model, gradient_as_bucket_view=True)


class Fsdp2(Local):
    """Each decoder layer, and the rest."""

    def wrap(self, model: nn.Module, job: Job) -> nn.Module:
        mesh = init_device_mesh(job.device.type, (dist.get_world_size(),))
        layers = model.get_submodule("model.layers")
        for layer in layers.children():
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model


class DtensorTensorParallel:
    """Attention by heads, MLP by column and row, vocabulary-parallel embedding, head and loss, written out for Llama."""

    loss_place: LossPlace = "all"

    def __init__(self, job: Job) -> None:
        mesh = init_device_mesh(job.device.type, (dist.get_world_size(),))
        model = hf_llama(job.sizes).to(job.device, job.dtype)
        plan = {
            "model.embed_tokens": RowwiseParallel(input_layouts=Replicate()),
            "model.layers.*.self_attn.q_proj": ColwiseParallel(),
            "model.layers.*.self_attn.k_proj": ColwiseParallel(),
            "model.layers.*.self_attn.v_proj": ColwiseParallel(),
            "model.layers.*.self_attn.o_proj": RowwiseParallel(),
            "model.layers.*.mlp.gate_proj": ColwiseParallel(),
            "model.layers.*.mlp.up_proj": ColwiseParallel(),
            "model.layers.*.mlp.down_proj": RowwiseParallel(),
            "lm_head": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False),
        }
        self.model = parallelize_module(model, mesh, plan)
        self.tokens = job.tokens
        self.optimizer = make_optimizer(self.model)

    def step(self) -> Tensor | None:
        with loss_parallel():
            loss = next_token_loss(self.model(input_ids=self.tokens).logits, self.tokens)
            loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        loss = loss.detach()
        return loss.full_tensor() if isinstance(loss, DTensor) else loss


class TorchPipeline:
    """torch.distributed.pipelining with 1F1B, on the plain model, layers cut evenly."""

    loss_place: LossPlace = "last"

    def __init__(self, job: Job) -> None:
        rank, stages = dist.get_rank(), dist.get_world_size()
        layers, microbatches = job.sizes.layers, job.sizes.microbatches
        model = PlainLlama(job.sizes).to(job.device, job.dtype)
        cuts = {f"layers.{layers * stage // stages}": SplitPoint.BEGINNING for stage in range(1, stages)}
        pipe = pipeline(model, mb_args=(job.tokens.chunk(microbatches)[0],), split_spec=cuts)
        del model
        stage = pipe.build_stage(rank, job.device)
        self.schedule = Schedule1F1B(stage, microbatches, loss_fn=next_token_loss)
        self.optimizer = make_optimizer(stage.submod)
        self.tokens, self.first, self.last = job.tokens, rank == 0, rank == stages - 1

    def step(self) -> Tensor | None:
        losses: list[Tensor] = []
        inputs = (self.tokens,) if self.first else ()
        if self.last:
            self.schedule.step(*inputs, target=self.tokens, losses=losses)
        else:
            self.schedule.step(*inputs)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return torch.stack(losses).mean().detach() if self.last else None


class Shardwright:
    """`strategy` on the model of the peer that it stands against."""

    loss_place: LossPlace = "all"
    strategy: Strategy
    plain = False

    def __init__(self, job: Job) -> None:
        tokens = job.share if (self.strategy.dp or 1) > 1 else job.tokens
        model = (PlainLlamaLoss(job.sizes) if self.plain else hf_llama(job.sizes)).to(job.device, job.dtype)
        self.batch = {"tokens" if self.plain else "input_ids": tokens, "labels": tokens.clone()}
        self.parallel = auto_parallelize(model, example_inputs=self.batch, strategy=self.strategy)
        self.optimizer = make_optimizer(self.parallel)

    def step(self) -> Tensor | None:
        result = self.parallel(**self.batch)
        loss = result if self.plain else result.loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


def shardwright(strategy: Strategy, plain: bool = False) -> type[Contender]:
    return type("Pinned", (Shardwright,), {"strategy": strategy, "plain": plain})


def pairing(name: str, ranks: int, microbatches: int) -> dict[str, type[Contender]]:
    """The contenders that are measured together, by their names in the report. `name`: one of PAIRINGS."""
    match name:
        case "ddp":
            return {"ddp": Ddp, "shardwright": shardwright(Strategy(dp=ranks, tp=1, pp=1, zero=0)), "local": Local}
        case "fsdp2":
            return {"fsdp2": Fsdp2, "shardwright": shardwright(Strategy(dp_shard=ranks, dp_replicate=1, tp=1, pp=1, zero=3))}
        case "tp":
            pins = Strategy(dp=1, tp=ranks, pp=1, sequence_parallel=False)
            return {"dtensor tp": DtensorTensorParallel, "shardwright": shardwright(pins)}
        case "pipeline":
            pins = Strategy(dp=1, tp=1, pp=ranks, schedule="1f1b", microbatches=microbatches)
            return {"torch pipelining": TorchPipeline, "shardwright": shardwright(pins, plain=True)}
        case "layouts":  # one tensor axis: Megatron's layouts, pinned, against those that take the least time
            pins = Strategy(dp=1, tp=ranks, pp=1)
            megatron, free = replace(pins, layouts="megatron"), replace(pins, layouts="any")
            return {"megatron's layouts": shardwright(megatron), "shardwright": shardwright(free)}
    raise ValueError(f"there is no pairing {name!r}; known are {', '.join(PAIRINGS)}")


PAIRINGS = ("ddp", "fsdp2", "tp", "pipeline", "layouts")
