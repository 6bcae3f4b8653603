"""The sources of the native kernels, which ``qad.native`` and ``qad.native_cuda`` compile on first use."""
