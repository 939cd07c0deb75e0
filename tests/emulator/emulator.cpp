// Runs CUDA kernels on the CPU: one fiber for each thread of a block, blocks one after the other, in one thread of the
// system. Kernels call the functions that cuda_runtime.h declares; their loads and stores arrive by the callbacks that
// the compiler's -fsanitize=thread inserts. A fault of the kernel ends the launch, with a report of who, where and
// what.
#include <dlfcn.h>
#include <link.h>
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "cuda_runtime.h"

dim3 gridDim, blockDim, blockIdx, threadIdx;

namespace emulator {
namespace {

constexpr unsigned kWarp = 32;
constexpr size_t kStack = 128 << 10;
constexpr size_t kSharedLimit = 48 << 10;  // of a kernel that has not asked for more
constexpr size_t kMostShared = 227 << 10;  // of sm_90; sm_80 has 163 KB, sm_86 and sm_89 99 KB
constexpr size_t kGranule = 2;             // bytes that the race detector tells apart

using Address = uintptr_t;
using Site = const void*;  // an address of the program: where something was done

// An access to shared memory. Time passes at barriers.
struct Access {
  uint32_t time = 0;
  uint32_t thread = 0;
  Site site = nullptr;
};

// What happened to a granule of shared memory since the last barrier.
struct Shadow {
  Access write, read, other_read;
  bool in_flight = false;  // a cp_async has begun to write it
};

struct Copy {
  char* to;
  const char* from;  // null: zeros
  bool early;        // the source is read at once, into data
  int group;
  std::array<char, 16> data;
};

struct Fiber {
  ucontext_t start;
  jmp_buf resume;
  char* stack;
  bool started = false;  // has a place to resume from
  bool done;             // the kernel has returned
  unsigned thread;       // of the block
  dim3 index;
  // Where it waits: null, or the name of a barrier or of an instruction for whole warps.
  const char* waits_at;
  Site site;
  unsigned mask;
  void* operands;
  // When __syncwarp last ordered the memory of each lane of the warp before this one's.
  std::array<uint32_t, kWarp> synced;
  std::vector<Copy> copies;  // cp_async that have not arrived
  int groups;                // closed so far
};

struct Warp {
  uint32_t ready;  // lanes that can go on
};

struct Range {
  std::string name;
  Address begin, end;
  uint32_t* writers;  // of each byte in this launch: 1 + the block's number, or 0

  size_t writers_bytes() const { return (end - begin) * sizeof(*writers); }
};

// The launch that runs.
const char* kernel_name;
const void* kernel_function;
void (*run_kernel)(const void*);
const void* arguments;
size_t shared_bytes;
unsigned threads;

// The block that runs.
uint32_t block_number;
std::vector<std::unique_ptr<Fiber>> fibers;  // those of past launches too
std::vector<Warp> warps;
Fiber* running = nullptr;
jmp_buf scheduler;
ucontext_t unused_context;
unsigned at_barrier, barrier_count;
int barrier_result;
bool depth_first;  // a warp goes on until it meets a barrier; otherwise warps take turns

alignas(128) char shared_arena[16 + kMostShared];
char* const shared = shared_arena + 16;  // aligned as CUDA promises, and not more
std::vector<Shadow> shadow(kMostShared / kGranule);
uint32_t now = 1;         // counts barriers
uint32_t block_time = 1;  // of the last barrier of the whole block

// Set from outside.
std::vector<Range> ranges;
std::map<const void*, size_t> shared_limits;
uint64_t seed = 0, random_state;

cudaError_t last_error = cudaSuccess;
std::string report;

uint32_t random_number() {  // splitmix64
  uint64_t x = random_state += 0x9e3779b97f4a7c15;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
  x = (x ^ x >> 27) * 0x94d049bb133111eb;
  return uint32_t((x ^ x >> 31) >> 32);
}

dim3 block_index(uint64_t number) {
  return dim3(number % gridDim.x, number / gridDim.x % gridDim.y, number / (uint64_t(gridDim.x) * gridDim.y));
}

// Memory of zeros, none of which exists before it is written.
void* reserve(size_t bytes) {
  void* const memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) abort();
  return memory;
}

// Reports.

std::string format(const char* text, ...) __attribute__((format(printf, 1, 2)));
std::string format(const char* text, ...) {
  va_list list, again;
  va_start(list, text);
  va_copy(again, list);
  std::string out(vsnprintf(nullptr, 0, text, list), '\0');
  vsnprintf(out.data(), out.size() + 1, text, again);
  va_end(again);
  va_end(list);
  return out;
}

// What addr2line prints of an address of this library, line by line, innermost first.
std::vector<std::string> look_up(const void* address, const char* options) {
  Dl_info info;
  if (!dladdr(address, &info)) return {};
  const size_t offset = Address(address) - Address(info.dli_fbase);
  const std::string command = format("addr2line %s -e '%s' %#zx 2>/dev/null", options, info.dli_fname, offset);
  std::vector<std::string> lines;
  if (FILE* pipe = popen(command.c_str(), "r")) {
    char line[4096];
    while (fgets(line, sizeof line, pipe)) lines.emplace_back(line, strcspn(line, "\n"));
    pclose(pipe);
  }
  return lines;
}

// " at file:line", of the kernel's sources.
std::string where(Site site) {
  const char* call = static_cast<const char*>(site) - 1;  // a return address is the next instruction's
  for (const std::string& line : look_up(call, "-i")) {
    if (line[0] == '?') break;
    const size_t name = line.rfind('/') + 1;
    if (line.compare(name, 14, "cuda_runtime.h")) return " at " + line.substr(name, line.find(' ', name) - name);
  }
  return "";
}

std::string thread_name(unsigned thread) {
  const dim3 index = fibers[thread]->index;
  return format("thread (%u, %u, %u)", index.x, index.y, index.z);
}

// "Kernel<int>" of "swinops::(anonymous namespace)::Kernel<int>(int*)".
std::string without_parameters(std::string name) {
  for (const char* const scope : {"swinops::", "(anonymous namespace)::"}) {
    for (size_t at; (at = name.find(scope)) != std::string::npos;) name.erase(at, strlen(scope));
  }
  return name.substr(0, name.find('('));
}

// Ends the launch with a report. From inside of a fiber this does not return.
void fail(const std::string& text) {
  const std::vector<std::string> names = look_up(kernel_function, "-Cf");
  const std::string name = names.empty() || names[0][0] == '?' ? kernel_name : without_parameters(names[0]);
  report = format("kernel %s, block (%u, %u, %u): ", name.c_str(), blockIdx.x, blockIdx.y, blockIdx.z) + text +
           format(" [seed %llu]", static_cast<unsigned long long>(seed));
  last_error = cudaErrorLaunchFailure;
}

[[noreturn]] void fail_here(const Fiber& fiber, const std::string& text, Site site) {
  fail(thread_name(fiber.thread) + ": " + text + where(site));
  _longjmp(scheduler, 2);
}

// Everyone who has not returned, by where they wait.
std::string who_waits() {
  std::map<std::pair<std::string, Site>, std::vector<unsigned>> places;
  std::vector<unsigned> returned;
  for (unsigned i = 0; i < threads; ++i) {
    if (fibers[i]->done) {
      returned.push_back(i);
    } else {
      places[{fibers[i]->waits_at, fibers[i]->site}].push_back(i);
    }
  }
  const auto list = [](const std::vector<unsigned>& group) {
    std::string out = format("%zu thread%s (linear ", group.size(), group.size() == 1 ? "" : "s");
    for (size_t i = 0, j; i < group.size(); i = j) {
      for (j = i + 1; j < group.size() && group[j] == group[j - 1] + 1;) ++j;
      out += (i ? ", " : "") + std::to_string(group[i]) + (j - i > 1 ? "-" + std::to_string(group[j - 1]) : "");
    }
    return out + ")";
  };
  std::string out;
  for (const auto& [place, group] : places) {
    out += (out.empty() ? "" : "; ") + list(group) + " wait at " + place.first + where(place.second);
  }
  return out + (returned.empty() ? "" : "; " + list(returned) + " have returned");
}

// Fibers.

__attribute__((noinline)) void leave() {
  if (!_setjmp(running->resume)) _longjmp(scheduler, 1);
}

void fiber_main() {
  for (;;) {
    run_kernel(arguments);
    if (!running->copies.empty()) {
      fail_here(*running, format("returns before %zu cp_async have arrived", running->copies.size()), nullptr);
    }
    running->done = true;
    leave();  // and start again, for the next block
  }
}

// Runs `fiber` until it waits or is done; false when a fault was found.
__attribute__((noinline)) bool resume(Fiber& fiber) {
  running = &fiber;
  threadIdx = fiber.index;
  const int back = _setjmp(scheduler);
  if (back == 0) {
    if (fiber.started) _longjmp(fiber.resume, 1);
    fiber.started = true;
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack;
    fiber.start.uc_stack.ss_size = kStack;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, fiber_main, 0);
    setcontext(&fiber.start);
  }
  running = nullptr;
  return back == 1;
}

std::unique_ptr<Fiber> new_fiber() {
  auto fiber = std::make_unique<Fiber>();
  const size_t page = 4096;  // below the stack, so that an overflow does not go unnoticed
  void* const memory = reserve(page + kStack);
  if (mprotect(memory, page, PROT_NONE)) abort();
  fiber->stack = static_cast<char*>(memory) + page;
  return fiber;
}

void start_block() {
  memset(shared, 0xff, shared_bytes);  // NaN
  block_time = ++now;
  at_barrier = barrier_count = 0;
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = *fibers[i];
    fiber.done = false;
    fiber.waits_at = nullptr;
    fiber.thread = i;
    fiber.index = dim3(i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y));
    fiber.synced.fill(0);
    fiber.groups = 0;
  }
  for (size_t w = 0; w < warps.size(); ++w) {
    const unsigned lanes = std::min(kWarp, threads - unsigned(w) * kWarp);
    warps[w].ready = lanes == kWarp ? ~0u : (1u << lanes) - 1;
  }
  depth_first = random_number() & 1;
}

// Runs the block that blockIdx names; false when a fault was found.
bool run_block() {
  start_block();
  size_t w = 0;
  for (;;) {
    if (!depth_first || !warps[w].ready) {
      const size_t start = random_number() % warps.size();
      size_t i = 0;
      while (i < warps.size() && !warps[(start + i) % warps.size()].ready) ++i;
      if (i == warps.size()) break;
      w = (start + i) % warps.size();
    }
    const uint32_t lanes = std::exchange(warps[w].ready, 0);
    const unsigned order = random_number(), stride = order >> 8 | 1;
    for (unsigned i = 0; i < kWarp; ++i) {
      const unsigned lane = (order + i * stride) % kWarp;
      if (lanes >> lane & 1 && !resume(*fibers[w * kWarp + lane])) return false;
    }
  }
  if (std::all_of(fibers.begin(), fibers.begin() + threads, [](const auto& fiber) { return fiber->done; })) return true;
  fail("deadlock: " + who_waits());
  return false;
}

// After a fault: nothing of the block goes on.
void abandon_block() {
  for (unsigned i = 0; i < threads; ++i) {
    fibers[i]->started = false;
    fibers[i]->copies.clear();
  }
  std::fill(shadow.begin(), shadow.end(), Shadow{});
}

// Barriers and the instructions of whole warps.

using Complete = void (*)(void* const* operands, unsigned mask);

// Waits for the lanes of `mask` to come to the same instruction. The last to come runs `complete`.
void meet(const char* instruction, unsigned mask, void* operands, Complete complete, Site site) {
  Fiber& self = *running;
  const unsigned lane = self.thread % kWarp, first = self.thread - lane;
  if (!(mask >> lane & 1)) {
    fail_here(self, format("lane %u is not in the mask %#x of its %s", lane, mask, instruction), site);
  }
  self.waits_at = instruction, self.site = site, self.mask = mask, self.operands = operands;
  std::array<void*, kWarp> all{};
  for (unsigned i = 0; i < kWarp; ++i) {
    if (!(mask >> i & 1)) continue;
    if (first + i >= threads)
      fail_here(self, format("%s waits for lane %u, which the block has not", instruction, i), site);
    const Fiber& other = *fibers[first + i];
    if (other.done) fail_here(self, format("%s waits for lane %u, which has returned", instruction, i), site);
    if (!other.waits_at) return leave();  // it is yet to come
    if (strcmp(other.waits_at, instruction) || other.mask != mask) {
      fail_here(self,
                format("is at %s with mask %#x, lane %u at %s with mask %#x%s; here", instruction, mask, i,
                       other.waits_at, other.mask, where(other.site).c_str()),
                site);
    }
    all[i] = other.operands;
  }
  complete(all.data(), mask);
  for (unsigned i = 0; i < kWarp; ++i) {
    if (mask >> i & 1) fibers[first + i]->waits_at = nullptr;
  }
  warps[first / kWarp].ready |= mask & ~(1u << lane);
}

int meet_block(bool predicate, Site site) {
  Fiber& self = *running;
  barrier_count += predicate;
  if (++at_barrier < threads) {
    self.waits_at = "__syncthreads", self.site = site, self.mask = 0;
    leave();
    return barrier_result;
  }
  barrier_result = int(std::exchange(barrier_count, 0));
  at_barrier = 0;
  block_time = ++now;
  depth_first = random_number() & 1;
  for (unsigned i = 0; i < threads; ++i) {
    fibers[i]->waits_at = nullptr;
    if (fibers[i].get() != &self) warps[i / kWarp].ready |= 1u << i % kWarp;
  }
  return barrier_result;
}

}  // namespace

#define HERE __builtin_return_address(0)

void sync_block() { meet_block(false, HERE); }
int sync_block_count(bool predicate) { return meet_block(predicate, HERE); }

void sync_warp(unsigned mask) {
  meet(
      "__syncwarp", mask, running,
      [](void* const* lanes, unsigned mask) {
        ++now;
        for (unsigned i = 0; i < kWarp; ++i) {
          for (unsigned j = 0; mask >> i & 1 && j < kWarp; ++j) {
            if (mask >> j & 1) static_cast<Fiber*>(lanes[i])->synced[j] = now;
          }
        }
      },
      HERE);
}

namespace {
struct Shuffle {
  uint64_t value, result;
  unsigned from;
  Fiber* fiber;
};
}  // namespace

uint64_t shuffle(unsigned mask, uint64_t value, unsigned from) {
  Shuffle own{value, 0, from, running};
  meet(
      "__shfl_sync", mask, &own,
      [](void* const* lanes, unsigned mask) {
        for (unsigned i = 0; i < kWarp; ++i) {
          if (!(mask >> i & 1)) continue;
          Shuffle& lane = *static_cast<Shuffle*>(lanes[i]);
          if (!(mask >> lane.from & 1)) {
            fail_here(*lane.fiber, format("__shfl_sync from lane %u, which is not in its mask %#x", lane.from, mask),
                      lane.fiber->site);
          }
          lane.result = static_cast<Shuffle*>(lanes[lane.from])->value;
        }
      },
      HERE);
  return own.result;
}

unsigned ballot(unsigned mask, bool predicate) {
  unsigned own = predicate;
  meet(
      "__ballot_sync", mask, &own,
      [](void* const* lanes, unsigned mask) {
        unsigned votes = 0;
        for (unsigned i = 0; i < kWarp; ++i) votes |= mask >> i & 1 ? *static_cast<unsigned*>(lanes[i]) << i : 0;
        for (unsigned i = 0; i < kWarp; ++i) {
          if (mask >> i & 1) *static_cast<unsigned*>(lanes[i]) = votes;
        }
      },
      HERE);
  return own;
}

unsigned lane() { return running->thread % kWarp; }

void trap() { fail_here(*running, "__trap", HERE); }

// Matrices.

namespace {

struct Mma {
  Floats d;
  Words a;
  uint32_t b[2];
};

// The two numbers of a register, or the one of a tf32 register: the instruction does not read its lower 13 bits.
template <Format kFormat>
float number(uint32_t word, int which) {
  if (kFormat == Format::tf32) return bit_cast<float>(word & ~0x1fffu);
  const uint16_t bits = uint16_t(word >> 16 * which);
  return kFormat == Format::half ? half_value(bits) : bfloat16_value(bits);
}

// d += a b for a [16, kDepth] and b [kDepth, 8], as PTX lays them out over a warp. Products are exact; they are added
// in float, in the order of k. (Hardware adds several at a time, and truncates.)
template <Format kFormat, int kDepth>
void complete_mma(void* const* lanes, unsigned) {
  constexpr int kPacked = kFormat == Format::tf32 ? 1 : 2;  // numbers in a register
  constexpr int kRegisters = kDepth / (4 * kPacked);        // of b
  float a[16][kDepth], b[kDepth][8], d[16][8];
  for (int lane = 0; lane < int(kWarp); ++lane) {
    const Mma& from = *static_cast<Mma*>(lanes[lane]);
    const int group = lane / 4, column = lane % 4 * kPacked;
    for (int i = 0; i < 4; ++i) d[group + i / 2 * 8][lane % 4 * 2 + i % 2] = from.d.of[i];
    for (int r = 0; r < kRegisters; ++r) {
      for (int i = 0; i < kPacked; ++i) {
        const int k = r * 4 * kPacked + column + i;
        a[group][k] = number<kFormat>(from.a.of[2 * r], i);
        a[group + 8][k] = number<kFormat>(from.a.of[2 * r + 1], i);
        b[k][group] = number<kFormat>(from.b[r], i);
      }
    }
  }
  for (int k = 0; k < kDepth; ++k) {
    for (int i = 0; i < 16; ++i) {
      for (int j = 0; j < 8; ++j) d[i][j] += a[i][k] * b[k][j];
    }
  }
  for (int lane = 0; lane < int(kWarp); ++lane) {
    Mma& to = *static_cast<Mma*>(lanes[lane]);
    for (int i = 0; i < 4; ++i) to.d.of[i] = d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
  }
}

}  // namespace

Floats mma_k16(Format format, Floats d, Words a, uint32_t b0, uint32_t b1) {
  Mma own{d, a, {b0, b1}};
  if (format == Format::half) {
    meet("mma m16n8k16 of half", ~0u, &own, complete_mma<Format::half, 16>, HERE);
  } else {
    meet("mma m16n8k16 of bfloat16", ~0u, &own, complete_mma<Format::bfloat16, 16>, HERE);
  }
  return own.d;
}

Floats mma_k8(Format format, Floats d, Words a, uint32_t b0, uint32_t b1) {
  Mma own{d, a, {b0, b1}};
  if (format == Format::half) {
    meet("mma m16n8k8 of half", ~0u, &own, complete_mma<Format::half, 8>, HERE);
  } else if (format == Format::bfloat16) {
    meet("mma m16n8k8 of bfloat16", ~0u, &own, complete_mma<Format::bfloat16, 8>, HERE);
  } else {
    meet("mma m16n8k8 of tf32", ~0u, &own, complete_mma<Format::tf32, 8>, HERE);
  }
  return own.d;
}

// Memory.

namespace {

bool is_shared(Address p, size_t bytes) { return p >= Address(shared) && p + bytes <= Address(shared) + shared_bytes; }

Shadow& shadow_of(Address p) { return shadow[(p - Address(shared)) / kGranule]; }

std::string describe(const Access& access, const char* what) {
  return thread_name(access.thread) + " " + what + where(access.site);
}

// Whether a barrier lies between `earlier` and what `fiber` does now.
bool is_ordered(const Access& earlier, const Fiber& fiber) {
  return earlier.time < block_time || earlier.thread == fiber.thread ||
         (earlier.thread / kWarp == fiber.thread / kWarp && earlier.time < fiber.synced[earlier.thread % kWarp]);
}

void record_shared(const Fiber& fiber, Address p, size_t bytes, bool write, const char* what, Site site) {
  const Access access{now, fiber.thread, site};
  for (Address q = p & -kGranule; q < p + bytes; q += kGranule) {
    Shadow& s = shadow_of(q);
    const size_t offset = q - Address(shared);
    if (s.in_flight) {
      fail_here(fiber,
                format("%s of shared byte %zu, to which a cp_async is under way, that of ", what, offset) +
                    describe(s.write, "issued") + "; here",
                site);
    }
    if (!is_ordered(s.write, fiber)) {
      fail_here(fiber,
                format("race: %s of shared byte %zu, with no barrier after ", what, offset) +
                    describe(s.write, "wrote it") + "; here",
                site);
    }
    if (write) {
      for (const Access& read : {s.read, s.other_read}) {
        if (!is_ordered(read, fiber)) {
          fail_here(fiber,
                    format("race: %s of shared byte %zu, with no barrier after ", what, offset) +
                        describe(read, "read it") + "; here",
                    site);
        }
      }
      s.write = access;
    } else {
      // Of many readers two are kept: the last, and the last of another warp if there is one.
      if (s.read.thread != fiber.thread && s.read.time >= block_time &&
          (s.other_read.time < block_time || s.read.thread / kWarp != fiber.thread / kWarp)) {
        s.other_read = s.read;
      }
      s.read = access;
    }
  }
}

// The parts of this library in memory: a kernel may read its constants.
const std::vector<std::pair<Address, Address>>& own_segments() {
  static const auto segments = [] {
    std::vector<std::pair<Address, Address>> found;
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* found) {
          std::vector<std::pair<Address, Address>> segments;
          bool own = false;
          for (int i = 0; i < info->dlpi_phnum; ++i) {
            const auto& header = info->dlpi_phdr[i];
            if (header.p_type != PT_LOAD) continue;
            const Address begin = info->dlpi_addr + header.p_vaddr;
            segments.emplace_back(begin, begin + header.p_memsz);
            own |= begin <= Address(&threadIdx) && Address(&threadIdx) < begin + header.p_memsz;
          }
          if (own) *static_cast<decltype(segments)*>(found) = segments;
          return int(own);
        },
        &found);
    return found;
  }();
  return segments;
}

// Where a bad address lies, in words.
std::string place(Address p, size_t bytes) {
  if (p + bytes > Address(shared_arena) && p < Address(shared_arena + sizeof shared_arena)) {
    const auto offset = static_cast<long long>(p - Address(shared));
    return format("byte %lld of %zu bytes of shared memory", offset, shared_bytes);
  }
  for (const auto& fiber : fibers) {
    if (p >= Address(fiber->stack) && p < Address(fiber->stack) + kStack)
      return "the stack of " + thread_name(fiber->thread);
  }
  const Range* nearest = nullptr;
  size_t distance = 0;
  for (const Range& range : ranges) {
    const size_t here = p + bytes > range.end ? p + bytes - range.end : p < range.begin ? range.begin - p : 0;
    if (!nearest || here < distance) nearest = &range, distance = here;
  }
  if (!nearest) return format("%#zx, and no tensor is known", p);
  const size_t size = nearest->end - nearest->begin;
  return format("%#zx, %zu bytes %s %s of %zu bytes", p, distance, p < nearest->begin ? "before" : "past the end of",
                nearest->name.c_str(), size);
}

// Blocks come in no order: what one has written none of the others may read or write.
void record_global(const Fiber& fiber, const Range& range, Address p, size_t bytes, bool write, const char* what,
                   Site site) {
  uint32_t* const writers = range.writers + (p - range.begin);
  for (size_t i = 0; i < bytes; ++i) {
    if (writers[i] && writers[i] != block_number + 1) {
      const dim3 other = block_index(writers[i] - 1);
      fail_here(fiber,
                format("race: %s of byte %zu of %s, which block (%u, %u, %u) wrote in this launch", what,
                       p + i - range.begin, range.name.c_str(), other.x, other.y, other.z),
                site);
    }
    if (write) writers[i] = block_number + 1;
  }
}

void check_access(const Fiber& fiber, Address p, size_t bytes, bool write, const char* what, Site site) {
  if (p >= Address(fiber.stack) && p + bytes <= Address(fiber.stack) + kStack) return;
  if (is_shared(p, bytes)) return record_shared(fiber, p, bytes, write, what, site);
  for (const Range& range : ranges) {
    if (p >= range.begin && p + bytes <= range.end) return record_global(fiber, range, p, bytes, write, what, site);
  }
  const bool in_arena = p < Address(shared_arena + sizeof shared_arena) && p + bytes > Address(shared_arena);
  if (!write && !in_arena) {
    for (const auto& [begin, end] : own_segments()) {
      if (p >= begin && p + bytes <= end) return;
    }
  }
  fail_here(fiber, format("%s of %zu bytes at ", what, bytes) + place(p, bytes), site);
}

void check_aligned(const Fiber& fiber, const void* p, size_t bytes, const char* what, Site site) {
  if (Address(p) % bytes) fail_here(fiber, format("%s at %p, which is not aligned to %zu bytes", what, p, bytes), site);
}

// The callbacks' side: what a kernel loads and stores. Code of the host passes.
void access(const void* p, size_t bytes, size_t alignment, bool write, Site site) {
  if (!running) return;
  const char* const what = write ? "write" : "read";
  check_aligned(*running, p, alignment, what, site);
  check_access(*running, Address(p), bytes, write, what, site);
}

struct MatrixRow {
  const void* row;
  Words result;
  Fiber* fiber;
};

template <bool kTransposed>
void complete_ldmatrix(void* const* lanes, unsigned) {
  uint16_t matrix[4][8][8];
  for (unsigned i = 0; i < kWarp; ++i) {
    const MatrixRow& from = *static_cast<MatrixRow*>(lanes[i]);
    const Fiber& fiber = *from.fiber;
    check_aligned(fiber, from.row, 16, "ldmatrix", fiber.site);
    if (!is_shared(Address(from.row), 16)) {
      fail_here(fiber, "ldmatrix of 16 bytes at " + place(Address(from.row), 16), fiber.site);
    }
    record_shared(fiber, Address(from.row), 16, false, "ldmatrix", fiber.site);
    memcpy(matrix[i / 8][i % 8], from.row, 16);
  }
  for (unsigned i = 0; i < kWarp; ++i) {
    const unsigned row = i / 4, column = i % 4 * 2;
    for (int m = 0; m < 4; ++m) {
      const uint16_t low = kTransposed ? matrix[m][column][row] : matrix[m][row][column];
      const uint16_t high = kTransposed ? matrix[m][column + 1][row] : matrix[m][row][column + 1];
      static_cast<MatrixRow*>(lanes[i])->result.of[m] = low | uint32_t(high) << 16;
    }
  }
}

}  // namespace

Words ldmatrix(const void* row, bool transposed) {
  MatrixRow own{row, {}, running};
  if (transposed) {
    meet("ldmatrix_transposed", ~0u, &own, complete_ldmatrix<true>, HERE);
  } else {
    meet("ldmatrix", ~0u, &own, complete_ldmatrix<false>, HERE);
  }
  return own.result;
}

// The bytes are NaN until they arrive, and whoever touches them is reported. When the source is read is left to chance,
// between here and there.
void cp_async(void* to, const void* from, bool valid) {
  Fiber& self = *running;
  check_aligned(self, to, 16, "cp_async", HERE);
  check_aligned(self, from, 16, "cp_async", HERE);
  if (!is_shared(Address(to), 16)) fail_here(self, "cp_async of 16 bytes to " + place(Address(to), 16), HERE);
  if (valid) check_access(self, Address(from), 16, false, "cp_async", HERE);
  record_shared(self, Address(to), 16, true, "cp_async", HERE);
  for (size_t i = 0; i < 16; i += kGranule) shadow_of(Address(to) + i).in_flight = true;
  memset(to, 0xff, 16);
  Copy copy{static_cast<char*>(to),
            valid ? static_cast<const char*>(from) : nullptr,
            bool(random_number() & 1),
            self.groups,
            {}};
  if (valid && copy.early) memcpy(copy.data.data(), from, 16);
  self.copies.push_back(copy);
}

void cp_async_commit() { ++running->groups; }

void cp_async_wait(int groups) {
  Fiber& self = *running;
  const auto arrived = [&](const Copy& copy) { return copy.group < self.groups - groups; };
  for (const Copy& copy : self.copies) {
    if (!arrived(copy)) continue;
    if (copy.from) memcpy(copy.to, copy.early ? copy.data.data() : copy.from, 16);
    if (!copy.from) memset(copy.to, 0, 16);
    for (size_t i = 0; i < 16; i += kGranule) {
      Shadow& s = shadow_of(Address(copy.to) + i);
      s.in_flight = false;
      s.write = {now, self.thread, HERE};
    }
  }
  self.copies.erase(std::remove_if(self.copies.begin(), self.copies.end(), arrived), self.copies.end());
}

void* shared_memory() { return shared; }

cudaError_t set_shared_limit(const void* kernel, int bytes) {
  if (bytes < 0 || size_t(bytes) > kMostShared) return last_error = cudaErrorInvalidValue;
  shared_limits[kernel] = size_t(bytes);
  return cudaSuccess;
}

void launch(const char* kernel, const void* function, dim3 grid, dim3 block, size_t bytes, void (*run)(const void*),
            const void* with) {
  const auto within = [](dim3 d, unsigned x, unsigned y, unsigned z) {
    return d.x > 0 && d.x <= x && d.y > 0 && d.y <= y && d.z > 0 && d.z <= z;
  };
  if (!within(grid, 0x7fffffff, 65535, 65535) || !within(block, 1024, 1024, 64) || block.x * block.y * block.z > 1024) {
    last_error = cudaErrorInvalidConfiguration;
    return;
  }
  const auto limit = shared_limits.find(function);
  if (bytes > std::max(limit == shared_limits.end() ? 0 : limit->second, kSharedLimit)) {
    last_error = cudaErrorInvalidValue;
    return;
  }
  kernel_name = kernel, kernel_function = function, run_kernel = run, arguments = with, shared_bytes = bytes;
  gridDim = grid, blockDim = block, threads = block.x * block.y * block.z;
  while (fibers.size() < threads) fibers.push_back(new_fiber());
  warps.assign((threads + kWarp - 1) / kWarp, {});
  random_state = seed;
  for (const Range& range : ranges) madvise(range.writers, range.writers_bytes(), MADV_DONTNEED);  // zeros again
  // Blocks come in an order of which a kernel can know nothing: from a random one, in random steps.
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z, start = random_number() % blocks;
  uint64_t step = 1 + random_number() % blocks;
  while (std::gcd(step, blocks) != 1) ++step;
  for (uint64_t i = 0; i < blocks; ++i) {
    block_number = uint32_t((start + i * step) % blocks);
    blockIdx = block_index(block_number);
    if (!run_block()) return abandon_block();
  }
}

}  // namespace emulator

cudaError_t cudaPeekAtLastError() { return emulator::last_error; }

cudaError_t cudaGetLastError() { return std::exchange(emulator::last_error, cudaSuccess); }

const char* cudaGetErrorString(cudaError_t error) {
  constexpr const char* names[] = {"no error", "invalid argument", "misaligned address",
                                   "invalid configuration argument"};
  return error == cudaErrorLaunchFailure ? emulator::report.c_str() : names[error];
}

// What the test suite sets, by name.

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT void emulator_set_seed(uint64_t seed) { emulator::seed = seed; }

EXPORT void emulator_register_range(const char* name, uintptr_t begin, size_t bytes) {
  emulator::Range range{name, begin, begin + bytes, nullptr};
  range.writers = static_cast<uint32_t*>(emulator::reserve(range.writers_bytes()));
  emulator::ranges.push_back(range);
}

EXPORT const char* emulator_error_string(int error) { return cudaGetErrorString(cudaError_t(error)); }

EXPORT void emulator_clear_ranges() {
  for (const emulator::Range& range : emulator::ranges) munmap(range.writers, range.writers_bytes());
  emulator::ranges.clear();
}

// What -fsanitize=thread calls. A 16-byte access may be of two aligned eights: -fsanitize=alignment knows the types.

#define CALLBACKS(bytes)                                                                                          \
  extern "C" void __tsan_read##bytes(void* p) { emulator::access(p, bytes, bytes < 8 ? bytes : 8, false, HERE); } \
  extern "C" void __tsan_write##bytes(void* p) { emulator::access(p, bytes, bytes < 8 ? bytes : 8, true, HERE); } \
  extern "C" void __tsan_unaligned_read##bytes(void* p) { emulator::access(p, bytes, 1, false, HERE); }           \
  extern "C" void __tsan_unaligned_write##bytes(void* p) { emulator::access(p, bytes, 1, true, HERE); }
CALLBACKS(1)
CALLBACKS(2)
CALLBACKS(4)
CALLBACKS(8)
CALLBACKS(16)
extern "C" void __tsan_read_range(void* p, size_t bytes) { emulator::access(p, bytes, 1, false, HERE); }
extern "C" void __tsan_write_range(void* p, size_t bytes) { emulator::access(p, bytes, 1, true, HERE); }
extern "C" void __tsan_init() {}

// What -fsanitize=alignment,bounds,... call, with the place in the source first.

namespace emulator {
namespace {
struct Place {
  const char* file;
  uint32_t line, column;
};
[[noreturn]] void undefined(const Place& place, const char* what) {
  const char* const slash = strrchr(place.file, '/');
  const std::string text = format("%s at %s:%u", what, slash ? slash + 1 : place.file, place.line);
  if (running) fail_here(*running, text, nullptr);
  fprintf(stderr, "host code: %s\n", text.c_str());
  abort();
}
}  // namespace
}  // namespace emulator

#define UNDEFINED(name, what) \
  extern "C" void __ubsan_handle_##name(const emulator::Place* place) { emulator::undefined(*place, what); }
UNDEFINED(type_mismatch_v1, "access by a misaligned pointer")
UNDEFINED(out_of_bounds, "index out of bounds")
UNDEFINED(add_overflow, "signed overflow of +")
UNDEFINED(sub_overflow, "signed overflow of -")
UNDEFINED(mul_overflow, "signed overflow of *")
UNDEFINED(negate_overflow, "signed overflow of -")
UNDEFINED(divrem_overflow, "division by zero or its overflow")
