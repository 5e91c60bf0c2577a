"""The equations, in plain torch; nothing here knows a TOML, a trainer or a file.

Read it in this order: `bands` (what they are), `operators` (how they are computed), `latents` (how a prediction becomes
a clean latent), `sample_weights`, `reference` (the loss, to be read), `matching` and `energies` (the same, to be run).
"""
