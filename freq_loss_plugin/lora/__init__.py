"""LoRA files: their metadata, their weights in kohya's format, and LoRAs beside the layers of a model."""
