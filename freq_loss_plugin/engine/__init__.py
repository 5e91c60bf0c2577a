"""A small LoRA trainer for SD1.x and SD2.x on diffusers, peft and accelerate: ``python -m freq_loss_plugin train``.

It shows the loss at work without sd-scripts, and the experiments of this project run on it. It reads the keys of a
kohya TOML and writes kohya's LoRA files; for long or large runs, use sd-scripts.

Suggested reading order: `settings` (the keys), `dataset` (images and batches), `model` (checkpoint and LoRA layers),
`run` (from settings to a LoRA file), `trainer` (one training step), `checkpoint` (what is written), `evaluation`,
`tracking`, `interrupt`, `comparison` and `plots` (with and without the loss, side by side), `demo` (the toy model and
its images), `cli`. Nothing outside this package imports it, except `freq_loss_plugin.__main__`.
"""
