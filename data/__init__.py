"""Data and checkpoints made by this repository; README.md says how. Its scripts are not installed."""
