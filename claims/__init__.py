"""What the chapters found (NN.json) and their long runs (NN.full.json, by NN_name.py on grid.py).

Only the numbers are installed; CONTRIBUTING.md says how they are made.
"""
