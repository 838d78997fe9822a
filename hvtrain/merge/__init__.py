"""LoRAs and slices into one LoRA or one model."""
