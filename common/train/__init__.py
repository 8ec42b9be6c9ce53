"""Training: forward and backward passes of packs, their CUDA graphs, EMA, early stopping."""
