"""Pagemill as a contender, each file offering `CONTENDERS`."""
