"""What is behind `course.py`: its verbs, one module each. Used in a checkout, not installed."""
