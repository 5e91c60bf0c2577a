"""Training of the toy model in `assets/tiny_sd` from scratch; see `assets/train_tiny_sd.py`."""
