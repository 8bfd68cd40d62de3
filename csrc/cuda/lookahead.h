// What a program does later in a run.
#pragma once

#include "../common/relaxation.h"

namespace ep::cuda {

// Sweep t; the last of the program's repeats.
const Launches& launches_of(const Relaxation& r, int64_t t);

// Whether a feedback of connection c comes after launch `at` of sweep t, before the state above it or its winners
// change again: then that launch had better write the unpooled state. After a step of a deferred sweep the new state is
// not what the rest of the sweep reads: nothing may be written if it does read.
bool read_later(const Relaxation& r, int64_t c, int64_t t, size_t at, bool after_step);

constexpr int64_t kLookahead = 2;  // sweeps that read_later looks at, the first included

}  // namespace ep::cuda
