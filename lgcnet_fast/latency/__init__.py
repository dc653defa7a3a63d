"""Latency lookup tables: measuring, roofline, files, predictions."""
