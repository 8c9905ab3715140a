# Python and, with T2L_TORCH, its torch: sets python_env, torch_version, torch_library, torch_has_cuda and t2l_torch_library().

find_package(Python 3.10 REQUIRED COMPONENTS Interpreter OPTIONAL_COMPONENTS Development.Module)
# pip's build isolation hides the environment's packages behind PYTHONPATH; torch must be the one that will load us.
set(python_env ${CMAKE_COMMAND} -E env --unset=PYTHONPATH --unset=PYTHONNOUSERSITE ${Python_EXECUTABLE})
if(NOT T2L_TORCH)
  return()
endif()

set(T2L_TORCH_INCLUDE "" CACHE PATH "Headers of another torch release to compile against; empty: those of Python's torch")
execute_process(
  COMMAND ${python_env} -c "import importlib.util as u; s = u.find_spec('torch'); print(s.submodule_search_locations[0] if s else '', end='')"
  OUTPUT_VARIABLE torch_dir)
if(NOT torch_dir)
  message(FATAL_ERROR "t2l_engine: ${Python_EXECUTABLE} has no torch. Install it first: pip install 'torch>=2.11', or, where a "
                      "build has an environment of its own, build with --no-build-isolation. "
                      "(-DT2L_TORCH=OFF builds the C++ library alone.)")
endif()
file(STRINGS ${torch_dir}/version.py torch_version REGEX "^__version__ = '[0-9]+[.][0-9]+")
string(REGEX MATCH "[0-9]+[.][0-9]+" torch_version "${torch_version}")
if(torch_version AND torch_version VERSION_LESS 2.11)
  message(FATAL_ERROR "t2l_engine: expected torch 2.11 or later, got ${torch_version}. Run: pip install 'torch>=2.11'")
endif()
set(torch_library ${torch_dir}/lib/libtorch_cpu.so)
if(CMAKE_CROSSCOMPILING AND NOT T2L_MANYLINUX)
  message(FATAL_ERROR "t2l_engine: ${torch_library} is for another processor than ${CMAKE_SYSTEM_PROCESSOR}: expected "
                      "-DT2L_MANYLINUX=ON, which links to stubs, or -DT2L_TORCH=OFF")
endif()
file(STRINGS ${torch_dir}/version.py torch_has_cuda REGEX "^cuda.* = '[0-9]")  # empty: a build without CUDA

function(t2l_torch_library name)
  add_library(${name} MODULE ${ARGN})
  set_target_properties(${name} PROPERTIES PREFIX "" SUFFIX ".so" SKIP_BUILD_RPATH ON)
  # Error texts name a source file: relative to the project, not to the machine that built it.
  target_compile_options(${name} PRIVATE -Wall -Wextra -fmacro-prefix-map=${PROJECT_SOURCE_DIR}/=)
  target_compile_definitions(${name} PRIVATE TORCH_TARGET_VERSION=0x020b000000000000)
  target_include_directories(${name} SYSTEM PRIVATE
    $<IF:$<BOOL:${T2L_TORCH_INCLUDE}>,${T2L_TORCH_INCLUDE},${torch_dir}/include>)
  target_link_options(${name} PRIVATE LINKER:--no-as-needed)
  if(NOT CMAKE_CROSSCOMPILING)
    target_link_libraries(${name} PRIVATE ${torch_library})
  endif()
endfunction()
