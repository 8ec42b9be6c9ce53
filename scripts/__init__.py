"""One task each, run by `make` or with `python -m scripts.NAME`. They import from `common`, never from each other."""
