"""kohya-ss sd-scripts: seven trainers of LoRAs for images."""
