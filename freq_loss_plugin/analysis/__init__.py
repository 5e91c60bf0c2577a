"""Spectra, mixing of bands, and figures of both, for ComfyUI's nodes and for validation."""
