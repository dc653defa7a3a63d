"""Search, train and deploy real-time semantic-segmentation networks (LGCNet, GAS)."""

__version__ = "0.1.0"
