"""Checkpoints: opened, understood, run, written."""
