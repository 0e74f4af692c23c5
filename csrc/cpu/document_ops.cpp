// Attention of packed documents for training on a CPU: checks its arguments and runs the kernels of this processor.
#include <algorithm>
#include <cmath>

#include "../ops.h"
#include "chosen.h"
#include "threads.h"

namespace minimind::cpu {
namespace {

constexpr int64_t kMultiple = 16;

void check(const char* what, const Tensor& t, const Tensor& like, int64_t heads) {
  MINIMIND_CHECK(t.is_cpu() && t.is_contiguous() && t.dtype() == like.dtype(), what, " must be contiguous, on the CPU and ",
                 name(like.dtype()));
  MINIMIND_CHECK(t.dim() == 3 && t.size(0) == like.size(0) && t.size(1) == heads && t.size(2) == like.size(2), what,
                 ": wrong shape");
}

// The documents of cu_seqlens, the longest first: the last tasks to run are the short ones.
std::vector<Document> documents_of(const Tensor& cu_seqlens, int64_t tokens) {
  MINIMIND_CHECK(cu_seqlens.dim() == 1 && cu_seqlens.dtype() == Dtype::int32 && cu_seqlens.is_cpu() &&
                     cu_seqlens.is_contiguous() && cu_seqlens.size(0) > 0,
                 "cu_seqlens must be int32 [n + 1] on the CPU");
  const auto* bounds = cu_seqlens.data<const int32_t>();
  const int64_t count = cu_seqlens.size(0) - 1;
  MINIMIND_CHECK(bounds[0] == 0 && bounds[count] == tokens, "cu_seqlens must go from 0 to the ", tokens, " tokens");
  std::vector<Document> documents;
  for (int64_t i = 0; i < count; ++i) {
    MINIMIND_CHECK(bounds[i] <= bounds[i + 1], "cu_seqlens[", i + 1, "] is less than the one before");
    if (bounds[i] < bounds[i + 1]) documents.push_back({bounds[i], bounds[i + 1] - bounds[i]});
  }
  std::stable_sort(documents.begin(), documents.end(),
                   [](const Document& a, const Document& b) { return a.length > b.length; });
  return documents;
}

DocumentCall call_of(const Tensor& q, const Tensor& k, const Tensor& v, const std::vector<Document>& documents) {
  MINIMIND_CHECK(q.dtype() == Dtype::float32 || q.dtype() == Dtype::bfloat16, "q: ", name(q.dtype()), " is not supported");
  MINIMIND_CHECK(k.dim() == 3 && k.size(1) > 0 && q.dim() == 3 && q.size(1) % k.size(1) == 0, "k: wrong shape");
  MINIMIND_CHECK(q.size(2) % kMultiple == 0, "head_dim must be a multiple of ", kMultiple, ", got ", q.size(2));
  check("q", q, q, q.size(1));
  check("k", k, q, k.size(1));
  check("v", v, q, k.size(1));
  DocumentCall call{};
  call.q = q.data(), call.k = k.data(), call.v = v.data();
  call.documents = documents.data();
  call.num_documents = static_cast<int64_t>(documents.size());
  call.heads = q.size(1), call.groups = k.size(1), call.head_dim = q.size(2);
  call.type = static_cast<Type>(q.dtype());
  call.threads = max_threads();
  call.scale = 1.0f / std::sqrt(static_cast<float>(q.size(2)));
  return call;
}

void run(DocumentCall& call) {
  if (call.num_documents == 0) return;
  call.scratch = scratch(kernels().document_scratch(call) * static_cast<size_t>(call.threads));
  kernels().document_attention(call);
}

Tensor document_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens) {
  const auto documents = documents_of(cu_seqlens, q.size(0));
  DocumentCall call = call_of(q, k, v, documents);
  Tensor out = Tensor::empty({q.size(0), q.size(1), q.size(2)}, q.dtype(), q);
  call.out = out.data();
  run(call);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> document_attention_backward(const Tensor& dout, const Tensor& q, const Tensor& k,
                                                               const Tensor& v, const Tensor& cu_seqlens) {
  const auto documents = documents_of(cu_seqlens, q.size(0));
  DocumentCall call = call_of(q, k, v, documents);
  check("dout", dout, q, q.size(1));
  const auto like = [](const Tensor& t) { return Tensor::empty({t.size(0), t.size(1), t.size(2)}, t.dtype(), t); };
  Tensor dq = like(q), dk = like(k), dv = like(v);
  call.dout = dout.data();
  call.dq = dq.data(), call.dk = dk.data(), call.dv = dv.data();
  run(call);
  return {dq, dk, dv};
}

const Library cpu("CPU", [](Library& m) {
  m.impl("native_document_attention", boxed<document_attention>);
  m.impl("native_document_attention_backward", boxed<document_attention_backward>);
});

}  // namespace
}  // namespace minimind::cpu
