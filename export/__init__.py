"""From a checkpoint to one file that the runtime, and others, can read."""
