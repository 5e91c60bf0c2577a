"""Every option of the loss: its name, its default, what it may be, and what it means to leave it alone.

The keys are the ones that people write in a kohya TOML. They are read here, checked here, and nowhere else.
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

from ..loss.bands import METHODS, Method
from ..loss.latents import NUM_TRAIN_TIMESTEPS, PredictionType
from ..loss.params import BandSpec, LossSpec, Reduction, SampleWeighting
from ..version import __version__
from . import image_rules, keys
from .fields import ConfigError, check_options, key_of, option, wrong_value
from .image_rules import ImageRules
from .keys import PREFIX

Timesteps = Literal["unified", "shared", "own"]
Balance = Literal["off", "timestep", "band"]
ImageQuality = Literal["off", "auto"]

_option = functools.partial(option, prefix=PREFIX)


@dataclass(frozen=True)
class FreqLossConfig:
    r"""All options of the frequency distribution-matching loss, validated when made.

    .. math:: loss = base + dist\_match \cdot (low\_weight \cdot L_{low} + high\_weight \cdot L_{high})

    A field is called like its TOML key without ``freq_loss_``. `from_mapping` reads a TOML or an argparse namespace.

    Raises:
        ConfigError: a value of the wrong type or outside its range, or two options that contradict each other.

    Example:
        >>> config = FreqLossConfig.from_mapping({"dist_match": 0.01, "freq_loss_method": "fft"})
        >>> config.method, config.low_weight
        ('fft', 0.7)
    """

    dist_match: float = _option(
        0.003, "weight of the whole frequency term in the loss; 0 turns it off", key="dist_match"
    )
    method: Method = _option("wavelet", "how the bands are made", choices=METHODS)
    wavelet: str = _option("db3", "any discrete wavelet of PyWavelets; used by method wavelet")
    levels: int = _option(2, "wavelet levels J, at least 1, with 2^J at most the smaller latent side")
    cutoff: float = _option(0.25, "radius of the low band as a fraction of min(H, W), at most 0.5; used by method fft")
    low_weight: float = _option(0.7, "weight of the low band, at least 0")
    high_weight: float = _option(0.3, "weight of the high band, at least 0")
    timesteps: Timesteps = _option(
        "unified",
        "unified: one extra pass at one timestep for the whole batch; shared: batches inside the window share a "
        "timestep, no extra pass; own: the base pass's own timesteps",
        choices=get_args(Timesteps),
    )
    min_timestep: int = _option(200, "first timestep of the window, on the scale 0..1000")
    max_timestep: int = _option(600, "end of the window, exclusive, on the scale 0..1000")
    sample_weights: SampleWeighting = _option(
        "none", "weight of each sample in the batch sum", choices=get_args(SampleWeighting)
    )
    reduction: Reduction = _option(
        "sum", "sum over the batch (the formula), or mean (does not grow with the batch)", choices=get_args(Reduction)
    )
    gradient_ratio: float = _option(
        0.0,
        "target ratio of the norm of the term's gradient to that of the base loss, measured at the model's output; "
        "dist_match then only turns the term on; 0 is off",
    )
    grad_cosine: bool = _option(False, "log the cosine between the term's and the base loss's gradient")
    validation: bool = _option(
        False, "when the trainer validates, log the bands and the spectrum of the validation images"
    )
    balance: Balance = _option(
        "off",
        "weigh the base loss by the running mean loss of its noise level (timestep), or of its noise level and band "
        "(band), to the power -balance_power",
        choices=get_args(Balance),
    )
    balance_power: float = _option(0.5, "how strongly balance acts, above 0 and at most 1; 0.5 balances halfway")
    image_quality: ImageQuality = _option(
        "off",
        "auto: measure the training images; restore the latents of those that are blurred, enlarged, noisy or "
        "compressed, and train them only at the noise levels at which what remains cannot be seen",
        choices=get_args(ImageQuality),
    )
    image_quality_threshold: float = _option(
        0.02,
        "how far what remains of a defect may lead a model astray, as a fraction of the squared error that it makes "
        "anyway, above 0 and at most 1; lower is stricter",
    )
    image_rules: ImageRules | None = _option(
        None, "what is known of folders of images; see docs/image-quality.md", key=image_rules.KEY
    )
    guidance_token: float = _option(
        0.0, "above 0 or true: the CLIP features of each image replace the last text token", key="guidance_token"
    )
    network_module: str | None = _option(None, "the network module to train; the trainer's own LoRA where left out")
    min_snr_gamma: float = _option(
        5.0, "gamma of sample_weights min_snr; this is the trainer's own option", key="min_snr_gamma"
    )

    def __post_init__(self) -> None:
        # As in the published code of the method, any positive number just means "on"; true says so, too.
        if isinstance(self.guidance_token, bool):
            object.__setattr__(self, "guidance_token", float(self.guidance_token))
        check_options(self)
        image_rules.check_rules(self.image_rules or {})
        self._check_ranges()
        self._check_bands()

    @property
    def enabled(self) -> bool:
        """False where ``dist_match`` is 0: nothing is added to the loss."""
        return self.dist_match > 0

    @property
    def balanced(self) -> bool:
        """Whether the base loss is weighed by `freq_loss_plugin.training.loss_balance`."""
        return self.balance != "off"

    @property
    def gated(self) -> bool:
        """Whether some images train only above a noise level; see `freq_loss_plugin.image_quality`."""
        return self.image_quality == "auto" or bool(self.image_rules)

    @property
    def changes_training(self) -> bool:
        """Whether a term is added to the base loss, the base loss is weighed, or timesteps are drawn again."""
        return self.enabled or self.balanced or self.gated

    def without_effect(self) -> FreqLossConfig:
        """The same with everything off that changes training, but for the guidance token."""
        off = FreqLossConfig.image_quality_threshold
        return replace(
            self, dist_match=0.0, balance="off", image_quality="off", image_quality_threshold=off, image_rules=None
        )

    @property
    def guided(self) -> bool:
        """Whether the features of each image replace the last text token."""
        return self.guidance_token > 0

    @property
    def resolved_method(self) -> Method:
        """The method that will run: fft where pytorch_wavelets cannot be imported."""
        return self.bands.resolved_method

    @classmethod
    def fields_by_key(cls) -> dict[str, str]:
        """TOML key -> field name, in the order of the table in docs/options.md."""
        return {key_of(each): each.name for each in fields(cls)}

    @classmethod
    def claims(cls, key: str) -> bool:
        """Whether ``key`` is, or by its looks was meant to be, an option of this loss and not one of the trainer."""
        return keys.claims(key, _own_keys())

    @classmethod
    def check_section(cls, section: Mapping[str, Any]) -> None:
        """Raise ConfigError for the first key of a ``[freq_loss]`` section that is not an option."""
        keys.check_section(section, list(cls.fields_by_key()), _own_keys())

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any] | argparse.Namespace) -> FreqLossConfig:
        """Read the options out of a TOML table or of the arguments of a trainer.

        Args:
            mapping: TOML keys to values, flat or in sections, which are flattened one level as sd-scripts does. Keys of
                the trainer are passed over; in the section ``freq_loss`` every key must be known.

        Raises:
            ConfigError: an unknown key that begins with ``freq_loss_`` or looks like one of ours, an unknown key in the
                section, a key given twice with different values, or an invalid value.
        """
        values = vars(mapping) if isinstance(mapping, argparse.Namespace) else mapping
        flat = keys.flat_options(values, list(cls.fields_by_key()), _own_keys())
        # None is how an argument parser says "not given"; so is a trainer's min_snr_gamma of 0.
        given = {name: flat[key] for key, name in cls.fields_by_key().items() if flat.get(key) is not None}
        if given.get("min_snr_gamma") == 0:
            del given["min_snr_gamma"]
        return cls(**given)

    @functools.cached_property
    def bands(self) -> BandSpec:
        """How the loss splits latents."""
        return BandSpec(self.method, self.wavelet, self.levels, self.cutoff)

    @functools.cached_property
    def loss_spec(self) -> LossSpec:
        """What the equations take. Only ``own`` has a window of its own there: the other modes choose the timesteps."""
        return LossSpec(
            bands=self.bands,
            dist_match=self.dist_match,
            low_weight=self.low_weight,
            high_weight=self.high_weight,
            reduction=self.reduction,
            sample_weighting=self.sample_weights,
            min_snr_gamma=self.min_snr_gamma,
            window=(self.min_timestep, self.max_timestep) if self.timesteps == "own" else None,
        )

    def check_size(self, height: int, width: int) -> None:
        """Raise ConfigError where latents of H×W are too small for the wavelet levels (2^J > min(H, W))."""
        try:
            self.bands.check_size(height, width, key="freq_loss_levels")
        except ValueError as error:
            raise ConfigError(str(error)) from None

    def metadata(self) -> dict[str, str]:
        """Every option as ``ss_freq_loss_*`` strings, for the header of a safetensors file."""
        return {f"ss_freq_loss_{each.name}": str(getattr(self, each.name)) for each in fields(self)}

    def file_metadata(self, network_module: str) -> dict[str, str]:
        """What a file trained with these options says of them: `metadata`, and what became of it in this run.

        Args:
            network_module: the module that made the network.
        """
        return {
            **self.metadata(),
            "ss_freq_loss_network_module": network_module,
            "ss_freq_loss_resolved_method": self.resolved_method,
            "ss_freq_loss_version": __version__,
        }

    def check_model(self, prediction_type: PredictionType, *, zero_terminal_snr: bool = False) -> None:
        """Raise ConfigError where the options are not defined for what the model predicts.

        Args:
            prediction_type: see `freq_loss_plugin.loss.latents`.
            zero_terminal_snr: whether alpha_bar is 0 at the last timestep (Lin et al. 2023, arXiv 2305.08891).
        """
        if self.sample_weights == "min_snr" and prediction_type not in ("epsilon", "v_prediction"):
            raise ConfigError(
                "freq_loss_sample_weights = 'min_snr': defined for epsilon and v-prediction, and this model predicts "
                f"{prediction_type!r}; set freq_loss_sample_weights = 'none'"
            )
        last = NUM_TRAIN_TIMESTEPS - 1
        if zero_terminal_snr and prediction_type == "epsilon" and self.max_timestep > last:
            raise ConfigError(
                f"freq_loss_max_timestep = {self.max_timestep} with zero_terminal_snr and epsilon prediction: at "
                f"t = {last} there is no signal left to recover a latent from; set freq_loss_max_timestep = {last} or "
                "less, or train with v_parameterization"
            )

    def _check_ranges(self) -> None:
        for name in ("dist_match", "low_weight", "high_weight", "gradient_ratio", "guidance_token"):
            if not (0 <= getattr(self, name) < math.inf):
                raise wrong_value(self, name, "a finite number >= 0")
        for name in ("balance_power", "image_quality_threshold"):
            if not 0 < getattr(self, name) <= 1:
                raise wrong_value(self, name, "a number above 0 and at most 1")
        if not 0 < self.min_snr_gamma < math.inf:
            raise wrong_value(self, "min_snr_gamma", "a finite number > 0; 5 is usual")
        for name in ("min_timestep", "max_timestep"):
            if not 0 <= getattr(self, name) <= NUM_TRAIN_TIMESTEPS:
                raise wrong_value(self, name, f"a whole number from 0 to {NUM_TRAIN_TIMESTEPS}")
        if self.min_timestep >= self.max_timestep:
            raise ConfigError(
                f"freq_loss_min_timestep = {self.min_timestep} and freq_loss_max_timestep = {self.max_timestep}: "
                "the window is empty; the first must be smaller than the second (200 and 600 are the defaults)"
            )

    def _check_bands(self) -> None:
        try:
            _ = self.bands
        except ValueError as error:
            raise ConfigError(f"{PREFIX}{error}") from None


def _own_keys() -> list[str]:
    return [key for key in FreqLossConfig.fields_by_key() if key != "min_snr_gamma"]
