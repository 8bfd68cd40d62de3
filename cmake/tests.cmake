# ctest --test-dir build/cmake: the tests that need no GPU and concern what is compiled. All others: pytest.
enable_testing()
function(ep_add_test name)
  add_test(NAME ${name} COMMAND ${EP_PYTHON} -m pytest ${ARGN} WORKING_DIRECTORY ${CMAKE_SOURCE_DIR})
  set_tests_properties(${name} PROPERTIES SKIP_RETURN_CODE 5)  # pytest found no test
endfunction()
ep_add_test(host tests/host)  # the CUDA sources run on the CPU: the means, then the ops
ep_add_test(cuda tests/cuda --ignore=tests/cuda/test_codegen.py)
ep_add_test(codegen tests/cuda/test_codegen.py)
ep_add_test(package tests/package)
