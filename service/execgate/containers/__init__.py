"""Which containers exist, by the state directories of OCI runtimes, and what the kernel says of them."""
