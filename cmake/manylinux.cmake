# T2L_MANYLINUX: _C loads wherever glibc 2.28 does, though it is linked on a newer machine (docs/design/releases.md).

# Links `target` to stubs of glibc 2.28, built for another processor to one of torch too, and holds libstdc++, whose newest
# symbols are as young as the compiler.  libgcc_s stays shared: exceptions leave this library and end in torch's.
function(t2l_link_manylinux target)
  if(NOT CMAKE_SYSTEM_NAME STREQUAL "Linux" OR NOT CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|aarch64)$")
    message(FATAL_ERROR "T2L_MANYLINUX=ON: expected Linux on x86_64 or aarch64, got ${CMAKE_SYSTEM_NAME} on ${CMAKE_SYSTEM_PROCESSOR}")
  endif()
  set(stubs ${CMAKE_CURRENT_BINARY_DIR}/glibc-2.28)
  set(torch "")
  if(CMAKE_CROSSCOMPILING)
    set(torch ${torch_library})
  endif()
  execute_process(
    COMMAND ${Python_EXECUTABLE} ${PROJECT_SOURCE_DIR}/cmake/glibc_stubs.py ${stubs} 2.28 ${CMAKE_CXX_COMPILER} ${torch}
    RESULT_VARIABLE status)
  if(NOT status EQUAL 0)
    message(FATAL_ERROR "T2L_MANYLINUX=ON: expected GNU binutils and glibc, to make stubs of glibc 2.28 from")
  endif()
  target_sources(${target} PRIVATE csrc/torch/manylinux.cpp)
  target_link_options(${target} PRIVATE -static-libstdc++ LINKER:--exclude-libs,ALL LINKER:-z,defs -L${stubs})
  target_link_libraries(${target} PRIVATE -lc -lm -lpthread -ldl -lrt -lld)
  if(CMAKE_CROSSCOMPILING)
    target_link_libraries(${target} PRIVATE -ltorch_cpu)
  endif()
endfunction()
