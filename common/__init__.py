"""What the scripts share. One idea per file; scripts import from here, never from each other."""

import logging
import warnings

# Noise that a user can do nothing about: on some CPUs bitsandbytes asks at import for a kernel package that this
# project does not use, and its paged optimizer says there that a CPU has nothing to page; transformers is
# about to rename what PEFT and older versions of itself call gradient checkpointing.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message="`.*gradient_checkpointing.*` is deprecated", category=FutureWarning)
warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU", category=UserWarning)
