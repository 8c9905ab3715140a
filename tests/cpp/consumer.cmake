# Installs the library into WORK/prefix, builds the example in WORK/build against it, and runs it: in EMULATOR, where it is
# cross-compiled with TOOLCHAIN.
function(run)
  execute_process(COMMAND ${ARGV} COMMAND_ERROR_IS_FATAL ANY)
endfunction()

file(REMOVE_RECURSE ${WORK})
file(MAKE_DIRECTORY ${WORK}/out)
run(${CMAKE_COMMAND} --install ${LIBRARY} --prefix ${WORK}/prefix --config ${BUILD_TYPE})
run(${CMAKE_COMMAND} -S ${SOURCE} -B ${WORK}/build -G ${GENERATOR} -D CMAKE_MAKE_PROGRAM=${MAKE} -D CMAKE_CXX_COMPILER=${CXX}
    -D CMAKE_BUILD_TYPE=${BUILD_TYPE} -D CMAKE_PREFIX_PATH=${WORK}/prefix
    -D CMAKE_TOOLCHAIN_FILE=${TOOLCHAIN})
run(${CMAKE_COMMAND} --build ${WORK}/build --config ${BUILD_TYPE})
run(${EMULATOR} ${WORK}/build/t2l_smoke)
# Two embeddings of 384 float32 values that are text: 0.74 and 0.047, then 0.047 and 0.74.
string(REPEAT "<=>?@A@=" 192 first)
string(REPEAT "@A@=<=>?" 192 second)
file(WRITE ${WORK}/task_emb "${first}${second}")
run(${EMULATOR} ${WORK}/build/t2l_example ${NETWORK} ${WORK}/task_emb ${WORK}/out)
foreach(name q_proj.A q_proj.B v_proj.A v_proj.B x base y)
  if(NOT EXISTS ${WORK}/out/${name})
    message(FATAL_ERROR "${WORK}/out/${name}: not written")
  endif()
endforeach()
