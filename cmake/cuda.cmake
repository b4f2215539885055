# Enables CUDA where it is wanted, there is something to compile, and nvcc is found.
# Out: CUDA_INT4_CUDA_SOURCES, empty without CUDA.

set(CUDA_INT4_CUDA_SOURCES "")
file(GLOB_RECURSE cuda_sources CONFIGURE_DEPENDS backend/kernels/*.cu backend/runtime/*.cu)
if(cuda_sources AND NOT CUDA_INT4_CUDA STREQUAL "OFF")
  if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
    set(CMAKE_CUDA_ARCHITECTURES 80-real 90a-real)  # Ampere; Hopper with its wgmma and TMA
  endif()
  include(CheckLanguage)
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    enable_language(CUDA)
    set(CMAKE_CUDA_STANDARD 17)
    set(CMAKE_CUDA_RUNTIME_LIBRARY Static)  # the same library loads where there is no driver
    set(CUDA_INT4_CUDA_SOURCES ${cuda_sources})
  elseif(CUDA_INT4_CUDA STREQUAL "ON")
    message(FATAL_ERROR "cuda_int4: CUDA_INT4_CUDA=ON but no nvcc was found; put it on PATH or set "
                        "CUDACXX, or build with CUDA_INT4_CUDA=OFF")
  endif()
endif()
if(CUDA_INT4_CUDA_SOURCES)
  message(STATUS "cuda_int4: CUDA kernels for ${CMAKE_CUDA_ARCHITECTURES}")
else()
  message(STATUS "cuda_int4: CPU kernels only")
endif()
