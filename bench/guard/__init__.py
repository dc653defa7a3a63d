"""The speed guard: `make bench`. Ratios to plain PyTorch, and whether one of them got worse."""
