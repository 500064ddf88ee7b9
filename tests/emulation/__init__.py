"""The CUDA kernels of csrc/ compiled by g++ and executed on the CPU."""
