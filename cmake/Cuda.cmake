# CUDA is used where its compiler is found; -DFORETOKEN_CUDA=OFF builds without it.
include(CheckLanguage)
check_language(CUDA)
if(CMAKE_CUDA_COMPILER)
  set(cuda_found ON)
else()
  set(cuda_found OFF)
endif()
option(FORETOKEN_CUDA "Build the CUDA device" ${cuda_found})
if(NOT FORETOKEN_CUDA)
  return()
endif()

# CMake 3.25 doesn't know nvcc's flag for C++20.
set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION "-std=c++20")
set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION "-std=c++20")
set(CMAKE_CUDA_ARCHITECTURES 90a)  # H100 and H200
enable_language(CUDA)
set(CMAKE_CUDA_STANDARD 20)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
find_package(CUDAToolkit REQUIRED)  # CUDA::cudart_static, CUDA::cublasLt
