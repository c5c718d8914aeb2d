"""What the chapters found, written by their last committed run; see CONTRIBUTING.md."""
