"""What a merge that reconciles will need: its own code, on tensors without values."""
