"""What a careful user of plain PyTorch has: the same networks and losses, without this package's
operations."""
