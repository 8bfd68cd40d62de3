// Names of kernels: from this library's own symbol table, since most are not exported. step<(Products)2, 64>, without
// its parameters and the namespaces that all have.
#include <cxxabi.h>
#include <dlfcn.h>
#include <elf.h>
#include <link.h>

#include <cstdlib>
#include <fstream>
#include <iterator>
#include <vector>

#include "host.h"

namespace ep::cuda::host {
namespace {

std::map<uintptr_t, std::string> read_functions(const Dl_info& library) {
  std::ifstream file(library.dli_fname, std::ios::binary);
  const std::vector<char> bytes((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  std::map<uintptr_t, std::string> functions;
  if (bytes.size() < sizeof(ElfW(Ehdr))) return functions;
  const auto* header = reinterpret_cast<const ElfW(Ehdr)*>(bytes.data());
  const auto* sections = reinterpret_cast<const ElfW(Shdr)*>(bytes.data() + header->e_shoff);
  for (int i = 0; i < header->e_shnum; ++i) {
    if (sections[i].sh_type != SHT_SYMTAB) continue;
    const auto* symbols = reinterpret_cast<const ElfW(Sym)*>(bytes.data() + sections[i].sh_offset);
    const char* strings = bytes.data() + sections[sections[i].sh_link].sh_offset;
    for (size_t j = 0; j < sections[i].sh_size / sizeof *symbols; ++j) {
      if ((symbols[j].st_info & 0xf) != STT_FUNC || symbols[j].st_value == 0) continue;
      functions[reinterpret_cast<uintptr_t>(library.dli_fbase) + symbols[j].st_value] = strings + symbols[j].st_name;
    }
  }
  return functions;
}

std::string demangled(const std::string& symbol) {
  int status = 0;
  char* name = abi::__cxa_demangle(symbol.c_str(), nullptr, nullptr, &status);
  std::string result = status == 0 ? name : symbol;
  std::free(name);
  for (const std::string noise : {"(anonymous namespace)::", "ep::cuda::"}) {
    for (size_t at; (at = result.find(noise)) != std::string::npos;) result.erase(at, noise.size());
  }
  if (result.rfind("void ", 0) == 0) result.erase(0, 5);  // of a template
  return result.substr(0, result.rfind('('));             // no parameters
}

}  // namespace

std::string name_of(const void* address) {
  static std::map<const void*, std::string> names;
  const auto [entry, fresh] = names.try_emplace(address, "?");
  if (fresh) {
    static const std::map<uintptr_t, std::string> functions = [address] {
      Dl_info library{};
      dladdr(address, &library);
      return read_functions(library);
    }();
    const auto function = functions.find(reinterpret_cast<uintptr_t>(address));
    if (function != functions.end()) entry->second = demangled(function->second);
  }
  return entry->second;
}

}  // namespace ep::cuda::host
