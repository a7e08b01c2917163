// The kernels of pretend_device.py.
#include <torch/extension.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <set>
using namespace at;
using Found = std::optional<Tensor>;
using Three = std::tuple<Tensor, Tensor, Tensor>;
constexpr auto KEY = c10::DispatchKey::PrivateUse1;
constexpr auto TYPE = c10::DeviceType::PrivateUse1;
const Device DEVICE(TYPE, 0);

py::object* watcher = new py::object(py::none());
bool doubles = true;
void tell(const char* kind, const std::string& op) {
  py::gil_scoped_acquire gil;
  if (!watcher->is_none()) (*watcher)(kind, op);
}
struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override { void* at = bytes ? std::malloc(bytes) : nullptr; return {at, at, &std::free, DEVICE}; }
  c10::DeleterFnPtr raw_deleter() const override { return &std::free; }
  void copy_data(void* to, const void* from, size_t count) const override { default_copy_data(to, from, count); }
} memory;
REGISTER_ALLOCATOR(TYPE, &memory);

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return TYPE; }
  Device exchangeDevice(Device) const override { return DEVICE; } Device getDevice() const override { return DEVICE; }
  void setDevice(Device) const override {} void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device) const override { return Stream(Stream::DEFAULT, DEVICE); }
  Stream exchangeStream(Stream stream) const override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Random final : c10::GeneratorImpl {
  Generator inner;
  explicit Random(uint64_t seed) : GeneratorImpl(DEVICE, c10::DispatchKeySet(KEY)), inner(at::detail::createCPUGenerator(seed)) {}
  void set_current_seed(uint64_t seed) override { inner.set_current_seed(seed); } uint64_t seed() override { return inner.seed(); }
  uint64_t current_seed() const override { return inner.current_seed(); }
  void set_offset(uint64_t) override {} uint64_t get_offset() const override { return 0; }
  void set_state(const c10::TensorImpl& state) override { inner.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return inner.unsafeGetGeneratorImpl()->get_state(); }
  GeneratorImpl* clone_impl() const override { auto* made = new Random(0); made->inner = inner.clone(); return made; }
};
const Generator& standard() { static Generator made = at::make_generator<Random>(c10::default_rng_seed_val); return made; }

struct Hooks final : PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; } bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; } c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; } void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  const Generator& getDefaultGenerator(c10::DeviceIndex) const override { return standard(); }
  Generator getNewGenerator(c10::DeviceIndex) const override { return at::make_generator<Random>(c10::default_rng_seed_val); }
  void resizePrivateUse1Bytes(const Storage& storage, size_t bytes) const override {
    auto fresh = memory.allocate(bytes);
    std::memcpy(fresh.get(), storage.data(), std::min(bytes, storage.nbytes()));
    storage.unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(fresh));
    storage.unsafeGetStorageImpl()->set_nbytes(bytes);
  }
};

bool there(const Tensor& t) { return t.defined() && t.device().type() == TYPE; }
Tensor host(const Tensor& t) {  // the same memory, as a CPU tensor
  return there(t) ? at::from_blob(t.data_ptr(), t.sizes(), t.strides(), [t](void*) {}, TensorOptions().dtype(t.scalar_type())) : t;
}
ScalarType checked(std::optional<ScalarType> given) {
  auto kind = c10::dtype_or_default(given);
  TORCH_CHECK_TYPE(doubles || (kind != kDouble && kind != kComplexDouble), "Cannot convert a pretend Tensor to float64 dtype");
  return kind;
}
Tensor fresh(IntArrayRef size, std::optional<ScalarType> kind, std::optional<Layout>, std::optional<Device>, std::optional<bool>,
             std::optional<MemoryFormat> format) {
  return at::detail::empty_generic(size, &memory, c10::DispatchKeySet(KEY), checked(kind), format);
}
Tensor strided(IntArrayRef size, IntArrayRef stride, std::optional<ScalarType> kind, std::optional<Layout>, std::optional<Device>,
               std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &memory, c10::DispatchKeySet(KEY), checked(kind));
}
Tensor up(const Tensor& t) {
  if (!t.defined()) return t;
  Tensor made = strided(t.sizes(), t.strides(), t.scalar_type(), {}, {}, {});
  host(made).copy_(t);
  return made;
}
Tensor carry(const Tensor& self, const Tensor& to, bool non_blocking) {  // CUDA waits in both directions, unless it is told not to
  if (there(self)) checked(to.scalar_type());  // MPS casts before it copies.
  if (there(self) != there(to)) tell(non_blocking ? "async" : "sync", there(self) ? "copy to the host" : "copy to the device");
  host(to).copy_(host(self));
  return to;
}
Tensor carry_and_resize(const Tensor& self, const Tensor& to) { to.resize_(self.sizes()); return carry(self, to, false); }
Scalar number(const Tensor& self) { tell("sync", "_local_scalar_dense"); return at::_local_scalar_dense(host(self)); }
const Tensor& enlarge(const Tensor& self, IntArrayRef size, std::optional<MemoryFormat> format) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_sizes_contiguous(size);
  if (format) impl->empty_tensor_restride(*format);
  const size_t bytes = (impl->numel() + impl->storage_offset()) * impl->itemsize();
  if (impl->storage().nbytes() < bytes) at::detail::getPrivateUse1Hooks().resizePrivateUse1Bytes(impl->storage(), bytes);
  return self;
}
Tensor convolve(const Tensor& x, const Tensor& w, const Found& b, IntArrayRef stride, IntArrayRef pad, IntArrayRef dilation, bool transposed,
                IntArrayRef out, int64_t groups) {
  TORCH_CHECK(there(x) && there(w) && (!b || !b->defined() || there(*b)), "Expected all tensors to be on the same device (convolution)");
  return up(at::convolution(host(x), host(w), b ? Found(host(*b)) : b, stride, pad, dilation, transposed, out, groups));
}
Three convolve_backward(const Tensor& grad, const Tensor& x, const Tensor& w, IntArrayRef stride, IntArrayRef pad, IntArrayRef dilation,
                        bool transposed, IntArrayRef out, int64_t groups, std::array<bool, 3> mask) {
  auto [one, two, three] = at::convolution_backward(host(grad), host(x), host(w), IntArrayRef({grad.size(1)}), stride, pad, dilation,
                                                    transposed, out, groups, mask);
  return {up(one), up(two), up(three)};
}

const std::set<std::string> WAITS = {"nonzero", "masked_select", "equal", "unique_dim", "_unique", "_unique2", "unique_consecutive",
  "_linalg_eigh", "_linalg_svd", "linalg_lstsq", "_linalg_eigvals", "linalg_eig", "bincount", "multinomial"};
const std::set<std::string> MIXED = {"index", "_unsafe_index", "index_put_", "_index_put_impl_", "_pack_padded_sequence"};

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const std::string name = schema.name().substr(schema.name().rfind(':') + 1);
  const size_t count = schema.arguments().size(), begin = stack->size() - count;
  bool ours = false, theirs = false, written = false;
  auto look = [&](const Tensor& t) {
    ours |= there(t);
    theirs |= t.defined() && t.device().is_cpu() && (t.dim() || name == "cat");
    return t;
  };
  std::vector<std::pair<Tensor, Tensor>> pairs;  // the device's tensor, the host's
  auto down = [&](const Tensor& t) {
    if (!there(t)) return t;
    pairs.emplace_back(t, written && !t.numel() ? at::empty(t.sizes(), TensorOptions().dtype(t.scalar_type())) : host(t));
    return pairs.back().second;
  };
  auto raised = [&](const Tensor& t) {
    for (auto& [own, made] : pairs) if (made.is_same(t)) return own;
    for (auto& [own, made] : pairs)
      if (t.defined() && t.numel() && made.numel() && t.storage().data() == made.storage().data())
        return own.as_strided(t.sizes(), t.strides(), own.storage_offset() + t.storage_offset());
    return t.defined() && t.device().is_cpu() ? up(t) : t;
  };
  auto through = [&](c10::IValue& value, const auto& function) {
    if (value.isTensor()) value = function(value.toTensor());
    else if (value.isTensorList()) {
      std::vector<Tensor> made;
      for (const Tensor& t : value.toTensorVector()) made.push_back(function(t));
      value = made;
    } else if (value.isOptionalTensorList()) {
      c10::List<Found> made;
      for (const Found& t : value.toOptionalTensorVector()) made.push_back(t ? Found(function(*t)) : t);
      value = made;
    }
  };
  for (size_t k = 0; k < count; k++) through((*stack)[begin + k], look);
  if (ours && theirs && !MIXED.count(name)) tell("mixed", name);
  TORCH_CHECK(!ours || !theirs || MIXED.count(name),
              "Expected all tensors to be on the same device, but found at least two devices, pretend:0 and cpu! (", name, ")");
  if (ours && WAITS.count(name)) tell("sync", name);
  for (size_t k = 0; k < count; k++) {
    c10::IValue& value = (*stack)[begin + k];
    const auto& argument = schema.arguments()[k];
    written = argument.alias_info() && argument.alias_info()->isWrite();
    if (ours && argument.type()->str().find("Generator") != std::string::npos) {
      Generator given = value.isNone() ? standard() : value.toGenerator();
      TORCH_CHECK(given.device().type() == TYPE, "Expected a 'pretend' device type for generator but found 'cpu' (", name, ")");
      value = static_cast<Random*>(given.unsafeGetGeneratorImpl())->inner;
    } else if (value.isDevice() && value.toDevice().type() == TYPE) value = Device(kCPU);
    else through(value, down);
  }
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  for (auto& [own, made] : pairs) if (own.sizes() != made.sizes()) { own.resize_(made.sizes()); host(own).copy_(made); }
  for (size_t k = stack->size() - schema.returns().size(); k < stack->size(); k++) through((*stack)[k], raised);
}
TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }
TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", fresh); m.impl("empty_strided", strided); m.impl("resize_", enlarge);
  m.impl("as_strided", native::as_strided_tensorimpl); m.impl("view", native::view);
  m.impl("_reshape_alias", native::_reshape_alias); m.impl("unfold", native::unfold);
  m.impl("set_.source_Tensor", native::set_tensor_); m.impl("set_.source_Storage", native::set_);
  m.impl("set_.source_Storage_storage_offset", native::set_storage_cpu_);
  m.impl("_copy_from", carry); m.impl("_copy_from_and_resize", carry_and_resize); m.impl("_local_scalar_dense", number);
  m.impl("convolution_overrideable", convolve); m.impl("convolution_backward_overrideable", convolve_backward);
}
PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  RegisterPrivateUse1HooksInterface(new Hooks());
  m.def("watch", [](py::object callback) { *watcher = callback; });
  m.def("doubles", [](bool allowed) { doubles = allowed; });
  m.def("standard", [] { return standard(); });
}
