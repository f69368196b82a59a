"""Where each engine keeps what it knows of its containers, and how that is read. Read-only, one module an engine."""
