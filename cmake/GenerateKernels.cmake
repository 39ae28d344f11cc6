# Runs `python -m jax_nano.codegen build` while configuring, as only its output says which objects exist.
# CMake configures again when a source of the generator changes.

# Stops unless every LLVM tool that the generator drives exists in the version it was written for.
function(jax_nano_require_llvm version)
  foreach(tool IN ITEMS mlir-opt mlir-translate opt llc llvm-objdump)
    find_program(JAX_NANO_${tool} NAMES ${tool}-${version} ${tool})
    set(answer "")
    if(JAX_NANO_${tool})
      execute_process(COMMAND "${JAX_NANO_${tool}}" --version OUTPUT_VARIABLE answer ERROR_QUIET)
    endif()
    if(NOT answer MATCHES "version ${version}\\.")
      message(FATAL_ERROR "jax_nano's kernels are compiled with LLVM ${version}, and ${tool} of that version "
                          "was not found: install the Debian packages mlir-${version}-tools and llvm-${version}.")
    endif()
  endforeach()
endfunction()

# Leaves kernels.cmake, manifest.inc, manifest.json and the objects in `folder`.
function(jax_nano_generate_kernels folder)
  file(GLOB_RECURSE sources CONFIGURE_DEPENDS "${CMAKE_SOURCE_DIR}/jax_nano/codegen/*.py")
  set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${sources})
  set(stale TRUE)
  if(EXISTS "${folder}/kernels.cmake")
    set(stale FALSE)
    foreach(source IN LISTS sources)
      if("${source}" IS_NEWER_THAN "${folder}/kernels.cmake")
        set(stale TRUE)
      endif()
    endforeach()
  endif()
  if(NOT stale)
    return()
  endif()
  jax_nano_require_llvm(22)
  message(STATUS "Composing and compiling the kernels into ${folder}")
  execute_process(
    COMMAND ${CMAKE_COMMAND} -E env "PYTHONPATH=${CMAKE_SOURCE_DIR}"
            "${Python_EXECUTABLE}" -m jax_nano.codegen build --out "${folder}"
    RESULT_VARIABLE status)
  if(NOT status EQUAL 0)
    file(REMOVE "${folder}/kernels.cmake")
    message(FATAL_ERROR "jax_nano.codegen failed; its message is above.")
  endif()
endfunction()
