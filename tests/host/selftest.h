// Kernels that try the host run itself. Addresses come from Python as integers.
#pragma once

#include <cstdint>
#include <string>

namespace ep::cuda::selftest {

// Runs the kernel `name` over blocks of `threads` with `shared` bytes; what `in`, `out` and `option` mean is its own.
void run(const std::string& name, unsigned blocks, unsigned threads, size_t shared, uintptr_t in, uintptr_t out,
         int option);
// The names of the errors of cudaFuncSetAttribute (not called if `allow` is 0) and of a launch.
std::string launch_error(unsigned blocks, unsigned threads, size_t shared, int allow);
// Captures out = 0, then out += 1 and out *= 2 on a stream and, between forks, on a second one; replays it.
void graph(uintptr_t out, int size, int replays, bool fork);
// The name of the error of a wrong use of streams and captures.
std::string capture_error(const std::string& use);
// The bits of `count` floats as float16, bfloat16 or tf32, or of 16-bit elements as floats.
void convert(const std::string& to, uintptr_t in, uintptr_t out, int64_t count);

}  // namespace ep::cuda::selftest
