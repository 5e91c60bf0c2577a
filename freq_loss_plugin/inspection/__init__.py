"""``python -m freq_loss_plugin inspect``: what is wrong with training images, before anything is trained."""
