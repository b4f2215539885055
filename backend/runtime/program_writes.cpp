#include "program_writes.h"

#include <string>
#include <vector>

#include "errors.h"
#include "flatbuffer_view.h"
#include "program_schema.h"

namespace cuda_int4 {

using executorch::runtime::Error;
using flatbuffer::Table;
using flatbuffer::Vector;
using namespace program_schema;

namespace {

constexpr std::string_view kOurs = "cuda_int4::";
constexpr std::string_view kView = "executorch_prim::et_view";
constexpr std::string_view kRopeAppend = "cuda_int4::rope_append";  // two caches first
constexpr std::string_view kCopyIndex = "executorch_prim::et_copy_index";
constexpr std::string_view kIndexPut = "cuda_int4::index_put";  // self, indices, values, accumulate
constexpr std::string_view kIndexPutInPlace = "cuda_int4::index_put_";  // the same
constexpr std::string_view kCopyInPlace = "cuda_int4::copy_";           // self, source
constexpr std::string_view kItem = "cuda_int4::_local_scalar_dense";

/// How many tensors an op of ours writes that is no in-place op (a list of them counts as one).
uint32_t n_outputs(std::string_view name, std::string_view overload) {
  struct Several {
    std::string_view name, overload;
    uint32_t n;
  };
  constexpr Several kSeveral[] = {
      {"_native_batch_norm_legit_no_training", "out", 3},
      {"add_rms_norm", "out", 2},
      {"max", "dim_max", 2},
      {"max_pool2d_with_indices", "out", 2},
      {"min", "dim_min", 2},
      {"native_group_norm", "out", 3},
      {"native_layer_norm", "out", 3},
      {"topk", "values", 2},
      {"var_mean", "correction_out", 2},
  };
  for (const Several& one : kSeveral)
    if (name.substr(kOurs.size()) == one.name && overload == one.overload) return one.n;
  return 1;
}

/// The values of one method: which are constants (or whatever else `is_constant` says of their names),
/// and which share memory with one.
class Method {
 public:
  Method(const Table& plan, const std::function<bool(std::string_view)>& is_constant)
      : values_(plan.vector(PlanField::kValues)),
        operators_(plan.vector(PlanField::kOperators)),
        chains_(plan.vector(PlanField::kChains)),
        inputs_(plan.vector(PlanField::kInputs)),
        is_constant_(values_.size(), false),
        shares_(values_.size(), false) {
    for (uint32_t i = 0; i < values_.size(); ++i) {
      const std::string_view name = name_of(i);
      is_constant_[i] = shares_[i] = name.data() != nullptr && is_constant(name);
    }
    find_views();
  }

  Error check(const char* what) const {
    for (uint32_t i = 0; i < inputs_.size(); ++i) {
      const auto input = uint32_t(inputs_.scalar<int32_t>(i));
      if (is_constant_[input]) return wrong(what, "an input", input);
    }
    Error error = Error::Ok;
    each_instruction([&](uint8_t type, const Table& call) {
      if (error != Error::Ok) return;
      if (type == kKernelCall) {
        error = check_call(what, call);
      } else if (type == kMoveCall || type == kFreeCall) {
        const auto first = uint32_t(call.scalar<int32_t>(0, 0));
        const auto changed = type == kMoveCall ? uint32_t(call.scalar<int32_t>(1, 0)) : first;
        if (is_constant_[changed]) error = wrong(what, "a move or free", changed);
        if (is_tensor(first) != is_tensor(changed)) error = wrong_kind(what, "a move");
      }
    });
    return error;
  }

  bool writes_by_position() const {
    bool all = true;
    each_instruction([&](uint8_t type, const Table& call) {
      all = all && (type == kKernelCall ? writes_rows(call) : type != kMoveCall);
    });
    return all;
  }

 private:
  uint8_t type_of(uint32_t value) const {
    return Table(values_.offset(value)).scalar<uint8_t>(ValueField::kType, 0);
  }
  bool is_tensor(uint32_t value) const { return type_of(value) == kTensor; }
  std::string_view name_of(uint32_t value) const {
    if (!is_tensor(value)) return {};
    return Table(values_.offset(value))
        .table(ValueField::kValue)
        .table(TensorField::kExtra)
        .string(ExtraField::kName);
  }
  template <typename F>
  void each_instruction(F f) const {
    for (uint32_t c = 0; c < chains_.size(); ++c) {
      const Vector instructions = Table(chains_.offset(c)).vector(2);
      for (uint32_t i = 0; i < instructions.size(); ++i) {
        const Table instruction(instructions.offset(i));
        f(instruction.scalar<uint8_t>(0, 0), instruction.table(1));
      }
    }
  }
  Table operator_of(const Table& call) const {
    return Table(operators_.offset(uint32_t(call.scalar<int32_t>(0, 0))));
  }

  /// Follows what hands a tensor's memory on: et_view, and moves.
  void find_views() {
    std::vector<std::vector<uint32_t>> views(values_.size());
    each_instruction([&](uint8_t type, const Table& call) {
      if (type == kMoveCall)
        views[uint32_t(call.scalar<int32_t>(0, 0))].push_back(uint32_t(call.scalar<int32_t>(1, 0)));
      if (type != kKernelCall || operator_of(call).string(0) != kView) return;
      const Vector args = call.vector(1);
      if (args.size() > 2)
        views[uint32_t(args.scalar<int32_t>(0))].push_back(uint32_t(args.scalar<int32_t>(2)));
    });
    std::vector<uint32_t> to_do;
    for (uint32_t i = 0; i < shares_.size(); ++i)
      if (shares_[i]) to_do.push_back(i);
    while (!to_do.empty()) {
      const uint32_t from = to_do.back();
      to_do.pop_back();
      for (const uint32_t view : views[from]) {
        if (shares_[view]) continue;
        shares_[view] = true;
        to_do.push_back(view);
      }
    }
  }

  /// What an instruction puts in the place of a value is of its kind: who reads it relies on that.
  Error wrong_kind(const char* what, const char* writer) const {
    return fail(
        Error::InvalidProgram,
        "%s: expected tensors in the place of tensors and numbers in that of numbers, found "
        "%.200s; the file is damaged, export it again",
        what, writer);
  }

  /// The arguments that a call writes: the first n and those in [begin, end).
  struct Written {
    uint32_t n, begin, end;
  };
  static Written written_by(const Table& op, uint32_t n_args) {
    const std::string_view name = op.string(0), overload = op.string(1);
    if (name == kCopyIndex) return {1, 0, 0};
    const auto last = [&](uint32_t n) { return n < n_args ? n_args - n : 0; };
    // Behind what an op writes the emitter puts what it returns: the same again.
    if (!name.empty() && name.back() == '_') return {1, last(1), n_args};
    if (name == kRopeAppend) return {2, last(4), n_args};  // scales (or None), output, again
    if (name.substr(0, kOurs.size()) != kOurs) return {0, last(1), n_args};
    return {0, last(n_outputs(name, overload) + 1), n_args};
  }

  /// Whether a call leaves the values alone that share memory, or writes to rows of them that it is
  /// given the numbers of.
  bool writes_rows(const Table& call) const {
    const Table op = operator_of(call);
    const Vector args = call.vector(1);
    const std::string_view name = op.string(0);
    const auto argument = [&](uint32_t i) { return uint32_t(args.scalar<int32_t>(i)); };
    if (name == kView || name == kRopeAppend) return true;
    if (name == kIndexPutInPlace && puts_rows(args)) return true;
    if (name == kCopyInPlace && args.size() > 1 &&
        is_put_into(int64_t(argument(1)), int64_t(argument(0))))
      return true;
    const Written written = written_by(op, args.size());
    for (uint32_t i = 0; i < args.size(); ++i) {
      if (i >= written.n && (i < written.begin || i >= written.end)) continue;
      uint32_t found = 0;
      if (is_among(shares_, argument(i), &found)) return false;
    }
    return true;
  }

  Error check_call(const char* what, const Table& call) const {
    const Table op = operator_of(call);
    const Vector args = call.vector(1);
    const Written written = written_by(op, args.size());
    const std::string_view name = op.string(0);
    const bool is_in_place = !name.empty() && name.back() == '_';
    const bool is_of_numbers = name == kItem || (name.substr(0, kOurs.size()) != kOurs &&
                                                 name != kView && name != kCopyIndex);
    if ((is_in_place || is_of_numbers) && args.size() > 0 &&
        is_tensor(uint32_t(args.scalar<int32_t>(args.size() - 1))) != is_in_place)
      return wrong_kind(what, std::string(name).c_str());
    for (uint32_t i = 0; i < args.size(); ++i) {
      if (i >= written.n && (i < written.begin || i >= written.end)) continue;
      const Error error = check_written(what, op, uint32_t(args.scalar<int32_t>(i)));
      if (error != Error::Ok) return error;
    }
    return Error::Ok;
  }

  /// Whether the arguments of an index_put overwrite, and do not add up.
  bool puts_rows(const Vector& args) const {
    if (args.size() < 4) return false;
    const auto accumulate = uint32_t(args.scalar<int32_t>(3));
    return type_of(accumulate) == kBool &&
           !Table(values_.offset(accumulate)).table(ValueField::kValue).scalar<uint8_t>(0, 0);
  }

  /// Whether `value` is nothing but `self` with some of its rows overwritten: what is copied back then.
  bool is_put_into(int64_t value, int64_t self) const {
    bool is_put = false, is_other = false;
    each_instruction([&](uint8_t type, const Table& call) {
      if (type != kKernelCall) return;
      const Table op = operator_of(call);
      const Vector args = call.vector(1);
      const Written written = written_by(op, args.size());
      for (uint32_t i = 0; i < args.size(); ++i) {
        if ((i >= written.n && (i < written.begin || i >= written.end)) ||
            args.scalar<int32_t>(i) != value)
          continue;
        const bool puts =
            op.string(0) == kIndexPut && puts_rows(args) && args.scalar<int32_t>(0) == self;
        (puts ? is_put : is_other) = true;
      }
    });
    return is_put && !is_other;
  }

  /// Whether a value, or one of the list that it is, is among `set`: *found.
  bool is_among(const std::vector<bool>& set, uint32_t value, uint32_t* found) const {
    *found = value;
    if (set[value]) return true;
    const uint8_t type = type_of(value);
    if (type != kTensorList && type != kOptionalTensorList) return false;
    const Vector items = Table(values_.offset(value)).table(ValueField::kValue).vector(kItems);
    for (uint32_t i = 0; i < items.size(); ++i) {
      const int32_t item = items.scalar<int32_t>(i);
      if (item < 0 || !set[uint32_t(item)]) continue;
      *found = uint32_t(item);
      return true;
    }
    return false;
  }

  Error check_written(const char* what, const Table& op, uint32_t value) const {
    // A view's memory is set, not written to.
    const std::vector<bool>& refused = op.string(0) == kView ? is_constant_ : shares_;
    uint32_t found = value;
    const bool is_wrong = is_among(refused, value, &found);
    return is_wrong ? wrong(what, std::string(op.string(0)).c_str(), found) : Error::Ok;
  }

  Error wrong(const char* what, const char* writer, uint32_t value) const {
    const std::string_view name = name_of(value);
    return fail(Error::InvalidProgram,
                "%s: expected no instruction that writes to a constant, found %s on %.200s; the "
                "file is damaged, export it again",
                what, writer, name.empty() ? "a view of one" : std::string(name).c_str());
  }

  const Vector values_, operators_, chains_, inputs_;
  std::vector<bool> is_constant_, shares_;
};

}  // namespace

Error check_writes(const void* data, const char* what,
                   const std::function<bool(std::string_view name)>& is_constant) {
  const Vector plans = flatbuffer::root(data).vector(ProgramField::kPlans);
  for (uint32_t i = 0; i < plans.size(); ++i) {
    const Error error = Method(Table(plans.offset(i)), is_constant).check(what);
    if (error != Error::Ok) return error;
  }
  return Error::Ok;
}

bool writes_by_position(const void* data,
                        const std::function<bool(std::string_view name)>& is_constant) {
  const auto is_state = [&](std::string_view name) { return !is_constant(name); };
  const Vector plans = flatbuffer::root(data).vector(ProgramField::kPlans);
  for (uint32_t i = 0; i < plans.size(); ++i)
    if (!Method(Table(plans.offset(i)), is_state).writes_by_position()) return false;
  return true;
}

}  // namespace cuda_int4
