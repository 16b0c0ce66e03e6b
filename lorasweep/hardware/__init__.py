"""Device, matmul peak, energy, system metrics."""
