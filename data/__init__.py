"""Data and checkpoints made by this repository; README.md says how. Scripts are not installed."""
