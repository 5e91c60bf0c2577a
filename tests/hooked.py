"""What the tests of the hook share: installing it on a trainer with a stand-in denoiser, and the expected bands."""

from __future__ import annotations

import hosts
import numpy as np
import oracle
import pytest

from kohya_patch.sd_scripts import host
from kohya_patch.sd_scripts.hook import LossHook
from kohya_patch.sd_scripts.trainers import TrainingRun

NAMES = ["sd15", "sdxl", "sd3", "flux", "lumina", "hunyuan_image", "anima"]


ALPHAS = oracle.stable_diffusion_alphas_cumprod()


def install(stand_in, config):
    hook = LossHook(TrainingRun(stand_in.trainer, stand_in.args), config, "networks.lora")
    hook.install()
    return hook


def expected_bands(stand_in, used, *, window=None, mask=None):
    """(L_low, L_high) of a recorded pass by the oracle."""
    name = TrainingRun(stand_in.trainer, stand_in.args).family.name
    prediction, target, timesteps = used
    scale = 1000 if name == "Anima" else 1
    timesteps = [float(t) * scale for t in timesteps]
    prediction_type = {"SD3": "sample", "SD1.x / SD2.x": "epsilon", "SDXL": "epsilon"}.get(name, "flow")
    weights = stand_in.batch["loss_weights"].numpy()
    if window:
        weights = weights * [window[0] <= t < window[1] for t in timesteps]
    return oracle.loss(
        prediction.double().numpy(),
        target.double().numpy(),
        np.zeros(prediction.shape),
        prediction_type=prediction_type,
        timesteps=timesteps,
        alphas_cumprod=ALPHAS,
        weights=weights,
        bands=oracle.wavelet_bands,
        mask=mask,
    )


def needs_module(name):
    """Skip where a module of sd-scripts came with a later version."""
    if name in host.NETWORK_MODULES and not (hosts.sd_scripts() / f"{name.replace('.', '/')}.py").is_file():
        pytest.skip(f"{hosts.SD_SCRIPTS.title(hosts.sd_scripts())} has no {name}")


class NetworkTrainer:
    """Just the outside of sd-scripts' class of that name."""

    def process_batch(self, batch, noise_scheduler, accelerator, args, is_train=True): ...

    def get_noise_pred_and_target(self, args, latents, text_encoder_conds, is_train=True): ...

    def all_reduce_network(self, accelerator, network): ...

    def generate_step_logs(self): ...

    def update_metadata(self, metadata, args): ...

    def train(self, args):
        return TrainingRun.find()
