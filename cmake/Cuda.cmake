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

# cuDNN is loaded at run time, so of it and of the header-only cudnn-frontend only headers are needed.
# launch/setup.sh puts the latter into build/venv, if it finds nvcc.
file(GLOB cudnn_frontend_hints ${PROJECT_SOURCE_DIR}/build/venv/lib/python3*/site-packages/include)
find_path(CUDNN_INCLUDE_DIR cudnn.h HINTS ${CUDAToolkit_INCLUDE_DIRS})
find_path(CUDNN_FRONTEND_INCLUDE_DIR cudnn_frontend.h HINTS ${cudnn_frontend_hints})
if(NOT CUDNN_INCLUDE_DIR)
  message(FATAL_ERROR "cudnn.h of cuDNN 9 was not found: install it, set -DCUDNN_INCLUDE_DIR, "
    "or build without CUDA (-DFORETOKEN_CUDA=OFF)")
endif()
if(NOT CUDNN_FRONTEND_INCLUDE_DIR)
  message(FATAL_ERROR "cudnn_frontend.h was not found: run launch/setup.sh with nvcc in PATH, "
    "set -DCUDNN_FRONTEND_INCLUDE_DIR, or build without CUDA (-DFORETOKEN_CUDA=OFF)")
endif()
add_library(foretoken_cudnn INTERFACE)
add_library(foretoken::cudnn ALIAS foretoken_cudnn)
target_include_directories(foretoken_cudnn SYSTEM INTERFACE
  ${CUDNN_INCLUDE_DIR} ${CUDNN_FRONTEND_INCLUDE_DIR} ${CUDAToolkit_INCLUDE_DIRS})
target_compile_definitions(foretoken_cudnn INTERFACE NV_CUDNN_FRONTEND_USE_DYNAMIC_LOADING)
target_link_libraries(foretoken_cudnn INTERFACE ${CMAKE_DL_LIBS})

# NCCL joins the ranks of a worker group.
find_path(NCCL_INCLUDE_DIR nccl.h HINTS ${CUDAToolkit_INCLUDE_DIRS})
find_library(NCCL_LIBRARY nccl HINTS ${CUDAToolkit_LIBRARY_DIR} ${CUDAToolkit_LIBRARY_ROOT}/lib)
if(NOT NCCL_INCLUDE_DIR OR NOT NCCL_LIBRARY)
  message(FATAL_ERROR "NCCL was not found: install it, set -DNCCL_INCLUDE_DIR and -DNCCL_LIBRARY, "
    "or build without CUDA (-DFORETOKEN_CUDA=OFF)")
endif()
add_library(foretoken_nccl INTERFACE)
add_library(foretoken::nccl ALIAS foretoken_nccl)
target_include_directories(foretoken_nccl SYSTEM INTERFACE
  ${NCCL_INCLUDE_DIR} ${CUDAToolkit_INCLUDE_DIRS})
target_link_libraries(foretoken_nccl INTERFACE ${NCCL_LIBRARY})
