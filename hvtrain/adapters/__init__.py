"""LoRA: layers, files in every dialect, and the merger."""
