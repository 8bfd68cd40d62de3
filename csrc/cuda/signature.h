// What a relaxation's buffers, launches and their constants depend on, as bytes.
#pragma once

#include <string>

#include "../common/relaxation.h"

namespace ep::cuda {

// Every number, and of every tensor its dtype, shape and device; not its memory.
std::string signature(const RelaxArguments& arguments);

}  // namespace ep::cuda
