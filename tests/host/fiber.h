// Fibers: functions with stacks of their own that one thread runs in turn.
#pragma once

#include <cstddef>

namespace ep::cuda::host {

constexpr int kMaxFibers = 1024;

// Readies fiber `index` to run entry(), which must not return or throw, from its beginning.
void start(int index, void (*entry)());
// Runs fiber `index` until it leaves. Only outside of fibers.
void enter(int index);
// Back to enter(), from the fiber that runs. Returns when the fiber is entered again.
void leave();

// Straight to another fiber; as leave() and enter(index), in half the time.
void pass(int index);

}  // namespace ep::cuda::host
