"""The search space; samplers and pruners."""
