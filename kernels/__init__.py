"""The Triton kernels, installed as ``fused_optim.kernels``."""
