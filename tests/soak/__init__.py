"""The soak: a random mix of everything for a given time, with promises checked throughout."""
