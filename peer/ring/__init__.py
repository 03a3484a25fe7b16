"""Running it: stages, frames, scheduling, sampling and answers."""
