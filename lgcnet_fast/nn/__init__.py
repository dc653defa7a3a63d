"""Modules: candidate operations, cells, graph-guided module, fusion cell, stem and heads."""
