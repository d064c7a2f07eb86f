// Block copies between host tensors, on several threads when there is enough to copy.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "kv_copy.h"

namespace {

// Below this many bytes a thread costs more than it saves.
constexpr int64_t kMinBytesPerThread = 2 << 20;

// Copies larger than this leave the caches anyway, so the stores go round them.
constexpr int64_t kStreamFromBytes = 4 << 20;

struct Job {
  const HxPiece* pieces;
  int64_t num_pieces;
  const int64_t* block_ids;
  uint8_t* records;
  int64_t record_bytes;
  bool to_records;
  bool streaming;
};

// Stores that do not read the destination first: a third less memory traffic.
void copy_streaming(uint8_t* to, const uint8_t* from, int64_t count) {
#if defined(__SSE2__)
  const int64_t head =
      std::min<int64_t>(count, -reinterpret_cast<intptr_t>(to) & 15);
  std::memcpy(to, from, head);
  to += head, from += head, count -= head;
  for (; count >= 64; count -= 64, to += 64, from += 64) {
    const auto* src = reinterpret_cast<const __m128i*>(from);
    auto* dst = reinterpret_cast<__m128i*>(to);
    const __m128i a = _mm_loadu_si128(src), b = _mm_loadu_si128(src + 1);
    const __m128i c = _mm_loadu_si128(src + 2), d = _mm_loadu_si128(src + 3);
    _mm_stream_si128(dst, a);
    _mm_stream_si128(dst + 1, b);
    _mm_stream_si128(dst + 2, c);
    _mm_stream_si128(dst + 3, d);
  }
#endif
  std::memcpy(to, from, count);
}

// Items are (block, piece) pairs, pieces running fastest.
void copy_items(const Job& job, int64_t first, int64_t last) {
  int64_t record = first / job.num_pieces;
  int64_t number = first % job.num_pieces;
  for (int64_t item = first; item < last; ++item) {
    const HxPiece& piece = job.pieces[number];
    auto* paged = reinterpret_cast<uint8_t*>(piece.address) +
                  job.block_ids[record] * piece.block_stride;
    uint8_t* packed = job.records + record * job.record_bytes + piece.record_offset;
    uint8_t* to = job.to_records ? packed : paged;
    const uint8_t* from = job.to_records ? paged : packed;
    if (job.streaming) {
      copy_streaming(to, from, piece.num_bytes);
    } else {
      std::memcpy(to, from, piece.num_bytes);
    }
    if (++number == job.num_pieces) number = 0, ++record;
  }
#if defined(__SSE2__)
  if (job.streaming) _mm_sfence();
#endif
}

void run(const Job& job, int64_t num_ids, int32_t max_threads) {
  const int64_t items = num_ids * job.num_pieces;
  const int64_t bytes = num_ids * job.record_bytes;
  const int64_t workers = std::clamp<int64_t>(
      std::min<int64_t>(bytes / kMinBytesPerThread, items), 1, std::max(max_threads, 1));
  std::vector<std::thread> threads;
  threads.reserve(workers - 1);
  int64_t done = 0;
  try {
    for (; done < workers - 1; ++done) {
      threads.emplace_back(copy_items, std::cref(job), items * done / workers,
                           items * (done + 1) / workers);
    }
  } catch (const std::system_error&) {
    // No more threads to be had: this one copies what is left.
  }
  copy_items(job, items * done / workers, items);
  for (std::thread& thread : threads) thread.join();
}

}  // namespace

// Copies num_ids blocks: into the records when to_records is not 0, else out of them.
HX_EXPORT void hx_cpu_copy_blocks(const HxPiece* pieces, int64_t num_pieces,
                                  const int64_t* block_ids, int64_t num_ids, uint8_t* records,
                                  int64_t record_bytes, int32_t to_records,
                                  int32_t max_threads) {
  const Job job{pieces,       num_pieces,      block_ids, records,
                record_bytes, to_records != 0, num_ids * record_bytes >= kStreamFromBytes};
  run(job, num_ids, max_threads);
}
