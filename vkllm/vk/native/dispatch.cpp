// The dispatcher's state, and the two calls that it shapes: vkCreateInstance (API version) and vkCreateDevice (features).
#include <algorithm>
#include <cstring>
#include <mutex>

#include "features.hpp"

namespace vkllm {

thread_local Failure t_failure;
thread_local Created t_created;

const Dispatch&
dispatch() noexcept
{
    static const Dispatch instance;
    return instance;
}

namespace {
struct Fault
{
    std::string name;
    int nth = 0;
    VkResult result = VK_SUCCESS;
};
std::mutex g_fault_mutex;
Fault g_fault;
} // namespace

void
inject_fault(const std::string& name, int nth, int result)
{
    const std::lock_guard lock(g_fault_mutex);
    g_fault = { name, nth, static_cast<VkResult>(result) };
}

VkResult
take_fault(const char* name) noexcept
{
    const std::lock_guard lock(g_fault_mutex);
    if (g_fault.nth == 0 || g_fault.name != name)
        return VK_SUCCESS;
    return --g_fault.nth == 0 ? g_fault.result : VK_SUCCESS;
}

VkResult
Dispatch::vkCreateInstance(const VkInstanceCreateInfo* info, const VkAllocationCallbacks* a, VkInstance* out) const noexcept
{
    uint32_t version = VK_API_VERSION_1_0, n = 0;
    vkEnumerateInstanceVersion(&version);
    VkApplicationInfo application = info->pApplicationInfo ? *info->pApplicationInfo : VkApplicationInfo{ VK_STRUCTURE_TYPE_APPLICATION_INFO };
    application.pApplicationName = "vkllm";
    application.apiVersion = std::min<uint32_t>(version, VK_API_VERSION_1_3);

    // Drivers over another API (MoltenVK) are listed only when asked for.
    std::vector<const char*> names(info->ppEnabledExtensionNames, info->ppEnabledExtensionNames + info->enabledExtensionCount);
    vkEnumerateInstanceExtensionProperties(nullptr, &n, nullptr);
    std::vector<VkExtensionProperties> offered(n);
    vkEnumerateInstanceExtensionProperties(nullptr, &n, offered.data());
    VkInstanceCreateInfo ours = *info;
    for (const auto& e : offered)
        if (!std::strcmp(e.extensionName, "VK_KHR_portability_enumeration")) {
            names.push_back("VK_KHR_portability_enumeration");
            ours.flags |= 1; // VK_INSTANCE_CREATE_ENUMERATE_PORTABILITY_BIT_KHR
        }
    ours.pApplicationInfo = &application;
    ours.enabledExtensionCount = static_cast<uint32_t>(names.size());
    ours.ppEnabledExtensionNames = names.data();
    return call("vkCreateInstance", [&] { return Base::vkCreateInstance(&ours, a, out); });
}

VkResult
Dispatch::vkCreateDevice(VkPhysicalDevice p, const VkDeviceCreateInfo* info, const VkAllocationCallbacks* a, VkDevice* out) const noexcept
{
    t_created = {};
    if (t_failure.result != VK_SUCCESS)
        return t_failure.result;
    const FeatureChain chain(p);
    std::vector<const char*> names(info->ppEnabledExtensionNames, info->ppEnabledExtensionNames + info->enabledExtensionCount);
    for (const auto& e : chain.extensions)
        names.push_back(e.c_str());
    VkDeviceCreateInfo ours = *info;
    ours.pNext = &chain.core;
    ours.pEnabledFeatures = nullptr;
    ours.enabledExtensionCount = static_cast<uint32_t>(names.size());
    ours.ppEnabledExtensionNames = names.data();
    const VkResult r = call("vkCreateDevice", [&] { return Base::vkCreateDevice(p, &ours, a, out); });
    if (r == VK_SUCCESS)
        t_created.device = *out;
    return r;
}

FeatureChain::FeatureChain(VkPhysicalDevice device)
{
    VkPhysicalDeviceProperties properties;
    vkGetPhysicalDeviceProperties(device, &properties);
    api_version = properties.apiVersion;
    uint32_t n = 0;
    vkEnumerateDeviceExtensionProperties(device, nullptr, &n, nullptr);
    std::vector<VkExtensionProperties> offered(n);
    vkEnumerateDeviceExtensionProperties(device, nullptr, &n, offered.data());
    for (const auto& e : offered)
        available.emplace_back(e.extensionName);

    void** tail = &core.pNext;
    // A struct joins the chain when the device's version has it in core, or when its extension can be enabled.
    const auto join = [&](auto& s, uint32_t core_since, const char* extension) {
        if (api_version < core_since) {
            if (!has_extension(extension))
                return;
            extensions.emplace_back(extension);
        }
        *tail = &s;
        tail = &s.pNext;
    };
    constexpr uint32_t NEVER = UINT32_MAX;
    join(storage16, VK_API_VERSION_1_1, "VK_KHR_16bit_storage");
    join(storage8, VK_API_VERSION_1_2, "VK_KHR_8bit_storage");
    join(float16_int8, VK_API_VERSION_1_2, "VK_KHR_shader_float16_int8");
    join(subgroup_types, VK_API_VERSION_1_2, "VK_KHR_shader_subgroup_extended_types");
    join(memory_model, VK_API_VERSION_1_2, "VK_KHR_vulkan_memory_model");
    join(subgroup_size, VK_API_VERSION_1_3, "VK_EXT_subgroup_size_control");
    join(dot, VK_API_VERSION_1_3, "VK_KHR_shader_integer_dot_product");
    join(maintenance4, VK_API_VERSION_1_3, "VK_KHR_maintenance4");
    join(cooperative, NEVER, COOPERATIVE_MATRIX_EXTENSION);
    for (const char* e : { "VK_EXT_memory_budget", "VK_EXT_external_memory_host", "VK_KHR_portability_subset" })
        if (has_extension(e))
            extensions.emplace_back(e);

    vkGetPhysicalDeviceFeatures2(device, &core);
    // Keep what we use: bounds checks would cost time in every load.
    const VkBool32 int16 = core.features.shaderInt16, int64 = core.features.shaderInt64;
    core.features = {};
    core.features.shaderInt16 = int16;
    core.features.shaderInt64 = int64;
    cooperative.cooperativeMatrixRobustBufferAccess = VK_FALSE;
}

bool
FeatureChain::has_extension(const std::string& name) const
{
    return std::find(available.begin(), available.end(), name) != available.end();
}

// Whether this CPU multiplies vectors of 64-bit integers as quickly as two of 32-bit ones: AMD's from Zen 4 on. Intel's take three
// steps for it (source: the scheduling models of LLVM 15).
static bool
multiplies_int64()
{
#if defined(__x86_64__)
    return __builtin_cpu_is("amd") && __builtin_cpu_supports("avx512dq");
#else
    return false;
#endif
}

std::vector<std::string>
feature_words(VkPhysicalDevice device, const FeatureChain& c)
{
    VkPhysicalDeviceSubgroupProperties subgroup{ VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_SUBGROUP_PROPERTIES };
    VkPhysicalDeviceShaderIntegerDotProductProperties dot{ VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_SHADER_INTEGER_DOT_PRODUCT_PROPERTIES };
    if (c.dot.shaderIntegerDotProduct)
        subgroup.pNext = &dot;
    VkPhysicalDeviceProperties2 properties{ VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_PROPERTIES_2, &subgroup, {} };
    vkGetPhysicalDeviceProperties2(device, &properties);
    const bool compute = subgroup.supportedStages & VK_SHADER_STAGE_COMPUTE_BIT;

    std::vector<std::string> words;
    const auto word = [&](const char* name, bool present) {
        if (present)
            words.emplace_back(name);
    };
    word("float16", c.float16_int8.shaderFloat16);
    word("storage16", c.storage16.storageBuffer16BitAccess);
    word("int8", c.float16_int8.shaderInt8);
    word("storage8", c.storage8.storageBuffer8BitAccess);
    word("int16", c.core.features.shaderInt16);
    word("int64", c.core.features.shaderInt64);
    word("int64_vectors", c.core.features.shaderInt64 && properties.properties.deviceType == VK_PHYSICAL_DEVICE_TYPE_CPU && multiplies_int64());
    word("dot8", c.dot.shaderIntegerDotProduct);
    word("dot8_accelerated", dot.integerDotProduct4x8BitPackedSignedAccelerated);
    word("subgroup_arith", compute && (subgroup.supportedOperations & VK_SUBGROUP_FEATURE_ARITHMETIC_BIT));
    word("subgroup_shuffle", compute && (subgroup.supportedOperations & VK_SUBGROUP_FEATURE_SHUFFLE_BIT));
    word("subgroup_vote", compute && (subgroup.supportedOperations & VK_SUBGROUP_FEATURE_VOTE_BIT));
    word("subgroup_ballot", compute && (subgroup.supportedOperations & VK_SUBGROUP_FEATURE_BALLOT_BIT));
    word("subgroup_size_control", c.subgroup_size.subgroupSizeControl);
    word("full_subgroups", c.subgroup_size.computeFullSubgroups);
    word("memory_model", c.memory_model.vulkanMemoryModel);
    word("maintenance4", c.maintenance4.maintenance4);
    word("memory_budget", c.has_extension("VK_EXT_memory_budget"));
    word("coopmat", c.cooperative.cooperativeMatrix);
    return words;
}

} // namespace vkllm
