"""HTTP: the connection front, the hijack, the dialects, the routes, and the one map from error to status."""
