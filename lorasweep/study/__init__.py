"""Queue, leases, storage, results, repeats, significance, the answer."""
