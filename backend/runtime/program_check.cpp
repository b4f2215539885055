#include "program_check.h"

#include <cinttypes>
#include <string>

#include "errors.h"
#include "flatbuffer_view.h"
#include "program_schema.h"

namespace cuda_int4 {

using executorch::runtime::Error;
using flatbuffer::Table;
using flatbuffer::Vector;
using namespace program_schema;

namespace {

/// One program being checked; the first thing found wrong is what error() says.
class Checker {
 public:
  Checker(const void* data, const char* what) : program_(flatbuffer::root(data)), what_(what) {}

  Error run(std::vector<MethodShape>* methods) {
    const Vector plans = program_.vector(ProgramField::kPlans);
    const Vector named = program_.vector(ProgramField::kNamedData);
    if (named.present() && !program_.vector(ProgramField::kSegments).present())
      return wrong("named data without segments");
    for (uint32_t i = 0; i < named.size(); ++i)
      if (Table(named.offset(i)).string(0).data() == nullptr)
        return wrong("named data without key");
    for (uint32_t i = 0; i < plans.size(); ++i) {
      MethodShape shape;
      const Error error = plan(Table(plans.offset(i)), &shape);
      if (error != Error::Ok) return error;
      if (methods != nullptr) methods->push_back(shape);
    }
    return Error::Ok;
  }

 private:
  Error wrong(const char* problem) const {
    return fail(Error::InvalidProgram, "%s: %s; the file is damaged, export it again", what_,
                problem);
  }
  Error out_of_range(const char* index, int64_t found, uint64_t n) const {
    return fail(Error::InvalidProgram,
                "%s: expected %s in 0..%" PRId64 ", got %" PRId64
                "; the file is damaged, export it again",
                what_, index, int64_t(n) - 1, found);
  }

  Error indices(const Vector& list, const char* name, uint64_t n, int64_t least = 0) const {
    for (uint32_t i = 0; i < list.size(); ++i) {
      const int64_t index = list.scalar<int32_t>(i);
      if (index < least || index >= int64_t(n)) return out_of_range(name, index, n);
    }
    return Error::Ok;
  }

  Error plan(const Table& plan, MethodShape* shape) {
    shape->name = plan.string(PlanField::kName);
    const Vector values = plan.vector(PlanField::kValues);
    if (shape->name.data() == nullptr || !values.present()) return wrong("a method without values");
    for (uint32_t i = 0; i < values.size(); ++i) {
      const Error error = value(Table(values.offset(i)), values.size());
      if (error != Error::Ok) return error;
      shape->tensors_with_data += tensor(values, i).scalar<uint32_t>(TensorField::kData, 0) != 0;
    }
    for (const int field : {PlanField::kInputs, PlanField::kOutputs}) {
      const Error error = indices(plan.vector(field), "an input or output", values.size());
      if (error != Error::Ok) return error;
    }
    const Vector inputs = plan.vector(PlanField::kInputs);
    for (uint32_t i = 0; i < inputs.size(); ++i)
      shape->planned_inputs += tensor(values, uint32_t(inputs.scalar<int32_t>(i)))
                                   .table(TensorField::kAllocation)
                                   .present();
    const Vector operators = plan.vector(PlanField::kOperators);
    for (uint32_t i = 0; i < operators.size(); ++i)
      if (Table(operators.offset(i)).string(0).data() == nullptr)
        return wrong("an operator without a name");
    const Vector delegates = plan.vector(PlanField::kDelegates);
    for (uint32_t i = 0; i < delegates.size(); ++i) {
      const Error error = delegate(Table(delegates.offset(i)));
      if (error != Error::Ok) return error;
    }
    const Vector chains = plan.vector(PlanField::kChains);
    for (uint32_t i = 0; i < chains.size(); ++i) {
      const Vector instructions = Table(chains.offset(i)).vector(2);
      for (uint32_t j = 0; j < instructions.size(); ++j) {
        const Error error =
            instruction(Table(instructions.offset(j)), values.size(), operators.size(),
                        delegates.size(), instructions.size(), shape);
        if (error != Error::Ok) return error;
      }
    }
    shape->is_one_delegate = is_one_delegate(plan);
    return Error::Ok;
  }

  /// Of a plan whose instructions have been checked.
  static bool is_one_delegate(const Table& plan) {
    const Vector chains = plan.vector(PlanField::kChains);
    if (chains.size() != 1) return false;
    const Vector instructions = Table(chains.offset(0)).vector(2);
    if (instructions.size() != 1) return false;
    const Table instruction(instructions.offset(0));
    if (instruction.scalar<uint8_t>(0, 0) != kDelegateCall) return false;
    const Vector args = instruction.table(1).vector(1);
    const Vector inputs = plan.vector(PlanField::kInputs);
    const Vector outputs = plan.vector(PlanField::kOutputs);
    if (args.size() != inputs.size() + outputs.size()) return false;
    for (uint32_t i = 0; i < args.size(); ++i) {
      const int32_t value = i < inputs.size() ? inputs.scalar<int32_t>(i)
                                              : outputs.scalar<int32_t>(i - inputs.size());
      if (args.scalar<int32_t>(i) != value) return false;
    }
    return true;
  }

  /// Value `i`, not present() where it is no tensor.
  static Table tensor(const Vector& values, uint32_t i) {
    const Table v(values.offset(i));
    return v.scalar<uint8_t>(ValueField::kType, 0) == kTensor ? v.table(ValueField::kValue)
                                                              : Table();
  }

  Error value(const Table& v, uint64_t n_values) const {
    const Table inner = v.table(ValueField::kValue);
    if (!inner.present()) return wrong("a value without content");
    switch (v.scalar<uint8_t>(ValueField::kType, 0)) {
      case kTensorList:
        return indices(inner.vector(kItems), "an item of a list", n_values);
      case kOptionalTensorList:
        return indices(inner.vector(kItems), "an item of a list", n_values, -1);
      case kIntList: {
        const Vector items = inner.vector(kItems);
        for (uint32_t i = 0; i < items.size(); ++i) {
          const int64_t index = items.scalar<int64_t>(i);
          if (index < 0 || index >= int64_t(n_values))
            return out_of_range("an item of a list", index, n_values);
        }
        return Error::Ok;
      }
      default:
        return Error::Ok;
    }
  }

  Error delegate(const Table& d) const {
    const Table reference = d.table(1);
    if (d.string(0).data() == nullptr || !reference.present())
      return wrong("a delegate without name or data");
    const uint32_t index = reference.scalar<uint32_t>(1, 0);
    const bool in_segment = reference.scalar<uint8_t>(0, 0) == 1;
    const Vector data = program_.vector(in_segment ? int(ProgramField::kSegments)
                                                   : int(ProgramField::kDelegateData));
    if (index >= data.size()) return out_of_range("a delegate's data", index, data.size());
    if (!in_segment && !Table(data.offset(index)).vector(0).present())
      return wrong("a delegate without data");
    const Vector specs = d.vector(2);
    for (uint32_t i = 0; i < specs.size(); ++i) {
      const Table spec(specs.offset(i));
      if (spec.string(0).data() == nullptr || !spec.vector(1).present())
        return wrong("a compile spec without key or value");
    }
    return Error::Ok;
  }

  Error instruction(const Table& instruction, uint64_t n_values, uint64_t n_operators,
                    uint64_t n_delegates, uint64_t n_instructions, MethodShape* shape) const {
    const Table call = instruction.table(1);
    if (!call.present()) return wrong("an instruction without arguments");
    const int64_t first = call.scalar<int32_t>(0, 0);
    const int64_t second = call.scalar<int32_t>(1, 0);
    switch (instruction.scalar<uint8_t>(0, 0)) {
      case kKernelCall:
        ++shape->kernel_calls;
        if (first < 0 || first >= int64_t(n_operators))
          return out_of_range("an operator", first, n_operators);
        return indices(call.vector(1), "an argument", n_values);
      case kDelegateCall:
        ++shape->delegate_calls;
        if (first < 0 || first >= int64_t(n_delegates))
          return out_of_range("a delegate", first, n_delegates);
        return indices(call.vector(1), "an argument", n_values);
      case kMoveCall:
        ++shape->other_instructions;
        if (second < 0 || second >= int64_t(n_values))
          return out_of_range("a moved value", second, n_values);
        break;
      case kJumpFalseCall:
        ++shape->other_instructions;
        ++shape->jumps;
        // One past the end leaves the chain.
        if (second < 0 || second > int64_t(n_instructions))
          return out_of_range("a jump", second, n_instructions + 1);
        break;
      case kFreeCall:
        ++shape->other_instructions;
        break;
      default:
        return wrong("an unknown instruction");
    }
    if (first < 0 || first >= int64_t(n_values)) return out_of_range("a value", first, n_values);
    return Error::Ok;
  }

  Table program_;
  const char* what_;
};

std::string operator_name(const Table& op) {
  std::string name(op.string(0));
  if (!op.string(1).empty()) name += "." + std::string(op.string(1));
  return name;
}

}  // namespace

Error check_program(const void* data, const char* what, std::vector<MethodShape>* methods) {
  return Checker(data, what).run(methods);
}

std::vector<std::string> program_operators(const void* data) {
  std::vector<std::string> names;
  const Vector plans = flatbuffer::root(data).vector(ProgramField::kPlans);
  for (uint32_t i = 0; i < plans.size(); ++i) {
    const Vector operators = Table(plans.offset(i)).vector(PlanField::kOperators);
    for (uint32_t j = 0; j < operators.size(); ++j)
      names.push_back(operator_name(Table(operators.offset(j))));
  }
  return names;
}

std::string operator_at(const void* data, std::string_view method, size_t index) {
  const std::string unknown = "an op";
  const Vector plans = flatbuffer::root(data).vector(ProgramField::kPlans);
  for (uint32_t p = 0; p < plans.size(); ++p) {
    const Table plan(plans.offset(p));
    if (plan.string(PlanField::kName) != method) continue;
    const Vector chains = plan.vector(PlanField::kChains);
    for (uint32_t c = 0; c < chains.size(); ++c) {
      const Vector instructions = Table(chains.offset(c)).vector(2);
      for (uint32_t i = 0; i < instructions.size(); ++i, --index) {
        const Table instruction(instructions.offset(i));
        const auto type = instruction.scalar<uint8_t>(0, 0);
        if (type == kJumpFalseCall || (index == 0 && type != kKernelCall)) return unknown;
        if (index > 0) continue;
        const auto op = uint32_t(instruction.table(1).scalar<int32_t>(0, 0));
        return operator_name(Table(plan.vector(PlanField::kOperators).offset(op)));
      }
    }
  }
  return unknown;
}

std::vector<std::string> instruction_operators(const void* data, std::string_view method) {
  std::vector<std::string> names;
  const Vector plans = flatbuffer::root(data).vector(ProgramField::kPlans);
  for (uint32_t p = 0; p < plans.size(); ++p) {
    const Table plan(plans.offset(p));
    if (plan.string(PlanField::kName) != method) continue;
    const Vector chains = plan.vector(PlanField::kChains);
    for (uint32_t c = 0; c < chains.size(); ++c) {
      const Vector instructions = Table(chains.offset(c)).vector(2);
      for (uint32_t i = 0; i < instructions.size(); ++i) {
        const Table instruction(instructions.offset(i));
        names.emplace_back();
        if (instruction.scalar<uint8_t>(0, 0) != kKernelCall) continue;
        const auto op = uint32_t(instruction.table(1).scalar<int32_t>(0, 0));
        names.back() = operator_name(Table(plan.vector(PlanField::kOperators).offset(op)));
      }
    }
  }
  return names;
}

Error program_linears(const void* data, std::vector<LinearCall>* out) {
  const auto damaged = [] {
    return fail(Error::InvalidProgram,
                "nested program: a call of cuda_int4::linear has other arguments than the op; the "
                ".pte is damaged, export it again");
  };
  const Vector plans = flatbuffer::root(data).vector(ProgramField::kPlans);
  for (uint32_t p = 0; p < plans.size(); ++p) {
    const Table plan(plans.offset(p));
    const Vector values = plan.vector(PlanField::kValues);
    const Vector operators = plan.vector(PlanField::kOperators);
    const Vector chains = plan.vector(PlanField::kChains);
    for (uint32_t c = 0; c < chains.size(); ++c) {
      const Vector instructions = Table(chains.offset(c)).vector(2);
      for (uint32_t i = 0; i < instructions.size(); ++i) {
        const Table instruction(instructions.offset(i));
        if (instruction.scalar<uint8_t>(0, 0) != kKernelCall) continue;
        const Table call = instruction.table(1);
        const Table op(operators.offset(uint32_t(call.scalar<int32_t>(0, 0))));
        if (op.string(0) != "cuda_int4::linear") continue;
        // linear(x, qdata, scale, zero_point?, meta?, bias?, group_size, layout_tag, activation,
        //        out_features?, out); files from before layouts that pad N have no out_features
        const Vector args = call.vector(1);
        if (args.size() < 10) return damaged();
        const auto value = [&](uint32_t k) {
          return Table(values.offset(uint32_t(args.scalar<int32_t>(k))));
        };
        const auto type = [&](uint32_t k) {
          return value(k).template scalar<uint8_t>(ValueField::kType, 0);
        };
        const auto key = [&](uint32_t k) -> std::string_view {
          if (type(k) != kTensor) return {};
          return value(k)
              .table(ValueField::kValue)
              .table(TensorField::kExtra)
              .string(ExtraField::kName);
        };
        if (type(1) != kTensor || type(2) != kTensor || type(6) != kInt || type(7) != kString ||
            type(8) != kString)
          return damaged();
        LinearCall linear;
        linear.qdata = key(1);
        linear.scale = key(2);
        linear.zero_point = key(3);
        linear.meta = key(4);
        linear.group_size = value(6).table(ValueField::kValue).scalar<int64_t>(0, 0);
        linear.layout_tag = value(7).table(ValueField::kValue).string(0);
        linear.activation = value(8).table(ValueField::kValue).string(0);
        linear.out_features =
            type(9) == kInt ? value(9).table(ValueField::kValue).scalar<int64_t>(0, 0) : 0;
        out->push_back(linear);
      }
    }
  }
  return Error::Ok;
}

}  // namespace cuda_int4
