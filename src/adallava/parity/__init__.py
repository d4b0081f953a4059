"""Replays recordings of the released research code through this package and measures the differences."""
