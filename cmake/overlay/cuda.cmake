# Stands in for PyTorch's cmake/public/cuda.cmake in the overlay build: that one looks for NVIDIA's compiler, and the
# target it would define, torch::cudart, is defined by cmake/overlay/CMakeLists.txt.
