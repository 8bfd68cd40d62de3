# Whether CUDA is built, by which nvcc and for which architectures.
#
# ep_choose_cuda() sets EP_BUILD_KIND (cpu or cuda), EP_NOTE (why auto builds no CUDA, else empty) and, for CUDA, EP_NVCC_PATH,
# EP_CUDA_VERSION, EP_CUDA_ARCH_NAMES (as TORCH_CUDA_ARCH_LIST has them) and CMAKE_CUDA_ARCHITECTURES.
# Neither a GPU nor a CUDA build of torch is needed.

set(EP_CUDA_OLDEST 12.0)
# A cubin runs on newer devices of the same major version too: that of 8.0 on 8.6 and 8.9, that of 10.0 on 10.3, that of
# 12.0 on 12.1. The a of 9.0a is what wgmma needs. PTX is for devices to come; the driver compiles it.
set(EP_CUDA_ARCHS_DEFAULT 8.0 9.0a 10.0 12.0+PTX)
set(EP_CUDA_ARCHS_Ampere 8.0 8.6)
set(EP_CUDA_ARCHS_Ada 8.9)
set(EP_CUDA_ARCHS_Hopper 9.0a)
set(EP_CUDA_ARCHS_Blackwell 10.0 12.0)

# -> path of nvcc, or an empty string and where it was looked for
function(ep_find_nvcc nvcc why)
  unset(EP_NVCC CACHE)  # looked for again each time: the environment may have changed
  if(NOT "$ENV{CUDACXX}" STREQUAL "")
    find_program(EP_NVCC "$ENV{CUDACXX}")
    set(missing "CUDACXX is '$ENV{CUDACXX}', and there is no such program")
  else()
    find_program(EP_NVCC nvcc PATHS ENV CUDA_HOME ENV CUDA_PATH /usr/local/cuda PATH_SUFFIXES bin NO_CMAKE_SYSTEM_PATH)
    set(missing "no nvcc in CUDACXX, PATH, CUDA_HOME, CUDA_PATH or /usr/local/cuda")
  endif()
  if(EP_NVCC)
    set(${nvcc} "${EP_NVCC}" PARENT_SCOPE)
  else()
    set(${nvcc} "" PARENT_SCOPE)
    set(${why} "${missing}" PARENT_SCOPE)
  endif()
endfunction()

# -> version of nvcc; or why it cannot be used, else empty. CMake's own check would end the build instead of
# leaving out CUDA, so a program is compiled and linked here first.
function(ep_check_nvcc nvcc host version why)
  set(${why} "" PARENT_SCOPE)
  execute_process(COMMAND "${nvcc}" --version OUTPUT_VARIABLE text ERROR_VARIABLE text RESULT_VARIABLE failed)
  if(failed OR NOT text MATCHES "release ([0-9]+\\.[0-9]+)")
    set(${why} "'${nvcc} --version' fails: ${text}" PARENT_SCOPE)
    return()
  endif()
  set(found ${CMAKE_MATCH_1})
  if(found VERSION_LESS EP_CUDA_OLDEST)
    set(${why} "nvcc: expected CUDA >= ${EP_CUDA_OLDEST}; ${nvcc} is ${found}" PARENT_SCOPE)
    return()
  endif()
  set(key "${nvcc} ${found} ${host}")
  if(EP_NVCC_WORKS STREQUAL key)
    set(${version} ${found} PARENT_SCOPE)
    return()
  endif()
  set(folder "${CMAKE_BINARY_DIR}/nvcc-check")
  file(WRITE "${folder}/check.cu"
    "#include <cuda_runtime.h>\n__global__ void kernel() {}\n"
    "int main() { kernel<<<1, 1>>>(); return cudaGetLastError(); }\n")
  execute_process(
    COMMAND "${nvcc}" -std=c++17 -arch=sm_80 -cudart=static -ccbin "${host}" check.cu -o check
    WORKING_DIRECTORY "${folder}" OUTPUT_VARIABLE text ERROR_VARIABLE text RESULT_VARIABLE failed)
  if(failed)
    set(${why} "nvcc ${found} (${nvcc}) does not compile an empty kernel with ${host}: ${text}" PARENT_SCOPE)
    return()
  endif()
  set(EP_NVCC_WORKS "${key}" CACHE INTERNAL "the nvcc that was checked")
  set(${version} ${found} PARENT_SCOPE)
endfunction()

# TORCH_CUDA_ARCH_LIST, or the default -> names such as 9.0a or 12.0+PTX, and the same for CMake: 90a-real, 120
function(ep_cuda_architectures nvcc asked names architectures)
  execute_process(COMMAND "${nvcc}" --list-gpu-arch OUTPUT_VARIABLE known)
  string(REGEX MATCHALL "[0-9]+" known "${known}")
  list(TRANSFORM known REPLACE "(.)$" ".\\1")
  list(SORT known COMPARE NATURAL)
  list(FILTER known EXCLUDE REGEX "^[0-7]\\.")
  string(REPLACE ";" " " known_text "${known}")

  string(REGEX MATCHALL "[^;, ]+" asked "${asked}")
  set(expanded "")
  foreach(name IN LISTS asked)
    if(name MATCHES "^[A-Z][a-z]+$" AND DEFINED EP_CUDA_ARCHS_${name})
      list(APPEND expanded ${EP_CUDA_ARCHS_${name}})
    else()
      list(APPEND expanded ${name})
    endif()
  endforeach()
  if(NOT expanded)
    set(expanded ${EP_CUDA_ARCHS_DEFAULT})
    if(NOT "12.0" IN_LIST known)  # toolkits before 12.8: what is newer compiles the PTX of the oldest
      list(FILTER expanded EXCLUDE REGEX "^1")
      list(TRANSFORM expanded REPLACE "^8\\.0$" "8.0+PTX")
    endif()
  endif()
  list(REMOVE_DUPLICATES expanded)

  set(result "")
  set(kept "")
  foreach(name IN LISTS expanded)
    if(name MATCHES "^[0-7]\\.")  # lists made for all of torch's devices have such
      string(CONCAT text "TORCH_CUDA_ARCH_LIST: expected 8.0 or newer (the kernels copy with cp.async, which older "
        "devices lack); got '${name}'")
      if(EP_KERNELS_BUILD STREQUAL "cuda")
        message(FATAL_ERROR "${text}. Leave it out of the list, or unset the variable")
      endif()
      message(WARNING "${text}: left out")
      continue()
    endif()
    list(APPEND kept ${name})
    string(REGEX REPLACE "[+]PTX$" "" device "${name}")
    string(REGEX REPLACE "a$" "" plain "${device}")
    if(NOT plain IN_LIST known OR device MATCHES "^8.*a")
      message(FATAL_ERROR
        "TORCH_CUDA_ARCH_LIST: expected some of ${known_text} (what this nvcc compiles for; from 9.0 on an a may follow, "
        "then +PTX), or Ampere, Ada, Hopper, Blackwell; got '${name}'")
    endif()
    string(REPLACE "." "" number "${device}")
    if(name STREQUAL device)
      string(APPEND number "-real")
    endif()
    list(APPEND result ${number})  # without -real: a cubin, and PTX
  endforeach()
  set(${names} "${kept}" PARENT_SCOPE)
  set(${architectures} "${result}" PARENT_SCOPE)
endfunction()

# A folder is tied to its compilers: CMake would go on with half of the old one.
function(ep_require_same_nvcc key)
  if(DEFINED EP_NVCC_USED AND NOT EP_NVCC_USED STREQUAL key)
    message(FATAL_ERROR
      "${CMAKE_BINARY_DIR} was made with nvcc ${EP_NVCC_USED}; now it is ${key}. Remove this folder and build again.")
  endif()
  set(EP_NVCC_USED "${key}" CACHE INTERNAL "the nvcc of this folder")
endfunction()

macro(ep_choose_cuda)
  set(EP_BUILD_KIND cpu)
  set(EP_NOTE "")
  set(EP_CUDA_VERSION "")
  set(EP_CUDA_ARCH_NAMES "")
  if(NOT EP_KERNELS_BUILD STREQUAL "cpu")
    if(NOT CMAKE_CUDA_HOST_COMPILER)
      set(CMAKE_CUDA_HOST_COMPILER "${CMAKE_CXX_COMPILER}")
      if(NOT "$ENV{CUDAHOSTCXX}" STREQUAL "")
        set(CMAKE_CUDA_HOST_COMPILER "$ENV{CUDAHOSTCXX}")
      endif()
    endif()
    ep_find_nvcc(EP_NVCC_PATH EP_NOTE)
    if(EP_NVCC_PATH)
      ep_check_nvcc("${EP_NVCC_PATH}" "${CMAKE_CUDA_HOST_COMPILER}" EP_CUDA_VERSION EP_NOTE)
    endif()
    string(STRIP "${EP_NOTE}" EP_NOTE)
    if(EP_NOTE STREQUAL "")
      set(EP_BUILD_KIND cuda)
      ep_cuda_architectures("${EP_NVCC_PATH}" "${EP_CUDA_ARCHS}" EP_CUDA_ARCH_NAMES CMAKE_CUDA_ARCHITECTURES)
      ep_require_same_nvcc("${EP_NVCC_PATH} ${EP_CUDA_VERSION}")
      if(NOT EP_CUDA_ARCH_NAMES)
        set(EP_BUILD_KIND cpu)
        set(EP_CUDA_VERSION "")
        set(EP_NOTE "TORCH_CUDA_ARCH_LIST names nothing of 8.0 or newer: '${EP_CUDA_ARCHS}'")
        message(WARNING "Building for the CPU only. ${EP_NOTE}")
      endif()
    elseif(EP_KERNELS_BUILD STREQUAL "cuda")
      message(FATAL_ERROR "EP_KERNELS_BUILD=cuda: ${EP_NOTE}")
    elseif(EP_NVCC_PATH OR NOT "$ENV{CUDACXX}" STREQUAL "")  # somebody expects CUDA
      message(WARNING "Building for the CPU only. ${EP_NOTE}")
    else()
      message(STATUS "Building for the CPU only: ${EP_NOTE}")
    endif()
  endif()
endmacro()
