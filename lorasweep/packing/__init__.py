"""Several trials in one pass: fused layer, dropout streams, the pass, its cost."""
