"""Files of weights, whatever their container and names."""
