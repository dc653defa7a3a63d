"""Trained networks as engines: batch norms folded, files, the `Segmenter` of applications."""

from lgcnet_fast.deploy.segmenter import Segmenter

__all__ = ["Segmenter"]
