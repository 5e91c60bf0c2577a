"""The batch of all processes: real processes over gloo against one process with everything."""

from __future__ import annotations

from datetime import timedelta

import forks
import pytest
import torch
import torch.distributed as dist

from freq_loss_plugin import FreqLossConfig
from freq_loss_plugin.training.distributed import gather
from freq_loss_plugin.training.passes import Pass
from freq_loss_plugin.training.term import FrequencyTerm
from freq_loss_plugin.training.timesteps import Draws

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
    term.plan()
    term.join(passed, torch.zeros((), dtype=torch.float64)).backward()
    return term.settle(1)


def meet(rank, count, folder):
    """A process that waits for nothing longer than a minute: what hangs fails."""
    address = f"file://{folder}/meet"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=count, timeout=timedelta(minutes=1))


def work(rank, case, configs, folder):
    torch.set_num_threads(1)
    meet(rank, len(case), folder)
    results = []
    for config in configs:
        weight = torch.linspace(0.5, 1.5, 4, dtype=torch.float64).requires_grad_()
        loss = loss_of(weight, *latents(rank, *case[rank]), config)
        dist.all_reduce(weight.grad)  # what trainers do with gradients
        results.append((loss.low, loss.high, weight.grad / len(case)))
    torch.save(results, f"{folder}/{rank}")
    dist.destroy_process_group()


def run(case, configs, folder):
    forks.spawn(work, (case, configs, str(folder)), len(case))
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


# For each process and batch the size of its latents, and the timestep that its distribution gives for that size:
# both inside the window, only one, the other one, none, both at one size.
BATCHES = [
    [(SMALL, 400), (WIDE, 500)],
    [(SMALL, 400), (WIDE, 700)],
    [(WIDE, 100), (SMALL, 300)],
    [(WIDE, 900), (SMALL, 900)],
    [(SMALL, 250), (SMALL, 250)],
]


def share(rank, balance, folder):
    """Batches of ``shared`` whose processes do not agree on the window, with all that is carried between batches."""
    torch.set_num_threads(1)
    meet(rank, 2, folder)
    config = FreqLossConfig(dist_match=1.0, timesteps="shared", gradient_ratio=0.1, balance=balance)
    seed = gather([11, 12][rank])[0]  # as the hook takes it
    term = FrequencyTerm(config, "flow", seed=seed, process=rank)
    totals = []
    for number, batch in enumerate(BATCHES):
        shape, timestep = batch[rank]
        weight = torch.ones(4, requires_grad=True)
        inputs, target = (values.float() for values in latents(10 * number + rank, shape, 2))
        assert term.plan().chooses
        # A size that lies outside has a distribution that does, since `shared` draws until it is there.
        timesteps = term.choose(Draws(torch.zeros(2), lambda count: torch.full((count,), timestep), shape[1:]))  # noqa: B023
        passed = Pass(inputs * weight.view(1, -1, 1, 1), target, timesteps)
        balanced = term.balance(passed)
        base = (balanced.prediction - target).square().mean()
        term.join(passed, base).backward()
        dist.all_reduce(weight.grad)
        totals.append(term.settle(number + 1).total)
    torch.save((totals, term.state_dict(), seed), f"{folder}/{rank}")
    dist.destroy_process_group()


@pytest.mark.parametrize("balance", ["off", "band"])
def test_no_process_waits_for_one_without_a_term_and_what_is_carried_on_is_the_same(balance, tmp_path):
    forks.spawn(share, (balance, str(tmp_path)), 2)
    first, second = (torch.load(tmp_path / str(rank)) for rank in range(2))
    inside = [[200 <= timestep < 600 for _, timestep in batch] for batch in BATCHES]
    assert [[total > 0 for total in totals] for totals in zip(first[0], second[0], strict=True)] == inside
    assert first[1].keys() == second[1].keys() >= {"gradient_ratio.averages"}
    for name, value in first[1].items():
        assert torch.equal(value, second[1][name])
    assert first[2] == second[2] == 11


def test_a_state_is_a_copy():
    config = FreqLossConfig(dist_match=1.0, timesteps="own", gradient_ratio=0.1, balance="timestep")
    term = FrequencyTerm(config, "flow", seed=0)

    def step(number):
        prediction = torch.randn(2, 4, 16, 16, requires_grad=True)
        term.plan()
        passed = Pass(prediction, torch.zeros(2, 4, 16, 16), torch.tensor([300.0, 400.0]))
        term.balance(passed)
        term.join(passed, prediction.square().mean())
        term.settle(number)

    step(1)
    saved = term.state_dict()
    before = {name: value.clone() for name, value in saved.items()}
    resumed = FrequencyTerm(config, "flow", seed=0)
    assert resumed.load_state_dict(saved) == []
    step(2)
    for name, value in before.items():
        assert torch.equal(saved[name], value)
        assert torch.equal(resumed.state_dict()[name], value)
        assert not torch.equal(term.state_dict()[name], value)


def test_a_balance_of_the_other_mode_begins_anew_and_says_so():
    terms = [FrequencyTerm(FreqLossConfig(dist_match=0, balance=mode), "flow", seed=0) for mode in ("timestep", "band")]
    assert terms[1].load_state_dict(terms[0].state_dict()) == ["balance"]
    assert terms[0].load_state_dict(terms[0].state_dict()) == []
