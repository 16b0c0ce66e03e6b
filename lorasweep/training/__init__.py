"""Engine, slot, optimizer, checkpoint, prefix cache, evaluation."""
