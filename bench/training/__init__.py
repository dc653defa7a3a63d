"""Training steps against the best that plain PyTorch offers, subject by subject."""
