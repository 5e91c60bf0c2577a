"""The batch of all processes: real processes over gloo against one process with everything."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from freq_loss_plugin import FreqLossConfig
from freq_loss_plugin.training.passes import Pass
from freq_loss_plugin.training.term import FrequencyTerm

SMALL, WIDE = (4, 16, 16), (4, 8, 24)
# For each process the size of its latents and of its batch.
CASES = {
    "two alike": [(SMALL, 2), (SMALL, 2)],
    "uneven": [(SMALL, 3), (SMALL, 1)],
    "two sizes": [(SMALL, 2), (WIDE, 2)],
    "three, of which two alike": [(WIDE, 1), (SMALL, 2), (WIDE, 2)],
}


def latents(place, shape, count):
    generator = torch.Generator().manual_seed(place)
    return torch.randn(2, count, *shape, generator=generator, dtype=torch.float64)


def loss_of(weight, inputs, target, config):
    """The metrics of the term on a model of one parameter per channel, whose gradient is there."""
    term = FrequencyTerm(config, "flow", seed=0)
    passed = Pass(inputs * weight.view(1, -1, 1, 1), target, 400)
    term.plan(len(inputs), torch.rand)
    term.join(passed, torch.zeros((), dtype=torch.float64)).backward()
    return term.settle(1)


def work(rank, case, configs, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=len(case))
    results = []
    for config in configs:
        weight = torch.linspace(0.5, 1.5, 4, dtype=torch.float64).requires_grad_()
        loss = loss_of(weight, *latents(rank, *case[rank]), config)
        dist.all_reduce(weight.grad)  # what trainers do with gradients
        results.append((loss.low, loss.high, weight.grad / len(case)))
    torch.save(results, f"{folder}/{rank}")
    dist.destroy_process_group()


def run(case, configs, folder):
    multiprocessing.spawn(work, (case, configs, str(folder)), nprocs=len(case))
    return [torch.load(folder / str(rank)) for rank in range(len(case))]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_processes_are_one_process_with_the_whole_batch(case, tmp_path):
    configs = [FreqLossConfig(dist_match=1.0, timesteps="own", reduction=reduction) for reduction in ("sum", "mean")]
    found = run(case, configs, tmp_path)
    for index, config in enumerate(configs):
        gradient = 0
        for shape in {shape for shape, _ in case}:
            places = [place for place, (other, _) in enumerate(case) if other == shape]
            inputs, target = torch.cat([latents(place, *case[place]) for place in places], dim=1)
            weight = torch.linspace(0.5, 1.5, 4, dtype=torch.float64).requires_grad_()
            loss = loss_of(weight, inputs, target, config)
            gradient = gradient + weight.grad * len(places) / len(case)
            for place in places:
                assert found[place][index][:2] == pytest.approx((loss.low, loss.high), rel=1e-6)
        for result in found:
            torch.testing.assert_close(result[index][2], gradient)


def test_a_local_scope_is_each_process_by_itself(tmp_path):
    config = FreqLossConfig(dist_match=1.0, timesteps="own", scope="local")
    case = CASES["two alike"]
    found = run(case, [config], tmp_path)
    for place, results in enumerate(found):
        loss = loss_of(
            torch.linspace(0.5, 1.5, 4, dtype=torch.float64, requires_grad=True), *latents(place, *case[place]), config
        )
        assert results[0][:2] == pytest.approx((loss.low, loss.high), rel=1e-6)
    assert found[0][0][0] != pytest.approx(found[1][0][0], rel=1e-3)
