r"""What is measured on a trained LoRA. Fixed before any arm was trained; see plan.md.

- validation error at (timestep, band): the mean square of the band of prediction - target, on latents of images that
  were not trained on, divided by that of the base model. ``validation`` is the geometric mean of all.
- what samples show: see the worlds' ``judge``.
- spectrum low, high: log-spectral distances in dB to real images (`freq_loss_plugin.analysis.spectra`); both have been
  through the VAE. The bands meet at a period of 32 pixels, as those of the loss do on latents.
- kernel distance: the unbiased squared maximum mean discrepancy with the kernel (x·y/d + 1)³ between features of
  samples and of real images, times 1000. Source: Binkowski et al. 2018, arXiv 1801.01401.
- fidelity: the cosine similarity of the features of a sample and of the true image of its caption.
- color error: the distance of their mean colors, 0..1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from assets.make_tiny_flow.features import features_of
from freq_loss_plugin.analysis.spectra import compare_spectra
from freq_loss_plugin.loss.params import BandSpec

from .world import Captioned, Trainee, World

PROMPTS, REAL = 24, 256
TIMESTEPS = tuple(range(50, 1000, 100))
BANDS = ("low", "high")
# A period of 32 pixels is 2^5, and the low band ends at 2^-(J+1) cycles per pixel: J = 4.
_PIXEL_BANDS = BandSpec(levels=4)
# Name to guidance and strength of the LoRA.
SETTINGS = {"": (3.0, 1.0), ", guidance 1": (1.0, 1.0), ", strength 0.7": (3.0, 0.7)}


class Reference(NamedTuple):
    """What the samples of a world are compared with.

    Attributes:
        prompts: what is sampled.
        latents: of the true images of the prompts.
        true: these images after the VAE.
        real: other images of the style after the VAE.
        features: of ``real``.
        true_features: of ``true``.
        errors: of the base model, by timestep and band.
    """

    prompts: list[Captioned]
    latents: Tensor
    true: Tensor
    real: Tensor
    features: Tensor
    true_features: Tensor
    errors: dict[str, float]


def make_reference(world: World, device: torch.device) -> Reference:
    """Made with a LoRA that has not been trained and changes nothing."""
    trainee = world.new(0, device)
    prompts = world.prompts(PROMPTS)
    latents = trainee.encode(torch.stack([each.pixels for each in prompts]))
    true, real = trainee.decode(latents), trainee.decode(trainee.encode(world.real(REAL)))
    errors = _errors(trainee, latents, [each.caption for each in prompts])
    return Reference(prompts, latents, true, real, features_of(real), features_of(true), errors)


def validate(trainee: Trainee, reference: Reference) -> dict[str, float]:
    """Validation errors relative to the base model."""
    captions = [each.caption for each in reference.prompts]
    ratios = {
        f"validation {name}": error / reference.errors[name]
        for name, error in _errors(trainee, reference.latents, captions).items()
    }
    mean = torch.tensor(list(ratios.values()), dtype=torch.float64).log().mean().exp()
    return {"validation": float(mean), **ratios}


def measure(world: World, trainee: Trainee, reference: Reference) -> tuple[dict[str, float], Tensor]:
    """All measures, and the samples at guidance 3 and full strength."""
    measured = validate(trainee, reference)
    captions = [each.caption for each in reference.prompts]
    kept = None
    for name, (guidance, strength) in SETTINGS.items():
        samples = trainee.sample(captions, guidance=guidance, strength=strength)
        kept = samples if kept is None else kept
        measured |= {f"{key}{name}": value for key, value in _of_samples(world, samples, reference).items()}
    assert kept is not None
    return measured, kept


def _of_samples(world: World, samples: Tensor, reference: Reference) -> dict[str, float]:
    features = features_of(samples)
    spectra = compare_spectra(samples, reference.real, _PIXEL_BANDS).bands
    colors = samples.mean(dim=(2, 3)) - reference.true.mean(dim=(2, 3))
    return {
        **world.judge(samples, reference.prompts),
        **{f"spectrum {band.name}": band.distance for band in spectra},
        "kernel distance": kernel_distance(features, reference.features),
        "fidelity": float(F.cosine_similarity(features, reference.true_features).mean()),
        "color error": float(colors.norm(dim=1).mean()),
    }


def kernel_distance(ours: Tensor, theirs: Tensor) -> float:
    """See above; features of shape (n, d) and (m, d)."""
    ours, theirs = ours.double(), theirs.double()

    def kernel(one: Tensor, other: Tensor) -> Tensor:
        return (one @ other.T / one.shape[1] + 1) ** 3

    def within(features: Tensor) -> Tensor:
        matrix, count = kernel(features, features), len(features)
        return (matrix.sum() - matrix.diagonal().sum()) / (count * (count - 1))

    return 1000 * float(within(ours) + within(theirs) - 2 * kernel(ours, theirs).mean())


@torch.no_grad()
def _errors(trainee: Trainee, latents: Tensor, captions: list[str]) -> dict[str, float]:
    errors = {}
    for timestep in TIMESTEPS:
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(timestep)).to(latents.device)
        at = torch.full((len(latents),), timestep, device=latents.device)
        prediction, target = trainee.predict(latents, at, noise, captions)
        for name, band in zip(BANDS, BandSpec().split(prediction - target), strict=True):
            errors[f"{timestep} {name}"] = float(band.square().mean())
    return errors
