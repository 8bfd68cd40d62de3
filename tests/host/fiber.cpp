#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstring>
#include <new>

#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace ep::cuda::host {
namespace {

constexpr size_t kStack = 128 << 10, kPage = 4096;

// Pages are committed when touched; the lowest of each stack is never, so that an overflow faults.
unsigned char* reserve() {
  void* all =
      mmap(nullptr, kMaxFibers * kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (all == MAP_FAILED) throw std::bad_alloc();
  for (int i = 0; i < kMaxFibers; ++i) mprotect(static_cast<unsigned char*>(all) + i * kStack, kPage, PROT_NONE);
  return static_cast<unsigned char*>(all);
}

// Tops differ modulo a page: the stacks' busy ends would otherwise share the same few cache sets.
unsigned char* top(int index) {
  static unsigned char* const stacks = reserve();
  return stacks + (index + 1) * kStack - index % 32 * 320;
}

}  // namespace

#ifdef __x86_64__

// Saves the registers that a call preserves, and the stack pointer to *from; continues at `to`.
extern "C" void ep_host_switch(void** from, void* to);
asm(R"(
.text
.local ep_host_switch
.type ep_host_switch, @function
ep_host_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size ep_host_switch, . - ep_host_switch
)");

namespace {
void* saved[kMaxFibers];
void* outside;
int running;
}  // namespace

void start(int index, void (*entry)()) {
  void** stack =
      reinterpret_cast<void**>(top(index)) - 8;  // six registers, the entry, no return address: a call's alignment
  std::memset(stack, 0, 8 * sizeof *stack);
  stack[6] = reinterpret_cast<void*>(entry);
  saved[index] = stack;
}

void enter(int index) {
  running = index;
  ep_host_switch(&outside, saved[index]);
}

void leave() { ep_host_switch(&saved[running], outside); }

void pass(int index) {
  void** from = &saved[running];
  running = index;
  ep_host_switch(from, saved[index]);
}

#else

namespace {
ucontext_t saved[kMaxFibers], outside;
int running;
}  // namespace

void start(int index, void (*entry)()) {
  getcontext(&saved[index]);
  saved[index].uc_stack.ss_sp = top(0) - kStack + index * kStack + kPage;
  saved[index].uc_stack.ss_size = kStack - kPage;
  saved[index].uc_link = nullptr;
  makecontext(&saved[index], entry, 0);
}

void enter(int index) {
  running = index;
  swapcontext(&outside, &saved[index]);
}

void leave() { swapcontext(&saved[running], &outside); }

void pass(int index) {
  ucontext_t* from = &saved[running];
  running = index;
  swapcontext(from, &saved[index]);
}

#endif

}  // namespace ep::cuda::host
