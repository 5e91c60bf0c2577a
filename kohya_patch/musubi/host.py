"""Everything that is assumed of musubi-tuner, in one place.

Its trainers have seams for extensions: methods of `NetworkTrainer` that the training loop calls and that are replaced
on the running object. They are internal ("no API stability guarantees"), so each is checked before it is used.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..host import Host

MUSUBI = Host(
    "musubi-tuner",
    "Tested with 0.3.4 (commit 30c658c), main of 2026-08-13 (e0cbd8f) and dev of 2026-08-14 (4d3ddce)",
    ("networks.lora_flux_2", "networks.lora_wan"),
    depth=3,  # src/musubi_tuner/training
)
PACKAGE = "musubi_tuner"

# A local variable of ``train``; there is no validation.
DATASET_GROUPS = ("train_dataset_group",)

# Methods that the hook replaces on the running trainer, with the parameters that it reads.
METHODS: Mapping[str, tuple[str, ...]] = {
    "process_batch": ("args", "accelerator", "batch", "latents", "noise_scheduler", "dit_dtype", "transformer"),
    "get_noisy_model_input_and_timesteps": ("args", "noise", "latents", "timesteps", "noise_scheduler", "device"),
    "call_dit": ("args", "accelerator", "latents", "batch", "noise", "noisy_model_input", "timesteps", "network_dtype"),
    "compute_loss": ("args", "output", "timesteps"),
    "on_train_start": ("args", "optimizer"),
    "on_post_optimizer_step": ("sync_gradients",),
    "extra_metadata": ("args",),
    "extra_step_logs": ("args", "logs"),
    "train": ("args",),
}
# What image quality needs beyond that.
QUALITY_METHODS: Mapping[str, tuple[str, ...]] = {
    "load_vae": ("args", "vae_dtype", "vae_path"),
    "scale_shift_latents": ("latents",),
}
# Attributes of a data set's batch manager, by which the images of a batch are known.
MANAGER_ATTRIBUTES = ("buckets", "bucket_batch_indices", "batch_size")
# Where a data source has its files: lists of those in a folder, or what the lines of a JSONL call them.
SOURCE_LISTS = ("image_paths", "video_paths")
SOURCE_KEYS = ("image_path", "video_path")

# ``timestep_sampling`` that takes its timesteps from a schedule: t = 1000·sigma. All others return 1000·sigma + 1.
SCHEDULED = "sigma"
