#include "host_sim/static_shared.h"

#include <link.h>

#include <cstdint>

// glibc's, which no header declares.
struct TlsIndex {
  size_t module, offset;
};
extern "C" void* __tls_get_addr(TlsIndex*);

namespace fastopt::host_sim {
namespace {

struct ModuleSearch {
  uintptr_t address;
  size_t tls_module = 0;
  size_t tls_bytes = 0;
};

int visit_module(dl_phdr_info* info, size_t, void* data) {
  ModuleSearch& search = *static_cast<ModuleSearch*>(data);
  bool holds_address = false;
  size_t tls_bytes = 0;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& segment = info->dlpi_phdr[i];
    const uintptr_t start = info->dlpi_addr + segment.p_vaddr;
    if (segment.p_type == PT_LOAD && search.address >= start &&
        search.address < start + segment.p_memsz) {
      holds_address = true;
    }
    if (segment.p_type == PT_TLS) tls_bytes = segment.p_memsz;
  }
  if (!holds_address) return 0;
  search.tls_module = info->dlpi_tls_modid;
  search.tls_bytes = tls_bytes;
  return 1;
}

}  // namespace

StaticShared find_static_shared(const void* kernel) {
  ModuleSearch search{reinterpret_cast<uintptr_t>(kernel)};
  dl_iterate_phdr(visit_module, &search);
  if (search.tls_module == 0) return {};
  TlsIndex index{search.tls_module, 0};
  return {static_cast<std::byte*>(__tls_get_addr(&index)), search.tls_bytes};
}

}  // namespace fastopt::host_sim
