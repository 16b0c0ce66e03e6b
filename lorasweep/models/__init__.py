"""The frozen base: load, quantise, target modules, layers."""
