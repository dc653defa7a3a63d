"""Trained networks as engines: batch norms folded, files, the `Segmenter` of applications."""
