"""From answers to numbers: the official scores, their intervals, comparisons, plots. Imports no torch."""
