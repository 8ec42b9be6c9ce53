"""What training has and decoding has not: backward passes, their CUDA graphs, the weights' EMA."""
