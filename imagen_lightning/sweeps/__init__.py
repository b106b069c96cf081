"""Sweeps: a W&B sweep file, searched on this machine or on many without W&B."""
