"""Memory estimate on the meta device; what happens when memory runs out."""
