"""The native library: where it is, its functions by ctypes, its log, its devices, and what its errors mean."""
