"""LoRA sweeps: see README.md."""
