"""One rival a file, each offering `CONTENDERS`."""
