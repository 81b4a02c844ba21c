from __future__ import annotations

import copy
import inspect
import warnings
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from fake_engine import PROGRAMS, Bound, Mlp, batch, mesh_of, on_ranks, total_loss

from shardwright.runtime.errors import MismatchError, ShardwrightError
from shardwright.runtime.executor import Executor
from shardwright.runtime.module import ParallelModule
from shardwright.runtime.sharded import ShardedTensor, full_tensor

ALL = sorted(PROGRAMS)


@pytest.fixture(params=ALL)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def wholes(parallel: ParallelModule, of: str = "data") -> dict[str, torch.Tensor]:
    found = {k: p.grad if of == "grad" else p.detach() for k, p in parallel.named_parameters()}
    return {k: full_tensor(x).detach().clone() for k, x in found.items() if x is not None}


def compare(results: list[dict[str, torch.Tensor]], expected: dict[str, torch.Tensor], tolerance: float = 1e-12) -> None:
    seen = set()
    for found in results:
        for key, value in found.items():
            torch.testing.assert_close(value, expected[key], rtol=tolerance, atol=tolerance)
            seen.add(key)
    assert seen == set(expected)


def reference_gradients(name: str, scale: float = 1.0) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model = Mlp()
    loss = total_loss(name, model)
    (loss * scale).backward()
    return loss.detach(), {k: p.grad for k, p in model.named_parameters() if p.grad is not None}


def test_loss_and_gradients_equal_one_device(name: str) -> None:
    loss, gradients = reference_gradients(name)

    def run(parallel: ParallelModule, rank: int) -> Any:
        out = parallel(batch(name, rank))
        assert out.loss.dim() == 0 and out.loss.requires_grad and type(out.loss) is torch.Tensor
        assert all(p.grad is None for p in parallel.parameters())
        out.loss.backward()
        return out.loss.detach(), wholes(parallel, "grad")

    results = on_ranks(name, run)
    assert all(torch.equal(found, results[0][0]) for found, _ in results)
    torch.testing.assert_close(results[0][0], loss, rtol=1e-13, atol=0)
    compare([g for _, g in results], gradients)


def test_a_call_unlike_the_others_is_refused_and_loses_nothing(name: str) -> None:
    _, gradients = reference_gradients(name, 2)

    def run(parallel: ParallelModule, rank: int) -> Any:
        parallel(batch(name, rank)).loss.backward()
        with pytest.raises(MismatchError, match=r"call the model differently") as refused:
            parallel(**{"x": batch(name, rank)}) if rank else parallel(batch(name, rank))
        assert "run forward" not in str(refused.value), "the call is wrong, not the node that ran meanwhile"
        assert refused.value.__cause__ is refused.value.__context__ is None
        parallel(batch(name, rank)).loss.backward()
        return wholes(parallel, "grad")

    compare(on_ranks(name, run), gradients)


@pytest.mark.parametrize("bad", [0, 1])
def test_a_step_that_fails_on_one_rank_before_it_communicates(bad: int) -> None:
    """Its user skips the batch: the rank has taken part in the comparison, counts the step, and may communicate."""

    def run(parallel: ParallelModule, rank: int) -> Any:
        engine: Any = parallel._engine
        forward = tuple(i for i in engine.program.schedule if i.graph == "forward")
        program = replace(engine.program, schedule=forward)
        bound = Bound(program, Executor(program, engine.communicator, "cpu"))
        engine.program_for = lambda *_, **__: bound
        parallel.eval()
        parallel(batch("data", rank))
        if rank == bad:
            bound.flatten = lambda *_: {}  # type: ignore[method-assign]
            with pytest.raises(MismatchError, match="which the call did not give"):
                parallel(batch("data", rank))
        else:
            parallel(batch("data", rank))
        assert engine.communicator.gate is None
        return parallel._calls, full_tensor(parallel.w1)

    assert {calls for calls, _ in on_ranks("data", run)} == {2}


def test_what_a_superseded_run_made_is_gone() -> None:
    """Before the run that takes its place begins."""
    alive: list[list[bool]] = []

    def run(parallel: ParallelModule, rank: int) -> None:
        parallel(batch("data", rank))
        made: list[Any] = []
        found: list[bool] = []
        alive.append(found)
        original = Executor._enter

        def enter(self: Executor, values: list[Any], *rest: Any) -> None:
            found.append(any(ref() is not None for ref in made))
            original(self, values, *rest)
            values.append(torch.zeros(3))
            made.append(weakref.ref(values[-1]))

        engine = parallel._engine
        compile_program = engine.program_for

        def program_for(*args: Any, **kwargs: Any) -> Any:
            bound = compile_program(*args, **kwargs)
            bound.executor._enter = enter.__get__(bound.executor)
            return bound

        engine.program_for = program_for
        with torch.random.fork_rng():
            torch.manual_seed(5 if rank == 0 else 100)
            parallel(batch("data", rank))

    with torch.random.fork_rng():
        torch.manual_seed(100)
        on_ranks("data", run)
    assert sorted(alive, key=len) == [[False], *[[False, False]] * (len(alive) - 1)]


def test_a_new_seed_on_the_first_rank_holds_for_all() -> None:
    """The others have begun to run with the seed of the step before."""
    seeds: list[list[int]] = []

    def run(parallel: ParallelModule, rank: int) -> None:
        found: list[int] = []
        seeds.append(found)
        engine = parallel._engine
        compile_program = engine.program_for

        def program_for(*args: Any, **kwargs: Any) -> Any:
            bound = compile_program(*args, **kwargs)
            execute = bound.executor.run

            def noting(working: Any, inputs: Any, seed: int, **options: Any) -> Any:
                result = execute(working, inputs, seed, **options)
                found.append(seed)
                return result

            bound.executor.run = noting
            return bound

        engine.program_for = program_for
        for step in range(3):
            with torch.random.fork_rng():
                torch.manual_seed(100 if rank or step < 1 else 5)
                parallel(batch("data", rank))

    on_ranks("data", run)
    assert seeds == [[100, 6, 7]] * len(seeds)


def test_scaled_losses_and_accumulation(name: str) -> None:
    _, gradients = reference_gradients(name, 1 / 4 + 8)

    def run(parallel: ParallelModule, rank: int) -> Any:
        (parallel(batch(name, rank)).loss / 4).backward()
        parallel(batch(name, rank)).loss.backward(gradient=torch.tensor(8.0, dtype=torch.float64))
        return wholes(parallel, "grad")

    compare(on_ranks(name, run), gradients)


def test_a_backward_that_is_never_called_leaves_no_gradients(name: str) -> None:
    def run(parallel: ParallelModule, rank: int) -> None:
        parallel(batch(name, rank))
        assert all(p.grad is None for p in parallel.parameters())

    on_ranks(name, run)


@pytest.mark.parametrize("kind", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_on_parameters_are_refused(kind: str) -> None:
    def run(parallel: ParallelModule, rank: int) -> None:
        handle = getattr(next(parallel.parameters()), kind)(lambda x: None)
        with pytest.raises(ShardwrightError, match=r"parameter '\w+' has a gradient hook.*between backward and optimizer\.step"):
            parallel(batch("data", rank))
        handle.remove()
        parallel(batch("data", rank)).loss.backward()

    on_ranks("data", run)


def test_train_step(name: str) -> None:
    loss, gradients = reference_gradients(name)

    def run(parallel: ParallelModule, rank: int) -> Any:
        found = parallel.train_step(x=batch(name, rank))
        assert not found.requires_grad
        torch.testing.assert_close(found, loss, rtol=1e-13, atol=0)
        return wholes(parallel, "grad")

    compare(on_ranks(name, run), gradients)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_three_adamw_steps(name: str, accumulate: int) -> None:
    """Parameters after clipped steps, with and without no_sync(), equal one device's."""
    model = Mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    norms = []
    for step in range(3):
        for k in range(accumulate):
            (total_loss(name, model, accumulate * step + k) / accumulate).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0))
        optimizer.step()
        optimizer.zero_grad()

    def run(parallel: ParallelModule, rank: int) -> Any:
        optimizer = torch.optim.AdamW(parallel.parameters(), lr=0.1)
        for step in range(3):
            for k in range(accumulate - 1):
                with parallel.no_sync():
                    (parallel(batch(name, rank, accumulate * step + k)).loss / accumulate).backward()
            (parallel(batch(name, rank, accumulate * (step + 1) - 1)).loss / accumulate).backward()
            torch.testing.assert_close(parallel.clip_grad_norm_(10.0), norms[step], rtol=1e-12, atol=0)
            optimizer.step()
            optimizer.zero_grad()
        return wholes(parallel)

    compare(on_ranks(name, run), {k: p.detach() for k, p in model.named_parameters()})


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, float("inf")])
def test_gradient_norm(name: str, norm_type: float) -> None:
    model = Mlp()
    total_loss(name, model).backward()
    expected = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()], norm_type)
    clipped = {k: p.grad * 0.5 / expected for k, p in model.named_parameters() if p.grad is not None}

    def run(parallel: ParallelModule, rank: int) -> Any:
        parallel.train_step(batch(name, rank))
        norm = parallel.clip_grad_norm_(0.5, norm_type)
        torch.testing.assert_close(norm, expected, rtol=1e-12, atol=0)
        return wholes(parallel, "grad")

    compare(on_ranks(name, run), clipped, 1e-6)


@pytest.mark.parametrize("foreach", [None, True, False])
def test_torchs_own_clipping_is_right_or_refused(name: str, foreach: bool | None) -> None:
    _, gradients = reference_gradients(name)
    expected = torch.nn.utils.get_total_norm(list(gradients.values()))

    def run(parallel: ParallelModule, rank: int) -> None:
        parallel.train_step(batch(name, rank))
        if name == "data":
            torch.testing.assert_close(torch.nn.utils.clip_grad_norm_(parallel.parameters(), 1.0, foreach=foreach), expected)
        else:
            with pytest.raises(ShardwrightError, match=r"parallel\.clip_grad_norm_"):
                torch.nn.utils.clip_grad_norm_(parallel.parameters(), 1.0, foreach=foreach)

    on_ranks(name, run)


def test_second_backward_is_refused(name: str) -> None:
    def run(parallel: ParallelModule, rank: int) -> None:
        loss = parallel(batch(name, rank)).loss
        loss.backward(retain_graph=True)
        with pytest.raises(ShardwrightError, match="second time"):
            loss.backward()

    on_ranks(name, run)


def test_gradients_of_gradients_are_refused(name: str) -> None:
    def run(parallel: ParallelModule, rank: int) -> None:
        loss = parallel(batch(name, rank)).loss
        with warnings.catch_warnings(), pytest.raises(ShardwrightError, match="create_graph"):
            warnings.simplefilter("ignore")  # torch's own, of the reference cycle that create_graph makes
            loss.backward(create_graph=True)

    on_ranks(name, run)


def test_a_gradient_into_another_output_is_refused() -> None:
    def run(parallel: ParallelModule, rank: int) -> None:
        out = parallel(batch("pipeline", rank))
        if rank == 1:
            with pytest.raises(ShardwrightError, match="output 'y'"):
                (out.loss + out.y.sum()).backward()
            assert all(p.grad is None for p in parallel.parameters())
        out.loss.backward()

    on_ranks("pipeline", run)


def test_evaluation_between_training_steps(name: str) -> None:
    loss, gradients = reference_gradients(name)

    def run(parallel: ParallelModule, rank: int) -> Any:
        with torch.no_grad():
            assert not parallel(batch(name, rank)).loss.requires_grad
        parallel.train_step(batch(name, rank))
        parallel.eval()
        found = parallel(batch(name, rank)).loss
        torch.testing.assert_close(found.detach(), loss, rtol=1e-13, atol=0)
        with pytest.raises(ShardwrightError, match="eval mode"):
            found.backward()
        with pytest.raises(ShardwrightError, match="eval mode"):
            parallel.train_step(batch(name, rank))
        parallel.train()
        return wholes(parallel, "grad")

    compare(on_ranks(name, run), gradients)


def test_gradients_left_unreduced_are_not_stepped_with(name: str) -> None:
    def run(parallel: ParallelModule, rank: int) -> None:
        optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1)
        before = wholes(parallel)
        with parallel.no_sync():
            parallel(batch(name, rank)).loss.backward()
        for act in (optimizer.step, lambda: parallel.clip_grad_norm_(1.0)):
            with pytest.raises(ShardwrightError, match=r"no_sync\(\)"):
                act()
        compare([before], wholes(parallel))
        optimizer.zero_grad()
        assert all(p.grad is None for p in parallel.parameters())

    on_ranks(name, run)


def test_zero_grad_drops_what_no_sync_left(name: str) -> None:
    _, gradients = reference_gradients(name)

    def run(parallel: ParallelModule, rank: int) -> Any:
        optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1)
        for to_none in (True, False):
            with parallel.no_sync():
                parallel(batch(name, rank, 9)).loss.backward()
            optimizer.zero_grad(set_to_none=to_none)
        parallel(batch(name, rank)).loss.backward()
        return wholes(parallel, "grad")

    compare(on_ranks(name, run), gradients)


def test_no_sync_after_a_synchronized_step(name: str) -> None:
    """What was reduced before, and what was not, add up."""
    _, gradients = reference_gradients(name, 3.0)

    def run(parallel: ParallelModule, rank: int) -> Any:
        parallel(batch(name, rank)).loss.backward()
        with parallel.no_sync():
            parallel(batch(name, rank)).loss.backward()
        parallel(batch(name, rank)).loss.backward()
        return wholes(parallel, "grad")

    compare(on_ranks(name, run), gradients)


def test_waiting_for_the_first_call(name: str) -> None:
    """Without example inputs, parameters raise and an optimizer waits; scheduler and steps then are as on one device."""
    model = Mlp()
    plain = torch.optim.Adagrad(model.parameters(), lr=0.2)
    plain_schedule = torch.optim.lr_scheduler.StepLR(plain, 1, 0.5)
    for step in range(2):
        plain.zero_grad()
        total_loss(name, model, step).backward()
        plain.step()
        plain_schedule.step()

    def run(parallel: ParallelModule, rank: int) -> Any:
        with pytest.raises(ShardwrightError, match=r"example_inputs.*parallel\.optimizer\(cls"):
            list(parallel.parameters())
        with pytest.raises(ShardwrightError, match="example_inputs"):
            parallel.state_dict()
        optimizer = parallel.optimizer(torch.optim.Adagrad, lr=0.2)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        for step in range(2):
            optimizer.zero_grad()
            parallel(batch(name, rank, step)).loss.backward()
            optimizer.step()
            schedule.step()
        assert isinstance(optimizer, torch.optim.Adagrad) and optimizer.param_groups[0]["lr"] == 0.05
        return wholes(parallel)

    compare(on_ranks(name, run, wait=True), {k: p.detach() for k, p in model.named_parameters()})


def test_frozen_parameters(name: str) -> None:
    def run(parallel: ParallelModule, rank: int) -> None:
        for p in parallel.parameters():
            p.requires_grad_(False)
        parallel.train_step(batch(name, rank))
        assert all(p.grad is None for p in parallel.parameters())

    on_ranks(name, run)


def test_names_attributes_and_methods(name: str) -> None:
    def run(parallel: ParallelModule, rank: int) -> None:
        own = [k for k, _ in parallel.named_parameters()]
        assert own == (["w1", "w2"] if name != "pipeline" else [["w1"], ["w2"]][rank])
        shapes = {"w1": (5, 6), "w2": (6, 4)}
        assert all(tuple(p.shape) == shapes[k] for k, p in parallel.named_parameters())
        assert parallel.config.width == 6 and parallel.plan == "the plan" and parallel.program.rank == rank
        assert not hasattr(parallel, "no_such_attribute") and hasattr(parallel, "generate")
        with pytest.raises(ShardwrightError, match=r"generate\(\) is a method of Mlp"):
            parallel.generate()
        data = name in ("zero1", "data")
        assert (parallel.data_rank, parallel.data_world_size) == ((rank, 4) if data else (0, 1))
        assert parallel.to("cpu") is parallel and parallel.double() is parallel
        for move in (parallel.float, parallel.half, lambda: parallel.to("meta")):
            with pytest.raises(ShardwrightError, match="Convert the model first"):
                move()

    on_ranks(name, run)


def test_autocast_is_refused(name: str) -> None:
    def run(parallel: ParallelModule, rank: int) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(ShardwrightError, match=r"torch\.autocast"):
            parallel(batch(name, rank))

    on_ranks(name, run)


def test_compiled(name: str) -> None:
    """torch.compile leaves the module as it is: its programs run as ever."""
    loss, gradients = reference_gradients(name)

    def run(parallel: ParallelModule, rank: int) -> Any:
        found = torch.compile(parallel)(batch(name, rank)).loss
        torch.testing.assert_close(found.detach(), loss, rtol=1e-13, atol=0)
        found.backward()
        return wholes(parallel, "grad")

    compare(on_ranks(name, run), gradients)


def test_signature_is_the_models(name: str) -> None:
    assert (
        on_ranks(name, lambda parallel, rank: list(inspect.signature(parallel.forward).parameters))
        == [["x"]] * mesh_of(name).world_size
    )


def test_averaged_weights(name: str) -> None:
    """torch's EMA of the module: a copy with its own parameters that runs the same programs."""
    model = Mlp()
    plain = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for step in range(2):
        optimizer.zero_grad()
        total_loss(name, model, step).backward()
        optimizer.step()
        plain.update_parameters(model)
    loss = total_loss(name, plain.module, 7).detach()

    def run(parallel: ParallelModule, rank: int) -> Any:
        average = torch.optim.swa_utils.AveragedModel(parallel, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
        optimizer = torch.optim.SGD(parallel.parameters(), lr=1e-3)
        for step in range(2):
            optimizer.zero_grad()
            parallel.train_step(batch(name, rank, step))
            optimizer.step()
            average.update_parameters(parallel)
        with torch.no_grad():
            torch.testing.assert_close(average(batch(name, rank, 7)).loss, loss, rtol=1e-12, atol=0)
        return wholes(average.module)

    compare(on_ranks(name, run), {k: p.detach() for k, p in plain.module.named_parameters()})


def test_copies_are_independent(name: str) -> None:
    def run(parallel: ParallelModule, rank: int) -> None:
        other = copy.deepcopy(parallel)
        with torch.no_grad():
            for p in parallel.parameters():
                p.zero_()
        assert all(full_tensor(p).abs().sum() > 0 for p in other.parameters())
        assert all(isinstance(p, ShardedTensor) == (name != "data") for p in other.parameters())

    on_ranks(name, run)
