"""What each NPU accepts, and how much of a model would run on it."""
