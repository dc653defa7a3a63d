"""Painters of the synthetic street scenes: a canvas of surfaces, textures and street furniture."""
