"""LoRA sweeps: see README.md."""

import logging

# bitsandbytes, where it is installed, tells at every start of a faster kernel that it does without
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
