"""Device code, and nothing else: what runs on the GPU. Who launches it: ep_kernels/triton/launch.py.

Maps are [N, H, W, C] with C a multiple of 16 (padding channels hold zero), weights are K-major matrices
[C_out, taps C_in], and a tile is TN x TH x TW positions of BN channels.
"""
