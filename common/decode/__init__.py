"""Greedy answers: batched, single, by transformers' own modules, or by a hosted model."""
