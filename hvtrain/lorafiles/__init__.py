"""LoRA files: every dialect, and what is done to a file."""
