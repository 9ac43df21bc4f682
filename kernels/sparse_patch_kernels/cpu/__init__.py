"""The CPU backend, and how compiled C++ comes to run on a CPU."""
