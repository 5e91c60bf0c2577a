r"""The arms of the study: what is added to plain MSE, in which pass, and how strongly.

Arms of this project (``wavelet``, ``fft``, ``no split``) train with `freq_loss_plugin.training.term.FrequencyTerm`, as
every trainer does. The others put a statistic of `terms` in its place. With a ``gradient_ratio`` the gradient of the
term is scaled to that ratio of the base loss's gradient, both at the model's output
(`freq_loss_plugin.training.gradient_balance`); otherwise the term is added as it is.

- no split      the loss without bands: mean((sum_i x0_hat_i - x0_i)²)
- control       plain MSE per sample, weighted by timestep as the loss is
- placebo       MSE in an orthonormal Haar basis: by Parseval's theorem plain MSE itself, for a tenth of the base loss
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from terms import Statistic, StatisticTerm, mmd, moments, published, spectrum, weighted_mse
from torch import Tensor

from freq_loss_plugin import FreqLossConfig
from freq_loss_plugin.training.term import FrequencyTerm

PLACEBO = "placebo: MSE in a Haar basis"


def mse(prediction: Tensor, target: Tensor) -> Tensor:
    """Plain MSE, the base loss of every arm but one."""
    return (prediction - target).square().mean()


def haar_mse(prediction: Tensor, target: Tensor) -> Tensor:
    """The mean squared coefficients of the residual in an orthonormal Haar basis of two levels, which is plain MSE."""
    low, total = prediction - target, torch.zeros((), device=prediction.device)
    for _ in range(2):
        rows = low[..., ::2, :] + low[..., 1::2, :], low[..., ::2, :] - low[..., 1::2, :]
        low, *details = [(half[..., ::2] + sign * half[..., 1::2]) / 2 for half in rows for sign in (1, -1)]
        total = total + sum(detail.square().sum() for detail in details)
    return (total + low.square().sum()) / prediction.numel()


def placebo_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Plain MSE, a tenth of it in a Haar basis."""
    return 0.9 * mse(prediction, target) + 0.1 * haar_mse(prediction, target)


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        name: as in the tables.
        config: of the term; with ``dist_match`` = 0 there is none.
        statistic: what takes the place of the frequency term, or None.
        base_loss: of prediction and target.
        length: optimizer steps, as a multiple of those of the other arms.
    """

    name: str
    config: FreqLossConfig = FreqLossConfig(dist_match=0.0)
    statistic: Statistic | None = None
    base_loss: Callable[[Tensor, Tensor], Tensor] = mse
    length: int = 1

    def new_term(self, seed: int, clean: Callable[[], Tensor]) -> FrequencyTerm | StatisticTerm:
        """What this arm adds to its base loss in a run with ``seed``; ``clean`` returns x0 of the current batch."""
        if self.statistic is None:
            return FrequencyTerm(self.config, "epsilon", seed=seed)
        return StatisticTerm(self.config, self.statistic, clean, seed=seed)


def all_arms() -> dict[str, Arm]:
    """Every arm, by name, plain MSE first."""
    tenth = FreqLossConfig(dist_match=1.0, gradient_ratio=0.1)
    arms = [
        Arm("plain MSE"),
        Arm("plain MSE, twice the steps", length=2),
        Arm(PLACEBO, base_loss=placebo_loss),
        Arm("control: weighted MSE, 10%", tenth, weighted_mse),
        Arm("wavelet, 0.003", FreqLossConfig(dist_match=0.003)),
        Arm("fft, 0.003", FreqLossConfig(dist_match=0.003, method="fft")),
        *(
            Arm(f"{method}, {ratio:.0%}", replace(tenth, method=method, gradient_ratio=ratio))
            for method in ("wavelet", "fft")
            for ratio in (0.05, 0.1, 0.2)
        ),
        Arm("no split, 10%", replace(tenth, method="fft", low_weight=0.5, high_weight=0.5)),
        Arm("wavelet shared, 10%", replace(tenth, timesteps="shared")),
        Arm("moments, 10%", tenth, moments),
        Arm("spectrum, 10%", tenth, spectrum),
        Arm("mmd, 10%", tenth, mmd),
    ]
    own = replace(tenth, timesteps="own")
    for name, statistic in published().items():
        arms += [
            Arm(f"{name}, as published", replace(own, gradient_ratio=0.0), statistic),
            Arm(f"{name}, 10%", own, statistic),
        ]
    return {arm.name: arm for arm in arms}
