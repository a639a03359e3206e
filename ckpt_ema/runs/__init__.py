"""A run directory in, its checkpoints with their students in step order out."""
