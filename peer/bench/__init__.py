"""Measuring a ring beside the same engine with the whole model in one process."""
