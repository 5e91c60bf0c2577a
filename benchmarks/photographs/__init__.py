"""A study of imperfect photographs: small diffusion models on the latents of real models' tiny autoencoders."""
