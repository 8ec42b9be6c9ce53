"""What the scripts share. One idea per file; scripts import from here, never from each other."""

import gc
import logging
import os
import warnings

# Noise that a user can do nothing about: on some CPUs bitsandbytes asks at import for a kernel package that this
# project does not use, and its paged optimizer says there that a CPU has nothing to page; transformers is
# about to rename what PEFT and older versions of itself call gradient checkpointing.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message="`.*gradient_checkpointing.*` is deprecated", category=FutureWarning)
warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU", category=UserWarning)

# Imports and SQuAD's questions make millions of objects that stay, and each collection looks at them all: with Python's
# own thresholds that is a quarter of a start.
gc.set_threshold(100_000, 50, 100)

# Segments that grow: of what the allocator holds, hardly anything lies unused between tensors, which is what lets an
# evaluation follow training on a card of 8 GiB. To be set before CUDA starts.
if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

# One folder for all that Triton compiles, its usual one. Inductor names others, one for each GPU, but only in a process
# that compiles itself: the next one would compile our own kernels again.
_home = os.environ.get("TRITON_HOME") or os.path.expanduser("~")
if os.access(_home, os.W_OK):
    os.environ.setdefault("TRITON_CACHE_DIR", os.path.join(_home, ".triton", "cache"))
