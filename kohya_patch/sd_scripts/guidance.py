"""The guidance token in sd-scripts: the features of each image in the last text token."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from freq_loss_plugin import ConfigError, FreqLossConfig
from freq_loss_plugin.guidance_token import features as features_of
from freq_loss_plugin.guidance_token.features import Features, replace_last_token
from freq_loss_plugin.image_folders import SOURCES, find_images

from ..protocols import IMAGES, Batch
from . import image_names
from .trainers import Family, TrainingRun


def check(config: FreqLossConfig, args: argparse.Namespace, family: Family) -> None:
    """Check that the token can be used with this trainer, and that the images have features.

    Looks at names alone, so that it can run before anything is loaded.

    Args:
        config: the options.
        args: sd-scripts' arguments.
        family: of the trainer.

    Raises:
        ConfigError: the token is not defined for this trainer.
        FeatureError: images have no features yet.
    """
    if not family.guidance:
        raise ConfigError(
            f"guidance_token = {config.guidance_token:g}: replaces the last token of one CLIP text encoder, which is "
            f"how SD1.x and SD2.x read text; this trainer is {family.name}, and the method does not say what its "
            "several or other text encoders should be given; set guidance_token = 0"
        )
    if getattr(args, "dataset_class", None):
        return  # its images are known to its own code alone; `TokenGuidance` asks the data set
    images = find_images(**{source: getattr(args, source, None) for source in SOURCES})
    without = features_of.missing(images)
    if without:
        features_of.load(dict.fromkeys(without, 1.0), command(args))


def command(args: argparse.Namespace) -> str:
    """The command that makes the features of this run's images."""
    return features_of.extraction_command({source: getattr(args, source, None) for source in SOURCES})


class TokenGuidance:
    """The features of one run, and how they reach its text tokens.

    Args:
        run: the run in progress; its data sets will name the images of a batch.
        text_width: width of the text encoder's hidden states; None where it is not known.

    Raises:
        FeatureError: features are missing, old, or of another width than the text encoder.
        ConfigError: a data set of the user's own class does not say which images its batches hold.
    """

    def __init__(self, run: TrainingRun, text_width: int | None) -> None:
        shown: dict[Path, float] = {}
        datasets = (*run.datasets, *run.validation_datasets)
        image_names.check(datasets, "guidance_token", "set guidance_token = 0")
        for dataset in datasets:
            for info in dataset.image_data.values():
                times = 0 if info.is_reg else info.num_repeats
                shown[Path(info.absolute_path)] = shown.get(Path(info.absolute_path), 0) + times
        self.features: Features = features_of.load(shown, command(run.args))
        infos = [info for dataset in datasets for info in dataset.image_data.values()]
        by_image = self.features.by_image
        self._by_name = {image_names.name_of(info): by_image[Path(info.absolute_path)] for info in infos}
        if text_width is not None:
            features_of.check_width(self.features, text_width, command(run.args))
        image_names.add_to(datasets)

    def replace_tokens(self, batch: Batch, conds: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The text conditions of a batch with each image's features in their last token; new tensors."""
        states = conds[0]
        if states is None:
            return list(conds)
        features = torch.stack([self._by_name[name] for name in batch[IMAGES]])
        return [replace_last_token(states, features.to(states.device, non_blocking=True)), *conds[1:]]

    @contextlib.contextmanager
    def while_sampling(self, unet: torch.nn.Module) -> Iterator[None]:
        """Give samples the mean of the training images, in the half of the batch that has the prompt."""

        def replace(_: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, Any]:
            states = named["encoder_hidden_states"] if "encoder_hidden_states" in named else arguments[2]
            without, with_prompt = states.tensor_split((states.shape[0] // 2,))
            guided = replace_last_token(with_prompt, self.features.mean[None].to(states.device))
            states = torch.cat([without, guided])
            if "encoder_hidden_states" in named:
                return arguments, {**named, "encoder_hidden_states": states}
            return (*arguments[:2], states, *arguments[3:]), named

        handle = unet.register_forward_pre_hook(replace, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
