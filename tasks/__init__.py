"""Data sets with their splits, labels and templates."""
