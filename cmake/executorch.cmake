# Finds the executorch wheel of the Python that runs the build, and takes the absolute run paths
# out of its targets: under build isolation they name a temporary folder.

find_package(Python3 REQUIRED COMPONENTS Interpreter)
# find_spec imports neither executorch nor torch.
execute_process(
  COMMAND "${Python3_EXECUTABLE}" -c
          "import importlib.util as u; print(list(u.find_spec('executorch').submodule_search_locations)[0])"
  OUTPUT_VARIABLE executorch_root OUTPUT_STRIP_TRAILING_WHITESPACE
  RESULT_VARIABLE executorch_missing ERROR_QUIET)
if(executorch_missing)
  message(FATAL_ERROR "cuda_int4: expected the Python package executorch==1.5.1 beside "
                      "${Python3_EXECUTABLE}, found none; pip install executorch==1.5.1")
endif()
find_package(executorch 1.5 REQUIRED CONFIG COMPONENTS kernels_optimized threadpool
             PATHS "${executorch_root}/share/cmake" NO_DEFAULT_PATH)

foreach(target IN ITEMS runtime threadpool kernels_optimized)
  get_target_property(options executorch::${target} INTERFACE_LINK_OPTIONS)
  if(options)
    list(FILTER options EXCLUDE REGEX "rpath,[/$]")
    set_target_properties(executorch::${target} PROPERTIES INTERFACE_LINK_OPTIONS "${options}")
  endif()
endforeach()
