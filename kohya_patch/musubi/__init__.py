"""kohya-ss musubi-tuner: trainers of LoRAs for video models, and for FLUX.2, Qwen-Image, Z-Image and others."""
