"""Kernels in C++ for CPUs: `source/` holds them, `library.py` compiles and loads them, the rest calls them."""
