"""What a training run needs before it starts: memory, bytes, time, and what does not fit."""
