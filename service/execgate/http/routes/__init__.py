"""The handlers, grouped by what they are about. Each group is a class that gets what it needs by constructor."""
