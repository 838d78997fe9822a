"""What a run will need, before it runs: tokens, legal degrees, memory by
component, floating-point operations."""
