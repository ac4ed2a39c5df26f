// Launches of the kernels that were translated from PTX, in place of their sources.
#include <cxxabi.h>
#include <elf.h>

#include <fstream>
#include <map>
#include <string>
#include <unordered_map>
#include <vector>

#include "instructions.h"

namespace fastseq::cuda::emulation::ptx {
namespace {

struct Translated {
  void (*run)();
  std::size_t parameter_bytes;
  u64 most_threads;
  int64_t launches = 0;
};

[[noreturn]] void stop(const std::string& what) { emulation::fail(("PTX: " + what).c_str()); }

std::string plain(const std::string& name) {
  char* const text = abi::__cxa_demangle(name.c_str(), nullptr, nullptr, nullptr);
  const std::string out = text ? text : name;
  std::free(text);
  return out;
}

struct Program {
  std::map<std::string, Translated> translated;
  std::unordered_map<const void*, std::string> names;  // of the program's functions
  std::map<std::string, int64_t> from_source;

  // The counts go to the standard output, for whom runs the program.
  ~Program() {
    for (const auto& [name, kernel] : translated)
      std::printf("PTX: %lld launches of %s\n", static_cast<long long>(kernel.launches), plain(name).c_str());
    for (const auto& [name, launches] : from_source)
      std::printf("source: %lld launches of %s\n", static_cast<long long>(launches), plain(name).c_str());
  }
};
Program& program() {
  static Program out;
  return out;
}

uint32_t sync_counter[2];  // as CUDA has it in the memory of a cooperative launch; the second is the barrier
bool is_cooperative = false;

extern "C" void fastseq_emulation_ptx_here() {}

// The names of all functions of this program, which lie elsewhere than its file says: all by the same.
void read_names(Program& to) {
  std::ifstream file("/proc/self/exe", std::ios::binary);
  const std::vector<char> content((std::istreambuf_iterator<char>(file)), {});
  const auto at = [&](std::size_t offset, auto* out, std::size_t i) {
    if (offset + (i + 1) * sizeof *out > content.size()) stop("the program's file ends too early");
    std::memcpy(out, content.data() + offset + i * sizeof *out, sizeof *out);
  };
  Elf64_Ehdr header;
  at(0, &header, 0);
  std::map<std::string, std::vector<u64>> addresses;
  for (int i = 0; i < header.e_shnum; ++i) {
    Elf64_Shdr section, strings;
    at(header.e_shoff, &section, i);
    if (section.sh_type != SHT_SYMTAB) continue;
    at(header.e_shoff, &strings, section.sh_link);
    for (std::size_t n = 0; n < section.sh_size / sizeof(Elf64_Sym); ++n) {
      Elf64_Sym symbol;
      at(section.sh_offset, &symbol, n);
      if (ELF64_ST_TYPE(symbol.st_info) != STT_FUNC || symbol.st_value == 0) continue;
      addresses[content.data() + strings.sh_offset + symbol.st_name].push_back(symbol.st_value);
    }
  }
  const auto here = addresses.find("fastseq_emulation_ptx_here");
  if (here == addresses.end()) stop("the program has no names of its functions: it must not be stripped");
  const u64 moved = reinterpret_cast<u64>(&fastseq_emulation_ptx_here) - here->second[0];
  for (const auto& [name, places] : addresses)
    for (const u64 place : places) {
      const auto [known, is_new] = to.names.emplace(reinterpret_cast<const void*>(place + moved), name);
      if (!is_new && (to.translated.count(name) || to.translated.count(known->second)))
        stop("the compiler has made one function of " + plain(name) + " and " + plain(known->second));
    }
  for (const auto& [name, kernel] : to.translated)
    if (addresses[name].size() != 1)
      stop("this program has " + std::to_string(addresses[name].size()) + " functions " + plain(name));
}

void (*find(const Launch& launch))() {
  Program& known = program();
  if (known.names.empty()) read_names(known);
  const auto name = known.names.find(launch.kernel);
  if (name == known.names.end()) stop("a kernel without a name is launched");
  const auto found = known.translated.find(name->second);
  if (found == known.translated.end()) {
    ++known.from_source[name->second];
    return nullptr;
  }
  Translated& kernel = found->second;
  if (launch.parameter_bytes != kernel.parameter_bytes)
    stop(plain(name->second) + ": the host has other parameters than PTX");
  if (launch.threads > kernel.most_threads) stop(plain(name->second) + ": more threads than __launch_bounds__ says");
  ++kernel.launches;
  is_cooperative = launch.cooperative;
  launched = {name->second.c_str(), launch.parameters, launch.parameter_bytes};
  return kernel.run;
}

}  // namespace

Launched launched;

Add::Add(const char* name, void (*run)(), std::size_t parameter_bytes, u64 most_threads) {
  program().translated.insert({name, {run, parameter_bytes, most_threads}});  // of the same in two files, the first
  find_translated = find;
}

u64 grid_workspace() { return is_cooperative ? reinterpret_cast<u64>(sync_counter) : 0; }

}  // namespace fastseq::cuda::emulation::ptx
