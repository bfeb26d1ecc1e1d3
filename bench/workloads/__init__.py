"""One workload a file, each offering `WORKLOAD`."""
