"""Worker, plan, launchers, resume, check, cleanup."""
