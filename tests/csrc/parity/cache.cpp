// Rotation of new queries and keys, and attention over the cache.
#include "reference.h"

namespace parity {

constexpr Type kTypes[] = {Type::float32, Type::bfloat16, Type::float16, Type::float8};

void rotations() {
  const int page = 4, groups = 2, heads = 3;
  const int64_t tokens = 5, pages = 3, angle_rows = 40;
  Random random(4);
  for (int64_t dim : {10, 64, 80, 96, 128})
    for (Type type : {Type::float32, Type::bfloat16, Type::float16})
      for (Type cache_type : kTypes)
        for (bool norm : {false, true}) {
          const Angles angles(angle_rows, dim / 2);
          const int64_t row = (heads + 2 * groups) * dim, numbers_of_cache = pages * page * groups * dim;
          const auto qkv = stored(type, tokens * row, random);
          const int32_t positions[] = {0, 7, 39, 100, 3};
          const int64_t slots[] = {11, 0, -1, 5, 6};
          const Floats q_weight = random.normals(dim), k_weight = random.normals(dim), k_scale = {0.25f, 0.5f},
                       v_scale = {0.125f, 1.0f};
          const bool scaled = cache_type == Type::float8;
          const Doubles from = numbers(type, qkv.data(), tokens * row);
          for (const Form& form : usable()) {
            std::vector<char> keys(at(numbers_of_cache) * size_of(cache_type), 0x11),
                values = keys, q(at(tokens * heads * dim) * size_of(type), 0x11);
            const std::vector<char> before = keys;
            const Cache cache{keys.data(),
                              values.data(),
                              scaled ? k_scale.data() : nullptr,
                              scaled ? v_scale.data() : nullptr,
                              page * groups * dim,
                              pages * page,
                              page,
                              groups,
                              static_cast<int>(dim),
                              cache_type};
            const Rope rope{angles.cos.data(),
                            angles.sin.data(),
                            angle_rows,
                            positions,
                            slots,
                            norm ? q_weight.data() : nullptr,
                            norm ? k_weight.data() : nullptr,
                            Type::float32,
                            1e-6f,
                            heads};
            form.table->rope_append_kv({rope, cache, qkv.data(), q.data(), type, tokens, row, 1});
            std::vector<char> written(at(pages * page));
            for (int64_t n = 0; n < tokens; ++n)
              for (int64_t head = 0; head < heads + 2 * groups; ++head) {
                const Doubles x(from.begin() + n * row + head * dim, from.begin() + n * row + (head + 1) * dim);
                const int64_t position = std::min<int64_t>(positions[n], angle_rows - 1),
                              group = (head - heads) % groups;
                const bool is_query = head < heads, is_value = head >= heads + groups;
                const float* weight = is_query ? q_weight.data() : k_weight.data();
                const auto turn = [&](const Doubles& of) {
                  return turned(of, norm ? weight : nullptr, 1e-6, angles.cos.data() + position * dim / 2,
                                angles.sin.data() + position * dim / 2);
                };
                const Doubles truth = is_value ? x : turn(x);
                if (slots[n] < 0 && !is_query) continue;
                if (slots[n] >= 0) written[at(slots[n])] = 1;
                const float divisor = !scaled || is_query ? 1 : is_value ? v_scale[at(group)] : k_scale[at(group)];
                const Type to = is_query ? type : cache_type;
                const void* place = is_query ? q.data() : is_value ? values.data() : keys.data();
                const int64_t first = is_query ? (n * heads + head) * dim : (slots[n] * groups + group) * dim;
                const double size =
                    largest(truth) + (is_value ? 0 : largest(x) * (norm ? largest(Doubles(weight, weight + dim)) : 1));
                for (int64_t d = 0; d < dim; ++d) {
                  const double wanted = slots[n] < 0 ? 0 : truth[at(d)] / divisor, got = value_of(to, place, first + d);
                  // the sum of squares is off by D roundings, its root by half; then the products; then storing
                  const double bound =
                      (static_cast<double>(dim) / 2 + 8) * kEps / 2 * (is_value ? 0 : 2 * size / divisor) +
                      1.001 * eps_of(to) / 2 * std::fabs(wanted) + least_of(to) / 2;
                  expect(std::fabs(got - wanted) <= bound,
                         "%s: rope_append_kv, head_dim %ld, types %d to %d, norm %d: token %ld head %ld number %ld is "
                         "%g, not %g",
                         form.table->name, long(dim), int(type), int(cache_type), norm, long(n), long(head), long(d),
                         got, wanted);
                }
              }
            const size_t bytes = at(groups * dim) * size_of(cache_type);
            for (size_t slot = 0; slot < written.size(); ++slot)
              if (!written[slot])
                expect(std::memcmp(&keys[slot * bytes], &before[slot * bytes], bytes) == 0 &&
                           std::memcmp(&values[slot * bytes], &before[slot * bytes], bytes) == 0,
                       "%s: rope_append_kv wrote to slot %zu", form.table->name, slot);
          }
        }
}

void attention() {
  struct Case {
    int heads, groups, dim;
  };
  const int page = 16;
  const std::vector<int32_t> lengths = {0, 1, 3, 6, 255, 256, 257, 600};
  const auto batch = static_cast<int64_t>(lengths.size());
  const int64_t width = 38, pages = 90;
  std::vector<int32_t> table(at(batch * width), -1);
  int32_t next = 0;
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t i = 0; i * page < lengths[at(b)]; ++i)
      table[at(b * width + i)] = static_cast<int32_t>(next++ * 37 % pages);
  Random random(5);
  for (const Case& c : {Case{4, 1, 64}, Case{6, 2, 80}, Case{7, 1, 96}, Case{2, 2, 10}, Case{5, 1, 128}})
    for (Type type : {Type::float32, Type::bfloat16})
      for (Type cache_type : kTypes) {
        if (type == Type::bfloat16 && c.dim != 80) continue;
        const int64_t count = pages * page * c.groups * c.dim, row = c.heads * c.dim;
        auto keys = stored(cache_type, count, random), values = stored(cache_type, count, random);
        const auto q = stored(type, batch * row, random);
        const Floats k_scale = {0.5f, 0.25f}, v_scale = {2.0f, 0.75f};
        const bool scaled = cache_type == Type::float8;
        const Doubles k = numbers(cache_type, keys.data(), count), v = numbers(cache_type, values.data(), count);
        const Doubles queries = numbers(type, q.data(), batch * row);
        const float scale = 1 / std::sqrt(static_cast<float>(c.dim));
        std::vector<Attended> truths;
        for (int64_t b = 0; b < batch; ++b)
          for (int64_t head = 0; head < c.heads; ++head) {
            const int64_t group = head / (c.heads / c.groups);
            const auto place = [&, group](const Doubles& of, int64_t t) {
              return of.data() +
                     ((table[at(b * width + t / page)] * int64_t{page} + t % page) * c.groups + group) * c.dim;
            };
            truths.push_back(attend(
                queries.data() + b * row + head * c.dim, c.dim, scale * (scaled ? k_scale[at(group)] : 1),
                lengths[at(b)], [&](int64_t t) { return place(k, t); }, [&](int64_t t) { return place(v, t); }));
          }
        for (const Form& form : usable()) {
          std::vector<char> out(at(batch * row) * size_of(type), 0x11), again = out;
          Floats scratch(at(batch * row + attention_scratch(lengths.data(), batch, c.heads, c.dim)), NAN);
          const Cache cache{keys.data(),
                            values.data(),
                            scaled ? k_scale.data() : nullptr,
                            scaled ? v_scale.data() : nullptr,
                            int64_t{page} * c.groups * c.dim,
                            pages * page,
                            page,
                            c.groups,
                            c.dim,
                            cache_type};
          AttentionCall call{cache,
                             {table.data(), lengths.data(), width},
                             q.data(),
                             out.data(),
                             type,
                             batch,
                             row,
                             c.heads,
                             1,
                             scale,
                             scratch.data()};
          form.table->decode_attention(call);
          for (int64_t b = 0; b < batch; ++b)
            for (int64_t head = 0; head < c.heads; ++head) {
              const Attended& truth = truths[at(b * c.heads + head)];
              const double v_factor = scaled ? v_scale[at(head / (c.heads / c.groups))] : 1;
              // scores are off by D + 4 roundings, which change p and its sum; then the sums over tokens
              const double relative = (2 * (c.dim + 4) * truth.score + 2 * lengths[at(b)] + 16) * kEps / 2;
              for (int64_t d = 0; d < c.dim; ++d) {
                const double got = value_of(type, out.data(), b * row + head * c.dim + d),
                             wanted = truth.out[at(d)] * v_factor;
                const double bound =
                    relative * truth.magnitude[at(d)] * v_factor + 1.001 * eps_of(type) / 2 * std::fabs(wanted);
                expect(std::fabs(got - wanted) <= bound,
                       "%s: attention of %d heads, %d groups, head_dim %d, types %d, %d, length %d: head %ld number "
                       "%ld is %g, not %g",
                       form.table->name, c.heads, c.groups, c.dim, int(type), int(cache_type), lengths[at(b)],
                       long(head), long(d), got, wanted);
              }
            }
          call.threads = 3, call.out = again.data();
          form.table->decode_attention(call);
          expect(out == again, "%s: attention on three threads is not the same bits", form.table->name);
        }
      }
}

}  // namespace parity
