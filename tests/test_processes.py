"""The batch of all processes: real processes over gloo against one process with everything."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from freq_loss_plugin import FreqLossConfig, frequency_matching_loss

SMALL, WIDE = (4, 16, 16), (4, 8, 24)
# For each process the size of its latents and of its batch.
CASES = {
    "two alike": [(SMALL, 2), (SMALL, 2)],
    "uneven": [(SMALL, 3), (SMALL, 1)],
    "two sizes": [(SMALL, 2), (WIDE, 2)],
    "three, of which two alike": [(WIDE, 1), (SMALL, 2), (WIDE, 2)],
}


def pictures(place, shape, count):
    generator = torch.Generator().manual_seed(place)
    return torch.randn(2, count, *shape, generator=generator, dtype=torch.float64)


def loss_of(weight, inputs, target, config):
    """A model of one parameter per channel."""
    return frequency_matching_loss(
        inputs * weight.view(1, -1, 1, 1),
        target,
        prediction_type="flow",
        timesteps=400,
        config=config,
        across_processes=True,
    )


def work(rank, case, configs, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=len(case))
    results = []
    for config in configs:
        weight = torch.linspace(0.5, 1.5, 4, dtype=torch.float64).requires_grad_()
        loss = loss_of(weight, *pictures(rank, *case[rank]), config)
        loss.total.backward()
        dist.all_reduce(weight.grad)  # what trainers do with gradients
        results.append((loss.low.item(), loss.high.item(), weight.grad / len(case)))
    torch.save(results, f"{folder}/{rank}")
    dist.destroy_process_group()


def run(case, configs, folder):
    multiprocessing.spawn(work, (case, configs, str(folder)), nprocs=len(case))
    return [torch.load(folder / str(rank)) for rank in range(len(case))]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_processes_are_one_process_with_the_whole_batch(case, tmp_path):
    configs = [FreqLossConfig(dist_match=1.0, reduction=reduction) for reduction in ("sum", "mean")]
    found = run(case, configs, tmp_path)
    for index, config in enumerate(configs):
        gradient = 0
        for shape in {shape for shape, _ in case}:
            places = [place for place, (other, _) in enumerate(case) if other == shape]
            inputs, target = torch.cat([pictures(place, *case[place]) for place in places], dim=1)
            weight = torch.linspace(0.5, 1.5, 4, dtype=torch.float64).requires_grad_()
            loss = loss_of(weight, inputs, target, config)
            loss.total.backward()
            gradient = gradient + weight.grad * len(places) / len(case)
            for place in places:
                assert found[place][index][:2] == pytest.approx((loss.low.item(), loss.high.item()), rel=1e-9)
        for result in found:
            torch.testing.assert_close(result[index][2], gradient)


def test_a_local_scope_is_each_process_by_itself(tmp_path):
    config = FreqLossConfig(dist_match=1.0, scope="local")
    case = CASES["two alike"]
    found = run(case, [config], tmp_path)
    for place, results in enumerate(found):
        loss = loss_of(torch.linspace(0.5, 1.5, 4, dtype=torch.float64), *pictures(place, *case[place]), config)
        assert results[0][:2] == pytest.approx((loss.low.item(), loss.high.item()), rel=1e-9)
    assert found[0][0][0] != pytest.approx(found[1][0][0], rel=1e-3)
