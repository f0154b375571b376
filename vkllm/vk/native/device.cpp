#include "device.hpp"

#include <algorithm>
#include <limits>

#include "features.hpp"

namespace vkllm {

// ---------------------------------------------------------------------------------------------------------------- Buffer

Buffer::Buffer(std::shared_ptr<Device> d, uint64_t n, bool host)
  : device(std::move(d))
  , nbytes(n)
{
    const auto& vk = dispatch();
    const Guard guard;
    try {
        VkBufferCreateInfo info{ VK_STRUCTURE_TYPE_BUFFER_CREATE_INFO };
        info.size = nbytes;
        info.usage = VK_BUFFER_USAGE_STORAGE_BUFFER_BIT | VK_BUFFER_USAGE_TRANSFER_SRC_BIT | VK_BUFFER_USAGE_TRANSFER_DST_BIT;
        vk.vkCreateBuffer(device->handle, &info, nullptr, &handle);
        Guard::check();
        VkMemoryRequirements needs;
        vk.vkGetBufferMemoryRequirements(device->handle, handle, &needs);
        const uint32_t type = device->memory_type(needs.memoryTypeBits, host);
        m_heap = device->memory.memoryTypes[type].heapIndex;
        const VkMemoryAllocateInfo allocate{ VK_STRUCTURE_TYPE_MEMORY_ALLOCATE_INFO, nullptr, needs.size, type };
        vk.vkAllocateMemory(device->handle, &allocate, nullptr, &m_memory);
        Guard::check();
        m_allocated = needs.size;
        device->allocated[m_heap] += m_allocated;
        vk.vkBindBufferMemory(device->handle, handle, m_memory, 0);
        const auto flags = device->memory.memoryTypes[type].propertyFlags;
        if ((flags & VK_MEMORY_PROPERTY_HOST_VISIBLE_BIT) && (host || !device->force_unmapped))
            vk.vkMapMemory(device->handle, m_memory, 0, VK_WHOLE_SIZE, 0, &mapped);
        Guard::check();
    } catch (...) {
        release();
        throw;
    }
}

Buffer::Buffer(std::shared_ptr<Device> d, uint64_t n, void* data, uint64_t available, std::shared_ptr<void> owner)
  : device(std::move(d))
  , nbytes(n)
  , m_owner(std::move(owner))
{
    constexpr auto HOST_MEMORY = VK_EXTERNAL_MEMORY_HANDLE_TYPE_HOST_ALLOCATION_BIT_EXT;
    const auto& vk = dispatch();
    const auto properties_of = reinterpret_cast<PFN_vkGetMemoryHostPointerPropertiesEXT>(
      vkGetDeviceProcAddr(device->handle, "vkGetMemoryHostPointerPropertiesEXT"));
    if (!properties_of)
        throw std::runtime_error("the device imports no host memory");
    const Guard guard;
    try {
        VkMemoryHostPointerPropertiesEXT properties{ VK_STRUCTURE_TYPE_MEMORY_HOST_POINTER_PROPERTIES_EXT };
        if (properties_of(device->handle, HOST_MEMORY, data, &properties) != VK_SUCCESS)
            throw std::runtime_error("the device does not import this memory");
        const VkExternalMemoryBufferCreateInfo external{ VK_STRUCTURE_TYPE_EXTERNAL_MEMORY_BUFFER_CREATE_INFO, nullptr, HOST_MEMORY };
        VkBufferCreateInfo info{ VK_STRUCTURE_TYPE_BUFFER_CREATE_INFO, &external };
        info.size = nbytes;
        info.usage = VK_BUFFER_USAGE_STORAGE_BUFFER_BIT | VK_BUFFER_USAGE_TRANSFER_SRC_BIT;
        vk.vkCreateBuffer(device->handle, &info, nullptr, &handle);
        Guard::check();
        VkMemoryRequirements needs;
        vk.vkGetBufferMemoryRequirements(device->handle, handle, &needs);
        if (needs.size > available)
            throw std::runtime_error("the device wants more memory than the buffer has");
        const VkImportMemoryHostPointerInfoEXT import{ VK_STRUCTURE_TYPE_IMPORT_MEMORY_HOST_POINTER_INFO_EXT, nullptr, HOST_MEMORY, data };
        const uint32_t type = device->memory_type(needs.memoryTypeBits & properties.memoryTypeBits, false);
        const VkMemoryAllocateInfo allocate{ VK_STRUCTURE_TYPE_MEMORY_ALLOCATE_INFO, &import, available, type };
        vk.vkAllocateMemory(device->handle, &allocate, nullptr, &m_memory);
        Guard::check();
        vk.vkBindBufferMemory(device->handle, handle, m_memory, 0);
        Guard::check();
        mapped = data;
    } catch (...) {
        release();
        throw;
    }
}

Buffer::~Buffer()
{
    release();
}

void
Buffer::release() noexcept
{
    const auto& vk = dispatch();
    for (const auto& [key, view] : m_views)
        vk.vkDestroyBufferView(device->handle, view, nullptr);
    vk.vkDestroyBuffer(device->handle, handle, nullptr);
    vk.vkFreeMemory(device->handle, m_memory, nullptr);
    device->allocated[m_heap] -= m_allocated;
}

VkBufferView
Buffer::texel_view(VkFormat format, uint64_t offset, uint64_t range)
{
    const auto key = std::make_tuple(format, offset, range);
    if (const auto found = m_views.find(key); found != m_views.end())
        return found->second;
    const Guard guard;
    VkBufferViewCreateInfo info{ VK_STRUCTURE_TYPE_BUFFER_VIEW_CREATE_INFO };
    info.buffer = handle;
    info.format = format;
    info.offset = offset;
    info.range = range;
    VkBufferView view = VK_NULL_HANDLE;
    dispatch().vkCreateBufferView(device->handle, &info, nullptr, &view);
    Guard::check();
    return m_views[key] = view;
}

// -------------------------------------------------------------------------------------------------------------- Pipeline

Pipeline::Pipeline(std::shared_ptr<Device> d, const std::string& spirv, std::vector<VkDescriptorType> kinds, uint32_t push,
                   const std::vector<Specialization>& spec, uint32_t required_subgroup_size)
  : device(std::move(d))
  , types(std::move(kinds))
  , push_bytes(push)
{
    const auto& vk = dispatch();
    const Guard guard;
    VkShaderModule module = VK_NULL_HANDLE;
    const auto end = [&]() noexcept { vk.vkDestroyShaderModule(device->handle, module, nullptr); };
    try {
        std::vector<VkDescriptorSetLayoutBinding> bindings;
        for (uint32_t i = 0; i < types.size(); i++)
            bindings.push_back({ i, types[i], 1, VK_SHADER_STAGE_COMPUTE_BIT, nullptr });
        VkDescriptorSetLayoutCreateInfo set_info{ VK_STRUCTURE_TYPE_DESCRIPTOR_SET_LAYOUT_CREATE_INFO };
        set_info.bindingCount = static_cast<uint32_t>(bindings.size());
        set_info.pBindings = bindings.data();
        vk.vkCreateDescriptorSetLayout(device->handle, &set_info, nullptr, &set_layout);

        const VkPushConstantRange range{ VK_SHADER_STAGE_COMPUTE_BIT, 0, push_bytes };
        VkPipelineLayoutCreateInfo layout_info{ VK_STRUCTURE_TYPE_PIPELINE_LAYOUT_CREATE_INFO };
        layout_info.setLayoutCount = 1;
        layout_info.pSetLayouts = &set_layout;
        layout_info.pushConstantRangeCount = push_bytes ? 1 : 0;
        layout_info.pPushConstantRanges = &range;
        vk.vkCreatePipelineLayout(device->handle, &layout_info, nullptr, &layout);

        std::vector<uint32_t> words(spirv.size() / 4);
        std::copy_n(spirv.data(), words.size() * 4, reinterpret_cast<char*>(words.data()));
        VkShaderModuleCreateInfo module_info{ VK_STRUCTURE_TYPE_SHADER_MODULE_CREATE_INFO };
        module_info.codeSize = words.size() * 4;
        module_info.pCode = words.data();
        vk.vkCreateShaderModule(device->handle, &module_info, nullptr, &module);

        std::vector<VkSpecializationMapEntry> entries;
        for (const auto& s : spec)
            entries.push_back({ s.id, static_cast<uint32_t>(entries.size() * sizeof(Specialization) + offsetof(Specialization, bits)), 4 });
        const VkSpecializationInfo special{ static_cast<uint32_t>(entries.size()), entries.data(), spec.size() * sizeof(Specialization), spec.data() };
        VkPipelineShaderStageRequiredSubgroupSizeCreateInfo subgroup{ VK_STRUCTURE_TYPE_PIPELINE_SHADER_STAGE_REQUIRED_SUBGROUP_SIZE_CREATE_INFO };
        subgroup.requiredSubgroupSize = required_subgroup_size;
        VkComputePipelineCreateInfo info{ VK_STRUCTURE_TYPE_COMPUTE_PIPELINE_CREATE_INFO };
        info.stage = { VK_STRUCTURE_TYPE_PIPELINE_SHADER_STAGE_CREATE_INFO };
        info.stage.pNext = required_subgroup_size ? &subgroup : nullptr;
        info.stage.stage = VK_SHADER_STAGE_COMPUTE_BIT;
        info.stage.module = module;
        info.stage.pName = "main";
        info.stage.pSpecializationInfo = spec.empty() ? nullptr : &special;
        info.layout = layout;
        vk.vkCreateComputePipelines(device->handle, device->cache, 1, &info, nullptr, &handle);
        Guard::check();
    } catch (...) {
        end();
        release();
        throw;
    }
    end();
}

Pipeline::~Pipeline()
{
    release();
}

void
Pipeline::release() noexcept
{
    const auto& vk = dispatch();
    vk.vkDestroyPipeline(device->handle, handle, nullptr);
    vk.vkDestroyPipelineLayout(device->handle, layout, nullptr);
    vk.vkDestroyDescriptorSetLayout(device->handle, set_layout, nullptr);
}

// ---------------------------------------------------------------------------------------------------------------- Device

Device::Device(uint32_t index, uint32_t family, const std::string& cached, bool unmapped)
  : force_unmapped(unmapped)
{
    guarded([&] { manager = std::make_shared<kp::Manager>(index, std::vector<uint32_t>{ family }); });
    handle = t_created.device;
    queue = t_created.queue;
    physical = manager->listDevices().at(index);
    vkGetPhysicalDeviceMemoryProperties(physical, &memory);

    // The driver rejects foreign cache data by its header; if it fails on damaged data, begin with an empty cache.
    const Guard guard;
    VkPipelineCacheCreateInfo info{ VK_STRUCTURE_TYPE_PIPELINE_CACHE_CREATE_INFO };
    info.initialDataSize = cached.size();
    info.pInitialData = cached.data();
    if (dispatch().vkCreatePipelineCache(handle, &info, nullptr, &cache) != VK_SUCCESS && !cached.empty()) {
        t_failure = {};
        info.initialDataSize = 0;
        dispatch().vkCreatePipelineCache(handle, &info, nullptr, &cache);
    }
    Guard::check();
}

Device::~Device()
{
    dispatch().vkDestroyPipelineCache(handle, cache, nullptr);
}

std::pair<uint64_t, uint64_t>
heap_budget(VkPhysicalDevice physical, const std::array<uint64_t, VK_MAX_MEMORY_HEAPS>& ours)
{
    const bool told = FeatureChain(physical).has_extension("VK_EXT_memory_budget");
    VkPhysicalDeviceMemoryBudgetPropertiesEXT budget{ VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_MEMORY_BUDGET_PROPERTIES_EXT };
    VkPhysicalDeviceMemoryProperties2 properties{ VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_MEMORY_PROPERTIES_2, told ? &budget : nullptr, {} };
    vkGetPhysicalDeviceMemoryProperties2(physical, &properties);
    const auto& heaps = properties.memoryProperties.memoryHeaps;
    const auto rank = [&](uint32_t h) { return std::make_pair(heaps[h].flags & VK_MEMORY_HEAP_DEVICE_LOCAL_BIT, heaps[h].size); };
    uint32_t best = 0;
    for (uint32_t i = 1; i < properties.memoryProperties.memoryHeapCount; i++)
        if (rank(i) > rank(best))
            best = i;
    const uint64_t limit = told ? budget.heapBudget[best] : heaps[best].size;
    const uint64_t used = told ? budget.heapUsage[best] : ours[best];
    return { limit > used ? limit - used : 0, heaps[best].size };
}

uint32_t
Device::memory_type(uint32_t allowed, bool host) const
{
    // Points for what we would like; a type without what we need is out.
    const VkMemoryPropertyFlags mapped = VK_MEMORY_PROPERTY_HOST_VISIBLE_BIT | VK_MEMORY_PROPERTY_HOST_COHERENT_BIT;
    int best = -1, best_points = -1;
    for (uint32_t i = 0; i < memory.memoryTypeCount; i++) {
        const auto flags = memory.memoryTypes[i].propertyFlags;
        const bool usable = (allowed & (1u << i)) && !(flags & (VK_MEMORY_PROPERTY_PROTECTED_BIT | VK_MEMORY_PROPERTY_DEVICE_COHERENT_BIT_AMD));
        if (!usable || (host && (flags & mapped) != mapped))
            continue;
        const bool local = flags & VK_MEMORY_PROPERTY_DEVICE_LOCAL_BIT;
        const bool cached = flags & VK_MEMORY_PROPERTY_HOST_CACHED_BIT;
        // On a discrete device host memory is for reading results and small parameters: cached, and not in the small window of
        // device memory that the host sees. Device memory: the largest local heap (mapped where everything is mapped).
        const bool large = memory.memoryHeaps[memory.memoryTypes[i].heapIndex].size > (1ull << 30);
        const int points = host ? 4 * cached + (local ? 0 : 1) : 8 * local + 4 * large + ((flags & mapped) == mapped ? 1 + cached : 0);
        if (points > best_points) {
            best = static_cast<int>(i);
            best_points = points;
        }
    }
    if (best < 0)
        throw std::runtime_error("the device offers no suitable memory type");
    return static_cast<uint32_t>(best);
}

std::string
Device::cache_data() const
{
    const Guard guard;
    size_t n = 0;
    dispatch().vkGetPipelineCacheData(handle, cache, &n, nullptr);
    std::string data(n, '\0');
    dispatch().vkGetPipelineCacheData(handle, cache, &n, data.data());
    Guard::check();
    data.resize(n);
    return data;
}

void
Device::wait_idle()
{
    const std::lock_guard lock(queue_mutex);
    const Guard guard;
    dispatch().vkDeviceWaitIdle(handle);
    Guard::check();
}

} // namespace vkllm
