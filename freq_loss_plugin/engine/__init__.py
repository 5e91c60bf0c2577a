"""A small LoRA trainer for SD1.x and SD2.x on diffusers, peft and accelerate: ``python -m freq_loss_plugin train``.

It is there to see the loss work without sd-scripts, and it is what the experiments of this project run on. It reads the
keys of a kohya TOML and writes kohya's LoRA files; for long or large trainings, use sd-scripts.

Read it in this order: `settings` (the keys), `dataset` (pictures to latents to batches), `model` (checkpoint, LoRA),
`lora_file` (what is written), `training` (one step, saving, resuming), `comparison` and `plots` (what is shown), `demo`
(the embedded model and pictures), `cli`. Nothing outside this package imports it.
"""
