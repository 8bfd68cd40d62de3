// Chooses, once per process, the passes of the widest instruction set that was compiled in and that this CPU runs.
// The environment variable EP_KERNELS_ISA=baseline|avx2|avx512 chooses a lower one; all give the same bits.
#include <algorithm>
#include <cstdlib>
#include <string>
#include <vector>

#include "ep/check.h"
#include "passes.h"

#define EP_DECLARE(isa)                \
  namespace ep::cpu::isa {             \
  const Table<float>& table_float();   \
  const Table<double>& table_double(); \
  }

EP_DECLARE(baseline)
#ifdef EP_HAVE_AVX2
EP_DECLARE(avx2)
#endif
#ifdef EP_HAVE_AVX512
EP_DECLARE(avx512)
#endif

namespace ep::cpu {
namespace {

struct Choice {
  std::string name;
  const Table<float>* single;
  const Table<double>* twice;
};

// What this build holds and this processor runs, widest last.
std::vector<Choice> choices() {
  std::vector<Choice> out{{"baseline", &baseline::table_float(), &baseline::table_double()}};
#ifdef EP_HAVE_AVX2
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    out.push_back({"avx2", &avx2::table_float(), &avx2::table_double()});
  }
#endif
#ifdef EP_HAVE_AVX512
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq")) {
    out.push_back({"avx512", &avx512::table_float(), &avx512::table_double()});
  }
#endif
  return out;
}

Choice choose() {
  const std::vector<Choice> all = choices();
  const char* value = std::getenv("EP_KERNELS_ISA");
  const std::string wanted = value && *value ? value : all.back().name;
  std::vector<std::string> names;
  for (const Choice& choice : all) names.push_back(choice.name);
  const size_t found = std::find(names.begin(), names.end(), wanted) - names.begin();
  EP_CHECK(found < all.size(), "environment", "EP_KERNELS_ISA",
           "one of " << list(names) << " (what this processor and build run)", "'" << wanted << "'");
  return all[found];
}

const Choice& choice() {
  static const Choice chosen = choose();  // after an error the next call tries again
  return chosen;
}

}  // namespace

template <>
const Table<float>& passes<float>() {
  return *choice().single;
}

template <>
const Table<double>& passes<double>() {
  return *choice().twice;
}

const char* passes_isa() { return choice().name.c_str(); }

}  // namespace ep::cpu
