// The Python face of the binding: plain values in and out; vkllm.vk.device turns NativeError into the typed tree.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#ifdef __GLIBC__
#include <link.h>
#include <malloc.h>
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <cstring>
#include <optional>

#include "features.hpp"
#include "recording.hpp"

namespace nb = nanobind;
using namespace nb::literals;
using namespace vkllm;

namespace {

/// A bare instance for looking at devices; opening one goes through kp::Manager.
struct Instance
{
    Instance()
    {
        const Guard guard;
        const VkInstanceCreateInfo info{ VK_STRUCTURE_TYPE_INSTANCE_CREATE_INFO };
        dispatch().vkCreateInstance(&info, nullptr, &handle);
        Guard::check();
    }
    ~Instance() { dispatch().vkDestroyInstance(handle, nullptr); }
    std::vector<VkPhysicalDevice> devices() const
    {
        const Guard guard;
        uint32_t n = 0;
        dispatch().vkEnumeratePhysicalDevices(handle, &n, nullptr);
        std::vector<VkPhysicalDevice> found(n);
        dispatch().vkEnumeratePhysicalDevices(handle, &n, found.data());
        Guard::check();
        found.resize(n);
        return found;
    }
    VkInstance handle = VK_NULL_HANDLE;
};

#ifdef __GLIBC__
/// Drop the whole pages of a library's code and constants from this process. The loader holds its lock meanwhile, so that none is
/// unmapped; a library whose code was relocated is left alone, as its pages are in no file.
int
drop_code(dl_phdr_info* library, size_t, void*)
{
    const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
    for (const auto* p = library->dlpi_phdr; p != library->dlpi_phdr + library->dlpi_phnum; p++)
        if (p->p_type == PT_DYNAMIC)
            for (const auto* d = reinterpret_cast<const ElfW(Dyn)*>(library->dlpi_addr + p->p_vaddr); d->d_tag != DT_NULL; d++)
                if (d->d_tag == DT_TEXTREL || (d->d_tag == DT_FLAGS && d->d_un.d_val & DF_TEXTREL))
                    return 0;
    for (const auto* p = library->dlpi_phdr; p != library->dlpi_phdr + library->dlpi_phnum; p++) {
        const uintptr_t first = (library->dlpi_addr + p->p_vaddr + page - 1) / page * page;
        const uintptr_t end = (library->dlpi_addr + p->p_vaddr + p->p_filesz) / page * page;
        if (p->p_type == PT_LOAD && !(p->p_flags & PF_W) && first < end)
            madvise(reinterpret_cast<void*>(first), end - first, MADV_DONTNEED);
    }
    return 0;
}
#endif

/// Give back what only starting and compiling needed: memory that was freed, and code. What runs again is read again as it is
/// reached, from the page cache.
void
trim()
{
#ifdef __GLIBC__
    malloc_trim(0);
    dl_iterate_phdr(drop_code, nullptr);
#endif
}

const char*
component_name(uint32_t type)
{
    constexpr const char* names[] = { "f16", "f32", "f64", "i8", "i16", "i32", "i64", "u8", "u16", "u32", "u64" };
    return type < std::size(names) ? names[type] : type == 1000141000 ? "bf16" : "?";
}

nb::list
cooperative_shapes(VkInstance instance, VkPhysicalDevice device, const FeatureChain& chain)
{
    nb::list shapes;
    const auto get = reinterpret_cast<GetCooperativeMatrixProperties>(vkGetInstanceProcAddr(instance, "vkGetPhysicalDeviceCooperativeMatrixPropertiesKHR"));
    if (!chain.cooperative.cooperativeMatrix || !get)
        return shapes;
    uint32_t n = 0;
    get(device, &n, nullptr);
    std::vector<CooperativeMatrixProperties> found(n);
    get(device, &n, found.data());
    for (const auto& p : found)
        if (p.scope == 3 && !p.saturating)
            shapes.append(nb::make_tuple(p.m, p.n, p.k, component_name(p.a), component_name(p.b), component_name(p.c), component_name(p.result)));
    return shapes;
}

uint32_t
compute_family(VkPhysicalDevice device, bool discrete)
{
    // On a discrete device a family without graphics is the one that a desktop does not share.
    uint32_t n = 0;
    vkGetPhysicalDeviceQueueFamilyProperties(device, &n, nullptr);
    std::vector<VkQueueFamilyProperties> families(n);
    vkGetPhysicalDeviceQueueFamilyProperties(device, &n, families.data());
    int best = -1, best_points = -1;
    for (uint32_t i = 0; i < n; i++) {
        if (!(families[i].queueFlags & VK_QUEUE_COMPUTE_BIT))
            continue;
        const bool graphics = families[i].queueFlags & VK_QUEUE_GRAPHICS_BIT;
        const int points = 2 * (families[i].timestampValidBits > 0) + (discrete && !graphics);
        if (points > best_points) {
            best = static_cast<int>(i);
            best_points = points;
        }
    }
    return best < 0 ? UINT32_MAX : static_cast<uint32_t>(best);
}

nb::dict
describe(VkInstance instance, VkPhysicalDevice device)
{
    const FeatureChain chain(device);
    const bool imports = chain.has_extension("VK_EXT_external_memory_host");
    const bool has_pci = chain.has_extension("VK_EXT_pci_bus_info"), v12 = chain.api_version >= VK_API_VERSION_1_2;
    VkPhysicalDevicePCIBusInfoPropertiesEXT pci{ VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_PCI_BUS_INFO_PROPERTIES_EXT };
    VkPhysicalDeviceDriverProperties driver{ VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_DRIVER_PROPERTIES, has_pci ? &pci : nullptr };
    VkPhysicalDeviceSubgroupSizeControlProperties sizes{ VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_SUBGROUP_SIZE_CONTROL_PROPERTIES,
                                                         v12 ? static_cast<void*>(&driver) : driver.pNext };
    VkPhysicalDeviceMaintenance3Properties maintenance{ VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_MAINTENANCE_3_PROPERTIES,
                                                        chain.subgroup_size.subgroupSizeControl ? static_cast<void*>(&sizes) : sizes.pNext };
    VkPhysicalDeviceIDProperties id{ VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_ID_PROPERTIES, &maintenance };
    VkPhysicalDeviceExternalMemoryHostPropertiesEXT host{ VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_EXTERNAL_MEMORY_HOST_PROPERTIES_EXT, &id };
    VkPhysicalDeviceSubgroupProperties subgroup{ VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_SUBGROUP_PROPERTIES,
                                                 imports ? static_cast<void*>(&host) : &id };
    VkPhysicalDeviceProperties2 p{ VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_PROPERTIES_2, &subgroup, {} };
    vkGetPhysicalDeviceProperties2(device, &p);
    const auto& core = p.properties;
    const auto& limits = core.limits;
    const auto [available, total] = heap_budget(device, {});
    const bool unified = core.deviceType == VK_PHYSICAL_DEVICE_TYPE_INTEGRATED_GPU || core.deviceType == VK_PHYSICAL_DEVICE_TYPE_CPU;
    const uint32_t s = subgroup.subgroupSize;

    nb::dict d;
    d["name"] = core.deviceName;
    d["type"] = static_cast<int>(core.deviceType);
    d["vendor_id"] = core.vendorID;
    d["device_id"] = core.deviceID;
    d["driver_name"] = v12 ? driver.driverName : "";
    d["driver_info"] = v12 ? driver.driverInfo : "";
    d["driver_version"] = core.driverVersion;
    d["api_version"] = core.apiVersion;
    d["uuid"] = nb::bytes(id.deviceUUID, VK_UUID_SIZE);
    d["cache_uuid"] = nb::bytes(core.pipelineCacheUUID, VK_UUID_SIZE);
    d["pci"] = has_pci ? nb::object(nb::make_tuple(pci.pciDomain, pci.pciBus, pci.pciDevice, pci.pciFunction)) : nb::none();
    d["memory_bytes"] = total;
    d["available_bytes"] = available;
    d["family"] = compute_family(device, core.deviceType == VK_PHYSICAL_DEVICE_TYPE_DISCRETE_GPU);
    d["max_storage_buffer_range"] = limits.maxStorageBufferRange;
    d["max_texel_elements"] = limits.maxTexelBufferElements;
    d["max_buffer_bytes"] = maintenance.maxMemoryAllocationSize;
    d["max_push_bytes"] = limits.maxPushConstantsSize;
    d["max_storage_buffers"] = std::min(limits.maxPerStageDescriptorStorageBuffers, limits.maxDescriptorSetStorageBuffers);
    d["max_texel_buffers"] = std::min(limits.maxPerStageDescriptorStorageImages, limits.maxDescriptorSetStorageImages);
    d["max_shared_bytes"] = limits.maxComputeSharedMemorySize;
    d["max_workgroup_invocations"] = limits.maxComputeWorkGroupInvocations;
    d["max_workgroup_count"] = nb::make_tuple(limits.maxComputeWorkGroupCount[0], limits.maxComputeWorkGroupCount[1], limits.maxComputeWorkGroupCount[2]);
    d["subgroup_size"] = s;
    d["min_subgroup_size"] = sizes.minSubgroupSize ? sizes.minSubgroupSize : s;
    d["max_subgroup_size"] = sizes.maxSubgroupSize ? sizes.maxSubgroupSize : s;
    d["timestamp_period_ns"] = limits.timestampPeriod;
    d["storage_alignment"] = limits.minStorageBufferOffsetAlignment;
    d["texel_alignment"] = limits.minTexelBufferOffsetAlignment;
    d["features"] = feature_words(device, chain);
    d["coop_shapes"] = cooperative_shapes(instance, device, chain);
    d["unified_memory"] = unified;
    d["import_alignment"] = imports ? host.minImportedHostPointerAlignment : 0;
    return d;
}

nb::list
devices()
{
    std::optional<Instance> instance;
    std::vector<VkPhysicalDevice> found;
    {
        const nb::gil_scoped_release others; // loading drivers takes long
        instance.emplace();
        found = instance->devices();
    }
    nb::list list;
    for (VkPhysicalDevice d : found)
        list.append(describe(instance->handle, d));
    return list;
}

VkDescriptorType
descriptor_type(const std::string& kind)
{
    if (kind == "storage")
        return VK_DESCRIPTOR_TYPE_STORAGE_BUFFER;
    if (kind == "texel")
        return VK_DESCRIPTOR_TYPE_STORAGE_TEXEL_BUFFER;
    if (kind == "uniform_texel")
        return VK_DESCRIPTOR_TYPE_UNIFORM_TEXEL_BUFFER;
    throw std::invalid_argument("unknown binding kind " + kind);
}

std::string
text(nb::bytes b)
{
    return { b.c_str(), b.size() };
}

} // namespace

NB_MODULE(_native, m)
{
#ifdef __GLIBC__
    // Large memory is mapped by itself, always: pages of it that nobody touches take none, and what is freed is given back. Left
    // alone, glibc raises this limit to the largest size that was ever freed.
    mallopt(M_MMAP_THRESHOLD, 1 << 20);
#endif
    nb::set_leak_warnings(false); // objects may outlive the interpreter's modules at exit
    m.doc() = "Kompute with our own operations, dispatcher and checks.";

    static const nb::object error = nb::steal(PyErr_NewException("vkllm.vk._native.NativeError", PyExc_RuntimeError, nullptr));
    m.attr("NativeError") = error;
    nb::register_exception_translator([](const std::exception_ptr& p, void*) {
        try {
            std::rethrow_exception(p);
        } catch (const VulkanFailure& e) {
            PyErr_SetObject(error.ptr(), nb::make_tuple(e.failure.call, static_cast<int>(e.failure.result), e.failure.needed).ptr());
        } catch (const vk::SystemError& e) { // Kompute's calls through the enhanced interface
            PyErr_SetObject(error.ptr(), nb::make_tuple(e.what(), e.code().value(), 0).ptr());
        }
    });

    m.def("devices", &devices);
    m.def("trim", &trim, nb::call_guard<nb::gil_scoped_release>());
    m.def("inject_fault", &inject_fault, "call"_a, "nth"_a, "result"_a);

    nb::class_<Buffer>(m, "Buffer")
      .def_ro("nbytes", &Buffer::nbytes)
      .def_prop_ro("mapped", [](const Buffer& b) { return b.mapped != nullptr; })
      .def("bytes", [](std::shared_ptr<Buffer> b) {
          if (!b->mapped)
              throw std::invalid_argument("the buffer is not mapped");
          void* data = b->mapped;
          const size_t n = b->nbytes;
          return nb::ndarray<nb::numpy, uint8_t, nb::ndim<1>>(data, { n }, nb::cast(std::move(b))); // the array keeps the memory
      });
    nb::class_<Pipeline>(m, "Pipeline").def_ro("push_bytes", &Pipeline::push_bytes);

    nb::class_<Recording>(m, "Recording")
      .def("dispatch",
           [](Recording& r, std::shared_ptr<Pipeline> p, const std::vector<std::tuple<std::shared_ptr<Buffer>, uint64_t, uint64_t, int>>& bindings,
              std::array<uint32_t, 3> groups, nb::bytes push) {
               std::vector<BoundRange> ranges;
               for (const auto& [buffer, offset, nbytes, format] : bindings)
                   ranges.push_back({ buffer, offset, nbytes, static_cast<VkFormat>(format) });
               r.dispatch(std::move(p), ranges, groups, text(push));
           },
           "pipeline"_a, "bindings"_a, "groups"_a, "push"_a)
      .def("barrier", &Recording::barrier)
      .def("copy", &Recording::copy, "src"_a, "dst"_a, "nbytes"_a, "src_offset"_a, "dst_offset"_a)
      .def("timestamp", &Recording::timestamp)
      .def("finish", &Recording::finish)
      .def("submit", &Recording::submit, nb::call_guard<nb::gil_scoped_release>())
      .def("wait", &Recording::wait, "timeout_ns"_a, nb::call_guard<nb::gil_scoped_release>())
      .def_prop_ro("running", &Recording::running)
      .def("timestamps", &Recording::timestamps);

    nb::class_<Device>(m, "Device")
      .def(nb::new_([](uint32_t index, uint32_t family, nb::bytes cache, bool force_unmapped) {
               const std::string data = text(cache);
               const nb::gil_scoped_release others;
               return std::make_shared<Device>(index, family, data, force_unmapped);
           }),
           "index"_a, "family"_a, "cache"_a, "force_unmapped"_a)
      .def("buffer", [](std::shared_ptr<Device> d, uint64_t nbytes, bool host) { return std::make_shared<Buffer>(std::move(d), nbytes, host); },
           "nbytes"_a, "host"_a)
      .def("import_buffer",
           [](std::shared_ptr<Device> d, nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu> data, uint64_t nbytes) {
               const std::shared_ptr<void> owner(new nb::object(nb::cast(data)), [](void* p) {
                   const nb::gil_scoped_acquire gil;
                   delete static_cast<nb::object*>(p);
               });
               if (nbytes > data.size())
                   throw std::invalid_argument("the buffer is larger than its memory");
               return std::make_shared<Buffer>(std::move(d), nbytes, data.data(), data.size(), owner);
           },
           "data"_a, "nbytes"_a)
      .def("pipeline",
           [](std::shared_ptr<Device> d, nb::bytes spirv, const std::vector<std::string>& kinds, uint32_t push_bytes,
              const std::vector<std::pair<uint32_t, uint32_t>>& spec, uint32_t required_subgroup_size) {
               std::vector<VkDescriptorType> types;
               for (const auto& k : kinds)
                   types.push_back(descriptor_type(k));
               std::vector<Specialization> values;
               for (const auto& [id, bits] : spec)
                   values.push_back({ id, bits });
               const std::string code = text(spirv);
               const nb::gil_scoped_release others;
               return std::make_shared<Pipeline>(std::move(d), code, std::move(types), push_bytes, values, required_subgroup_size);
           },
           "spirv"_a, "kinds"_a, "push_bytes"_a, "spec"_a, "required_subgroup_size"_a)
      .def("recording", [](std::shared_ptr<Device> d, uint32_t timestamps) { return std::make_shared<Recording>(std::move(d), timestamps); },
           "timestamps"_a)
      .def("memory_budget", &Device::memory_budget)
      .def("cache_data", [](const Device& d) {
          const std::string data = d.cache_data();
          return nb::bytes(data.data(), data.size());
      })
      .def("wait_idle", &Device::wait_idle, nb::call_guard<nb::gil_scoped_release>());
}
