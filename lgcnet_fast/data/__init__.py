"""Data sets, checks, the packed cache, augmentation and loaders."""
